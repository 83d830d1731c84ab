"""The cells of a study: every combination of its axes for every seed, each planned, pinned, or refused by a rule."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfstep.launcher.config.digest import digest
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.errors import HalfstepError, RefusedError, RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.study.axes import Pattern, Value, word_of
from halfstep.launcher.study.study_file import Study

Decide = Callable[[Request], Plan]
"""How a request is planned, for the world that the study will run in."""

_LONGEST = 120
"""Letters of a folder's name, less seed and run id."""
PINNED = {"ds.zero_optimization.overlap_comm": False}
"""DeepSpeed keys that would differ between stages by themselves; a study that names one of them decides it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study."""

    values: dict[str, str]
    """By axis, the value's label."""
    seed: int
    arguments: tuple[str, ...]
    """Run keys that make it, but for `out`."""
    request: Request
    plan: Plan | None
    """None where it could not be planned."""
    refused: str | None
    """The rule that forbids it, and why."""

    @property
    def name(self) -> str:
        """Return how it is called, without its seed."""
        return " ".join(f"{axis.removesuffix('.name')}={value}" for axis, value in self.values.items())

    @property
    def folder(self) -> str:
        """Return the name of its run directory: another plan gets another one."""
        assert self.plan is not None, "a cell that could not be planned has no run"
        parts = [_short(*pair) for pair in self.values.items()]
        name = "-".join(parts)
        # Where letters had to be replaced, or cut off, two cells could come by one name.
        lossy = len(name) > _LONGEST or any(
            _told(*pair) != word for pair, word in zip(self.values.items(), parts, strict=True)
        )
        name = f"{name[:_LONGEST]}-{digest(self.values)[:6]}" if lossy else name
        return f"{name}-s{self.seed}-{self.plan.run_id[:8]}"


def cells(study: Study, decide: Decide) -> list[Cell]:
    """Return every cell that `only` and `exclude` leave, seed by seed, in the order of the axes.

    Raises RequestError for a value that its key does not take, and where not a single cell can be planned.
    """
    errors: list[HalfstepError] = []
    planned = [
        _cell(study, chosen, seed, decide, errors)
        for seed in study.seeds
        for chosen in itertools.product(*(axis.values for axis in study.axes))
        if _wanted(study, _labels(study, chosen))
    ]
    if errors and len(errors) == len(planned):
        raise errors[0]
    if not planned:
        raise RequestError("no cell is left", where=f"only and exclude in {study.source}", fix="leave more")
    planned = _with_equal_micro(planned, decide, study)
    for reference in references(study.reference, study.within, [cell.values for cell in planned]).values():
        if not any(cell.values == reference for cell in planned):
            name = " ".join(f"{key}={value}" for key, value in reference.items())
            raise RequestError(
                f"the reference {name} is not in the grid",
                where=f"compare.reference, only and exclude in {study.source}",
                fix="leave it in, or name another",
            )
    return planned


def references(
    reference: dict[str, str], within: str | None, cells: Sequence[dict[str, str]]
) -> dict[str, dict[str, str]]:
    """Return the reference by each value of the axis within which cells are compared, or one by an empty name."""
    if within is None:
        return {"": reference}
    return {cell[within]: {**reference, within: cell[within]} for cell in cells}


def order(cells: Sequence[Cell], seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield cells in the order in which they run: pass by pass, every other one backwards.

    A machine that gets slower, or faster, over the hours then favours no cell.
    """
    for place, seed in enumerate(seeds):
        those = [cell for cell in cells if cell.seed == seed]
        yield from those if place % 2 == 0 else reversed(those)


def _labels(study: Study, chosen: Sequence[Value]) -> dict[str, str]:
    return {axis.name: value.label for axis, value in zip(study.axes, chosen, strict=True)}


def _wanted(study: Study, labels: dict[str, str]) -> bool:
    within = not study.only or any(_matches(labels, pattern) for pattern in study.only)
    return within and not any(_matches(labels, pattern) for pattern in study.exclude)


def _matches(labels: dict[str, str], pattern: Pattern) -> bool:
    return all(labels[key] in values for key, values in pattern.items())


def _cell(study: Study, chosen: Sequence[Value], seed: int, decide: Decide, errors: list[HalfstepError]) -> Cell:
    keys = dict(study.base)
    for value in chosen:
        keys |= value.keys
    where = _place(study)
    arguments = _words(keys, seed)
    if load(arguments, origin=where).spec.zero > 0 and "ds_config" not in keys:
        arguments = _words({**keys, **{key: value for key, value in PINNED.items() if key not in keys}}, seed)
    labels = _labels(study, chosen)
    request = load(arguments, origin=where)
    plan = refused = None
    try:
        plan = decide(request)
        refused = "; ".join(f"{refusal['rule']}: {refusal['sentence']}" for refusal in plan.refused_by) or None
    except HalfstepError as error:
        errors.append(error)
        refused = _refusal(error)
    return Cell(values=labels, seed=seed, arguments=arguments, request=request, plan=plan, refused=refused)


def _with_equal_micro(cells: list[Cell], decide: Decide, study: Study) -> list[Cell]:
    """Return the cells with one micro-batch for all that share a batch alike: the smallest that any of them is given.

    On a GPU it follows from the memory that a cell needs, which its axes change; a study that names it decides it.
    """
    smallest: dict[int, int] = {}
    for cell in cells:
        if cell.plan is not None and cell.plan.micro_because:
            batch = cell.plan.batch
            share = batch.micro * batch.accumulation
            smallest[share] = min(smallest.get(share, share), batch.micro)
    return [_with_micro(cell, smallest, decide, study) for cell in cells]


def _with_micro(cell: Cell, smallest: dict[int, int], decide: Decide, study: Study) -> Cell:
    if cell.plan is None or not cell.plan.micro_because:
        return cell
    micro = smallest[cell.plan.batch.micro * cell.plan.batch.accumulation]
    arguments = (*cell.arguments, f"batch.micro={micro}")
    request = load(arguments, origin=_place(study))
    try:
        plan, refused = decide(request), cell.refused
    except HalfstepError as error:
        plan, refused = None, _refusal(error)
    return replace(cell, arguments=arguments, request=request, plan=plan, refused=refused)


def _place(study: Study) -> str:
    return f"{Path(study.source).name} or the command line"


def _refusal(error: HalfstepError) -> str:
    return f"{'does-not-fit' if isinstance(error, RefusedError) else 'request'}: {error.what}"


def _words(keys: dict[str, Any], seed: int) -> tuple[str, ...]:
    arguments = [word_of("model" if key == "model.name" else key, value) for key, value in keys.items()]
    return (*arguments, f"seed={seed}")


def _told(axis: str, value: str) -> str:
    """Return a value as part of a folder's name: with its key where it does not speak for itself."""
    key = axis.removesuffix(".name").rpartition(".")[2]
    return value if re.match(r"[A-Za-z]", value) and value not in ("true", "false") else f"{key}{value}"


def _short(axis: str, value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "_", _told(axis, value))
