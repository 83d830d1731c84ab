"""The manifest: what makes a folder a checkpoint, and says what is in it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.spec.digest import digest

FORMAT = 1
"""Raised whenever an older Halfstep could not read what is written."""

NAME = "manifest.json"


class Damaged(Exception):
    """A folder is no good checkpoint; its text says why."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a checkpoint."""

    name: str
    bytes: int
    xxh3: str
    """XXH3-128 of what was written, hex."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its tensors; JSON-able."""

    step: int
    """Optimizer steps done, skipped ones included."""
    tokens: int
    run_id: str
    identity: dict[str, Any]
    """What makes the run this run, as its plan has it."""
    model: dict[str, Any]
    """`name`, `config` and `parameters`: name -> shape, in the model's order."""
    world_size: int
    zero: int
    precision: str
    batch: dict[str, int]
    """`global`, `micro`, `accumulation`."""
    sequence: int
    data: dict[str, str]
    """`path` and `digest` of the corpus, for the tokenizer."""
    optimizer: dict[str, Any]
    """`kind`, `states` (the names of its tensors) and `steps`, its own count: skipped steps do not count."""
    guard: dict[str, Any]
    """Loss scale and what decides when a run has to stop."""
    lr: float
    """Of the last step."""
    versions: dict[str, str]
    attempt: str
    time: float
    """Seconds since the epoch."""
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        """Size on disk, the manifest not counted."""
        return sum(file.bytes for file in self.files)

    def to_text(self) -> str:
        """Return the manifest as JSON that carries its own digest."""
        tree = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**tree, "digest": digest(_plain(tree), 32)}, indent=1, allow_nan=False) + "\n"


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and look for its files at their sizes; their content is not read.

    Raises Damaged with the reason, and RequestError for a manifest of a newer Halfstep.
    """
    file = folder / NAME
    try:
        tree = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{NAME} is damaged: it is no JSON") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
        raise Damaged(f"{NAME} is damaged: it does not say its format")
    stated = tree.pop("digest", None)
    try:
        intact = stated == digest(tree, 32)
    except ValueError:  # JSON of ours holds no NaN
        intact = False
    if tree["format"] > FORMAT and intact:
        raise RequestError(
            f"the checkpoint has format {tree['format']}; this Halfstep reads up to {FORMAT}",
            where=str(file),
            fix="start the run with the newer Halfstep that wrote it",
        )
    if not intact:
        raise Damaged(f"{NAME} is damaged: its digest does not fit")
    del tree["format"]
    try:
        manifest = Manifest(**{**tree, "files": tuple(File(**one) for one in tree["files"])})
    except (TypeError, KeyError) as error:
        raise Damaged(f"{NAME} is damaged: {error}") from None
    for one in manifest.files:
        try:
            size = (folder / one.name).stat().st_size
        except OSError as error:
            raise Damaged(f"{one.name}: {error.strerror}") from None
        if size != one.bytes:
            raise Damaged(f"{one.name} has {size} bytes, {one.bytes} were written")
    return manifest


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree as it looks after a way through JSON, which knows no tuples."""
    return json.loads(json.dumps(tree, allow_nan=False))
