"""What the records in a run directory say to those who did not write them: no value is believed beyond its kind.

A key that is missing has its default, since an older Halfstep may have written the record; one that is not known is
left out, since a newer one may have.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign
from halfstep.launcher.system.fields import Count, Finite, Flag, Measured, Positive, Text, checked
from halfstep.launcher.system.files import reason

_Kind = TypeVar("_Kind")
_FIX = "restore the file, or start the run again with its key=value words, which write it again"


class Damaged(RequestError):
    """A record of a run is not what was written."""


def damaged(file: Path, why: str, line: int | None = None) -> Damaged:
    """Return what to say of a file, or of a line in it, that is not what was written."""
    if line is None:
        return Damaged(f"{file.name} is damaged: {why}", where=str(file), fix=_FIX)
    fix = "restore the file from a copy, or delete that line"
    return Damaged(f"{file.name} is damaged in line {line}: {why}", where=f"{file}:{line}", fix=fix)


def unreadable(file: Path, error: OSError) -> Damaged:
    """Return what to say of a file that cannot be read."""
    return Damaged(f"{file} cannot be read: {reason(error)}", where=str(file), fix="check its permissions")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of summary.json, the result of a run."""

    status: Text = ""
    run_id: Text = ""
    model: Text | None = None
    zero: Count | None = None
    precision: Text | None = None
    steps: Count | None = None
    loss: Finite | None = None
    eval_loss: Finite | None = None
    tokens_per_second: Measured | None = None
    step_seconds: Measured | None = None
    mfu: Measured | None = None
    loss_scale: Measured | None = None
    wall_seconds: Measured | None = None
    peak_memory_bytes: Count | None = None
    communication_bytes: Measured | None = None
    skipped_steps: Count | None = None
    tokens: Count | None = None
    proved: Flag | None = None
    unproved_because: Text | None = None
    """None where the run is older than what is said here of the parity gate."""
    load_average: list[Measured] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PlannedTopology:
    """Of a plan, on what it runs."""

    accelerator: Text = ""
    device_name: Text = ""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Of a plan, the time of a step; empty where the device is not known."""

    step_seconds: Measured | None = None
    communication_bytes_per_rank: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Of a plan, the memory of a rank."""

    predicted_peak_bytes: Count | None = None
    peak_is_bound: Flag = False
    """Whether it is at most so much."""


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """Of a plan, the network."""

    name: Text | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """Of a plan, what is read."""

    validation_windows: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Of plan.json, what is shown of it; the whole is a `Plan`."""

    steps: Positive
    zero: Count | None = None
    precision: Text | None = None
    model: PlannedModel = PlannedModel()
    data: PlannedData = PlannedData()
    topology: PlannedTopology = PlannedTopology()
    time: Predicted | None = None
    memory: Needed | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Of env.json, on what an attempt ran."""

    host: Text | None = None
    cpu: Text = "unknown processor"
    code_revision: Text | None = None
    versions: dict[Text, Text | None] = field(default_factory=dict)
    load_average: list[Measured] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Of proof.json, what the parity gate says of a run's cell."""

    proved: Flag | None = None
    reason: Text = ""
    refused: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Of a row of metrics.jsonl, how far the run is."""

    step: Positive
    loss: Finite | None = None
    tokens_per_second: Measured | None = None


def read(file: Path, kind: type[_Kind]) -> _Kind | None:
    """Return what a record says; None where there is none. Raises Damaged where it cannot be read, or is no record."""
    try:
        return checked(kind, foreign.read_object(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(file, error) from None
    except ValueError as error:
        raise damaged(file, str(error)) from None


def reached(metrics: Path) -> Reached | None:
    """Return the newest row of a step, from the file's end; None where there is none.

    Raises Damaged where that row is not one of ours.
    """
    row: dict[str, Any] | None = next((row for row in foreign.last_objects(metrics) if "loss" in row), None)
    try:
        return None if row is None else checked(Reached, row)
    except ValueError as error:
        raise damaged(metrics, str(error)) from None
