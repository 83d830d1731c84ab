"""The folder of a ready task: rows to train on, rows held out, and the file that judges models by these."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.data.publish import appearing
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system.files import write_json

SPLITS = ("train", "validation", "test")
_TEST, _VALIDATION = 0.1, 0.05
"""Shares of the sources that are held out."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example: what a model is given, what a right answer is, and what decides which split it belongs to."""

    prompt: str
    completion: str
    source: str
    """Rows of the same source are in the same split."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What there is to write."""

    name: str
    rows: Sequence[Row]
    judged_by: str
    """The task file below name and data, as TOML."""
    about: dict[str, Any]
    """Where the rows come from and what was done to them."""
    text: Sequence[str] = field(default=())
    """Documents to train a tokenizer and a base model on, instead of the training rows."""


def split_of(source: str, seed: int) -> str:
    """Return the split of a source: a pure function of its text and the seed, whatever else there is."""
    share = _number(source, seed) / 2**64
    return "test" if share < _TEST else "validation" if share < _TEST + _VALIDATION else "train"


def write(out: Path, made: Made, seed: int, most: int | None) -> dict[str, Any]:
    """Write a task's folder and return what is in it; at most `most` training rows.

    The same rows and seed give the same files, to the byte. Raises RequestError where `out` exists, or a split is
    empty.
    """
    if out.exists():
        raise RequestError(f"{out} exists", where=f"--out {out}", fix="name a folder that does not exist yet")
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in made.rows:
        rows[split_of(row.source, seed)].append(row)
    for split in SPLITS:  # by number, so that a shorter file is the beginning of a longer one
        rows[split].sort(key=lambda row: (_number(f"{row.prompt}\0{row.completion}", seed), row.prompt, row.completion))
    rows["train"] = rows["train"][:most]
    empty = next((split for split in SPLITS if not rows[split]), None)
    if empty:
        raise RequestError(
            f"{len(made.rows)} rows are too few: none is left for {empty}.jsonl",
            where=f"--out {out}",
            fix="name a source with more of them",
        )
    about = {"task": made.name, "seed": seed, "rows": {split: len(rows[split]) for split in SPLITS}, **made.about}
    try:
        with appearing(out) as folder:
            for split in SPLITS:
                shown = ({"prompt": row.prompt, "completion": row.completion} for row in rows[split])
                _lines(folder / f"{split}.jsonl", shown)
            texts = made.text or [row.prompt + row.completion for row in rows["train"]]
            _lines(folder / "text.jsonl", ({"text": text} for text in texts))
            for split in ("test", "validation"):
                file = "task.toml" if split == "test" else "validation.toml"
                (folder / file).write_text(f'name = "{made.name}"\ndata = "{split}.jsonl"\n{made.judged_by}', "utf-8")
            write_json(folder / "about.json", about)
    except FileExistsError:
        raise RequestError(
            f"{out} was made by somebody else meanwhile", where=f"--out {out}", fix="name another folder"
        ) from None
    return about


def _lines(file: Path, rows: Iterable[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _number(text: str, seed: int) -> int:
    """Return 64 bits of a text's hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "big")
