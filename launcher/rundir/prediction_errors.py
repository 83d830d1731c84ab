"""Compare what a run's plan predicted with what its summary measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.rundir import records
from halfstep.launcher.rundir.records import damaged
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system import terminal

_FIX = "name the directory of a run that has ended"


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
    peak_is_bound: bool
    """Whether it is at most so much, so that it is no error where less was measured."""
    measured_peak_bytes: int | None
    """Of the rank that needed most."""
    predicted_sent_bytes: float | None
    measured_sent_bytes: float | None
    """By one rank in an optimizer step."""

    @property
    def step_error(self) -> float | None:
        """Prediction over measurement, less comparison."""
        return _error(self.predicted_step_seconds, self.measured_step_seconds)

    @property
    def peak_error(self) -> float | None:
        """Prediction over measurement, less comparison; None of an upper bound."""
        return None if self.peak_is_bound else _error(self.predicted_peak_bytes, self.measured_peak_bytes)

    @property
    def sent_error(self) -> float | None:
        """Prediction over measurement, less comparison."""
        return _error(self.predicted_sent_bytes, self.measured_sent_bytes)


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1 if predicted and measured else None


def run(path: Path) -> Comparison:
    """Compare a run directory's plan with its summary; raises RequestError where either is missing or damaged."""
    plan, summary = Run(path).planned, Run(path).summary
    if plan is None or summary is None:
        missing = "plan.json" if plan is None else "summary.json"
        raise RequestError(f"there is no {missing}", where=str(path / missing), fix=_FIX)
    if plan.zero is None or plan.precision is None:
        raise damaged(path / "plan.json", "it has no " + ("zero" if plan.zero is None else "precision"))
    speed, memory = plan.time or records.Predicted(), plan.memory or records.Needed()
    return Comparison(
        run=str(path),
        cell=f"zero={plan.zero} precision={plan.precision}",
        device=plan.topology.device_name or plan.topology.accelerator,
        predicted_step_seconds=speed.step_seconds,
        measured_step_seconds=summary.step_seconds,
        predicted_peak_bytes=memory.predicted_peak_bytes,
        measured_peak_bytes=summary.peak_memory_bytes,
        peak_is_bound=memory.peak_is_bound,
        predicted_sent_bytes=speed.communication_bytes_per_rank,
        measured_sent_bytes=summary.communication_bytes,
    )


def table(compared: Sequence[Comparison]) -> list[str]:
    """Return comparisons as text, with the mean of their errors."""
    rows = [["run", "cell"]]
    rows[0] += [cell for name in ("step s", "GiB", "MiB sent") for cell in (name, "predicted", "error")]
    for comparison in compared:
        values = (
            (comparison.measured_step_seconds, comparison.predicted_step_seconds, 1.0, comparison.step_error),
            (comparison.measured_peak_bytes, comparison.predicted_peak_bytes, 2**30, comparison.peak_error),
            (comparison.measured_sent_bytes, comparison.predicted_sent_bytes, 2**20, comparison.sent_error),
        )
        each = [cell for a, b, unit, error in values for cell in (_cell(a, unit), _cell(b, unit), _percent(error))]
        rows.append([comparison.run[-32:], comparison.cell, *each])
    text = terminal.table(rows, left=(0, 1))
    for name, errors in (
        ("step time", [comparison.step_error for comparison in compared if comparison.step_error is not None]),
        ("peak memory", [comparison.peak_error for comparison in compared if comparison.peak_error is not None]),
        ("bytes sent", [comparison.sent_error for comparison in compared if comparison.sent_error is not None]),
    ):
        if errors:
            mean = statistics.mean(abs(error) for error in errors)
            text.append(f"{name}: mean error {100 * mean:.1f} % over {len(errors)} run(s)")
    return text


def _cell(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.4g}"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.1f} %"
