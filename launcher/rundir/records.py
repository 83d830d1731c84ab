"""What the records in a run directory say to those who did not write them: no value is believed beyond its kind.

A key that is missing has its default, since an older Halfstep may have written the record; one that is not known is
left out, since a newer one may have.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from halfstep.launcher.system import foreign
from halfstep.launcher.system.fields import Count, Finite, Flag, Measured, Positive, Text, checked
from halfstep.launcher.system.files import reason

_Kind = TypeVar("_Kind")


class Damaged(Exception):
    """A record is not what was written; its text names the file and says why."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of summary.json, the result of a run."""

    status: Text = ""
    run_id: Text = ""
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


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Of plan.json, what is shown of it."""

    steps: Positive
    zero: Count
    precision: Text
    topology: PlannedTopology = PlannedTopology()
    time: Predicted | None = None
    memory: Needed | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedSteps:
    """Of plan.json, how long the run is."""

    steps: Positive


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
class Outcome:
    """How something ended: exit.json, refused.json, and a study's outcome.json."""

    code: Count
    cause: Text = ""
    time: Finite = 0.0


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
        raise Damaged(f"{file.name} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise Damaged(f"{file.name}: {error}") from None


def reached(metrics: Path) -> Reached | None:
    """Return the newest row of a step, from the file's end; None where there is none.

    Raises Damaged where that row is not one of ours.
    """
    row: dict[str, Any] | None = next((row for row in foreign.last_objects(metrics) if "loss" in row), None)
    try:
        return None if row is None else checked(Reached, row)
    except ValueError as error:
        raise Damaged(f"{metrics.name}: {error}") from None
