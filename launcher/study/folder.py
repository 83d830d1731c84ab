"""A study's folder: study.json, which says what its cells are, and a run directory for each of them under runs/."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.files import cannot_write, write_json
from launcher.lease import LEASE_FILES
from launcher.study.file import Study
from launcher.study.grid import Cell

_FORMAT = 1
_FILE = "study.json"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a study's folder keeps when its file, or what its base rests on, has changed."""

    kept: int
    """Runs that are part of it as before."""
    new: int
    left: tuple[str, ...]
    """Run directories that are no part of it any more; nobody touches them."""


def location(study: Study, out: Path | None) -> Path:
    """Return where a study lives: `--out`, or studies/NAME under the current folder."""
    return (out or Path("studies") / study.name).absolute()


def run_of(folder: Path, cell: Cell) -> Path:
    """Return a cell's run directory."""
    return folder / "runs" / cell.folder


def compare(folder: Path, cells: Sequence[Cell]) -> Change:
    """Return what a folder keeps for these cells; raises RequestError where it is something else's."""
    ours = not folder.exists() or (folder / _FILE).is_file()
    if not ours and (not folder.is_dir() or any(one.name not in LEASE_FILES for one in folder.iterdir())):
        raise RequestError(
            f"{folder} exists and is not a study's folder", where="--out", fix="choose one that does not exist yet"
        )
    try:
        before = {one["run"] for one in read(folder)["cells"] if one["run"] is not None}
    except RequestError:  # there is none yet, or it is damaged: the directories are what there is
        before = {f"runs/{one.name}" for one in (folder / "runs").glob("*")}
    before = {one for one in before if (folder / one).is_dir()}
    now = {f"runs/{cell.folder}" for cell in cells if cell.plan is not None and cell.refused is None}
    return Change(kept=len(now & before), new=len(now - before), left=tuple(sorted(before - now)))


def write(folder: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Write what the study is made of."""
    listed = [
        {
            "values": cell.values,
            "seed": cell.seed,
            "words": cell.words,
            "run": f"runs/{cell.folder}" if cell.plan is not None else None,
            "refused": cell.refused,
        }
        for cell in cells
    ]
    about = {**asdict(study), "axes": {axis.name: [one.label for one in axis.values] for axis in study.axes}}
    with cannot_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _FILE, {"format": _FORMAT, "time": time.time(), "study": about, "cells": listed})


def read(folder: Path) -> dict[str, Any]:
    """Return study.json; raises RequestError where there is none, or it is damaged."""
    file = folder / _FILE
    try:
        found = json.loads(file.read_text("utf-8"))
        if found["format"] != _FORMAT or not _is_whole(found):
            raise ValueError("not ours")
    except FileNotFoundError:
        raise RequestError(
            f"{folder} is not a study's folder", where=str(file), fix="name one that `halfstep study run` made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(
            "study.json is damaged", where=str(file), fix="start `halfstep study run` again: it writes it anew"
        ) from None
    return found


def _is_whole(found: dict[str, Any]) -> bool:
    """Tell whether everything is there that the other pages read."""
    about, cells = found["study"], found["cells"]
    texts = all(
        isinstance(one["values"], dict)
        and all(isinstance(label, str) for label in one["values"].values())
        and isinstance(one["seed"], int)
        and isinstance(one["words"], list)
        and all(isinstance(one[key], str | None) for key in ("run", "refused"))
        for one in cells
    )
    named = all(isinstance(about[key], dict) for key in ("axes", "reference")) and isinstance(about["seeds"], list)
    return texts and named and any(one["values"] == about["reference"] for one in cells)


def find(word: str) -> Path:
    """Return the folder that a word names: itself, or a study's by its name."""
    for folder in (Path(word), Path("studies") / Path(word).name.removesuffix(".toml")):
        if (folder / _FILE).is_file():
            return folder.absolute()
    raise RequestError(
        f"{word} is no study that was started here",
        where="the command line",
        fix="name its folder, or start it: `halfstep study run STUDY`",
    )
