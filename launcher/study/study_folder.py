"""A study's folder: study.json, which says what its cells are, and a run directory for each of them under runs/."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from halfstep.launcher.errors import RequestError
from halfstep.launcher.rundir.lease import LEASE_FILES
from halfstep.launcher.study.grid import Cell
from halfstep.launcher.study.study_file import Study
from halfstep.launcher.system import foreign
from halfstep.launcher.system.fields import Measured, Text, Whole, checked, plain_name
from halfstep.launcher.system.files import cannot_write, reason, write_json

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
    if not ours and (not folder.is_dir() or any(file.name not in LEASE_FILES for file in folder.iterdir())):
        raise RequestError(
            f"{folder} exists and is not a study's folder", where="--out", fix="choose one that does not exist yet"
        )
    try:
        before = {cell["run"] for cell in read(folder)["cells"] if cell["run"] is not None}
    except RequestError:  # there is none yet, or it is damaged: the directories are what there is
        before = {f"runs/{run.name}" for run in (folder / "runs").glob("*")}
    before = {run for run in before if (folder / run).is_dir()}
    now = {f"runs/{cell.folder}" for cell in cells if cell.plan is not None and cell.refused is None}
    return Change(kept=len(now & before), new=len(now - before), left=tuple(sorted(before - now)))


def write(folder: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Write what the study is made of."""
    listed = [
        {
            "values": cell.values,
            "seed": cell.seed,
            "words": cell.arguments,
            "run": f"runs/{cell.folder}" if cell.plan is not None else None,
            "refused": cell.refused,
        }
        for cell in cells
    ]
    about = {**asdict(study), "axes": {axis.name: [value.label for value in axis.values] for axis in study.axes}}
    about["words"] = about.pop("overrides")
    del about["prepare"]
    with cannot_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _FILE, {"format": _FORMAT, "time": time.time(), "study": about, "cells": listed})


def read(folder: Path) -> dict[str, Any]:
    """Return study.json; raises RequestError where there is none, or it is damaged."""
    file = folder / _FILE
    try:
        tree = foreign.read_object(file)
        _check(checked(_Tree, tree))
    except FileNotFoundError:
        raise RequestError(
            f"{folder} is not a study's folder", where=str(file), fix="name one that `halfstep study run` made"
        ) from None
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise RequestError(
            f"study.json is damaged: {why}",
            where=str(file),
            fix="start `halfstep study run` with the study's file again: it writes it from that",
        ) from None
    return tree


@dataclass(frozen=True, kw_only=True)
class _Cell:
    values: dict[Text, Text]
    seed: Whole
    arguments: Annotated[list[Text], Field(alias="words")]
    run: Text | None
    refused: Text | None


@dataclass(frozen=True, kw_only=True)
class _About:
    name: Text
    source: Text
    axes: dict[Text, list[Text]]
    reference: dict[Text, Text]
    within: Text | None = None
    seeds: list[Whole]
    currency: Text
    price: Measured | None = None
    overrides: Annotated[list[Text], Field(alias="words", default_factory=list)]


@dataclass(frozen=True, kw_only=True)
class _Tree:
    format: Whole
    study: _About
    cells: list[_Cell]


def _check(tree: _Tree) -> None:
    """Raise ValueError for what no study has: cells beside its axes, runs elsewhere, a reference that is no cell."""
    if tree.format != _FORMAT:
        raise ValueError(f"its format is {tree.format}, this Halfstep reads {_FORMAT}")
    axes = tree.study.axes
    for number, cell in enumerate(tree.cells):
        if set(cell.values) != set(axes) or any(label not in axes[name] for name, label in cell.values.items()):
            raise ValueError(f"cells.{number} is not on the study's axes")
        if cell.run is not None:
            place, _, name = cell.run.partition("/")
            if place != "runs":
                raise ValueError(f"cells.{number}.run = {cell.run!r} lies outside of the study")
            plain_name(name)
    if tree.study.within is not None and tree.study.within not in axes:
        raise ValueError(f"it is compared within {tree.study.within!r}, which is none of its axes")
    for label in axes.get(tree.study.within or "", [None]):
        wanted = {**tree.study.reference, **({} if label is None else {str(tree.study.within): label})}
        if not any(cell.values == wanted for cell in tree.cells):
            raise ValueError("its reference is none of its cells")


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
