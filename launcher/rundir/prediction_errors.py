"""Compare what a run's plan predicted with what its summary measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from halfstep.launcher.errors import RequestError
from halfstep.launcher.rundir import records

_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run as it was predicted and as it was."""

    run: str
    cell: str
    device: str
    predicted_step_seconds: float | None
    measured_step_seconds: float | None
    """Median of the steps after the first five."""
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    """Of the rank that needed most."""
    predicted_sent_bytes: float | None
    measured_sent_bytes: float | None
    """By one rank in an optimizer step."""

    @property
    def step_error(self) -> float | None:
        """Prediction over measurement, less one."""
        return _error(self.predicted_step_seconds, self.measured_step_seconds)

    @property
    def peak_error(self) -> float | None:
        """Prediction over measurement, less one."""
        return _error(self.predicted_peak_bytes, self.measured_peak_bytes)

    @property
    def sent_error(self) -> float | None:
        """Prediction over measurement, less one."""
        return _error(self.predicted_sent_bytes, self.measured_sent_bytes)


def _error(told: float | None, measured: float | None) -> float | None:
    return told / measured - 1 if told and measured else None


def run(path: Path) -> Comparison:
    """Compare a run directory's plan with its summary; raises RequestError where either is missing or damaged."""
    plan, summary = _read(path / "plan.json", records.Planned), _read(path / "summary.json", records.Summary)
    speed, memory = plan.time or records.Predicted(), plan.memory or records.Needed()
    return Comparison(
        run=str(path),
        cell=f"zero={plan.zero} precision={plan.precision}",
        device=plan.topology.device_name or plan.topology.accelerator,
        predicted_step_seconds=speed.step_seconds,
        measured_step_seconds=summary.step_seconds,
        predicted_peak_bytes=memory.predicted_peak_bytes,
        measured_peak_bytes=summary.peak_memory_bytes,
        predicted_sent_bytes=speed.communication_bytes_per_rank,
        measured_sent_bytes=summary.communication_bytes,
    )


def table(compared: Sequence[Comparison]) -> list[str]:
    """Return comparisons as text, with the mean of their errors."""
    each = " ".join(f"{name:>8} {'told':>8} {'off':>7}  " for name in ("step s", "GiB", "MiB sent"))
    text = [f"{'run':<32} {'cell':<24} {each}".rstrip()]
    for one in compared:
        values = (
            (one.measured_step_seconds, one.predicted_step_seconds, 1.0, one.step_error),
            (one.measured_peak_bytes, one.predicted_peak_bytes, 2**30, one.peak_error),
            (one.measured_sent_bytes, one.predicted_sent_bytes, 2**20, one.sent_error),
        )
        each = " ".join(f"{_cell(a, unit)} {_cell(b, unit)} {_percent(error)}  " for a, b, unit, error in values)
        text.append(f"{one.run[-32:]:<32} {one.cell:<24} {each}".rstrip())
    for name, errors in (
        ("step time", [one.step_error for one in compared if one.step_error is not None]),
        ("peak memory", [one.peak_error for one in compared if one.peak_error is not None]),
        ("bytes sent", [one.sent_error for one in compared if one.sent_error is not None]),
    ):
        if errors:
            mean = statistics.mean(abs(one) for one in errors)
            text.append(f"{name}: mean error {100 * mean:.1f} % over {len(errors)} run(s)")
    return text


def _cell(value: float | None, unit: float) -> str:
    return f"{'-' if value is None else f'{value / unit:.4g}':>8}"


def _percent(error: float | None) -> str:
    return f"{'-' if error is None else f'{100 * error:+.1f} %':>7}"


def _read(path: Path, kind: type[_Record]) -> _Record:
    fix = "name the directory of a run that has ended"
    try:
        record = records.read(path, kind)
    except records.Damaged as error:
        raise RequestError(f"a record is damaged: {error}", where=str(path), fix=fix) from None
    if record is None:
        raise RequestError(f"there is no {path.name}", where=str(path), fix=fix)
    return record
