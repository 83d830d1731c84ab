"""Predict published rows, and compare what was predicted with what was measured."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launcher import records
from launcher.errors import RequestError
from launcher.files import csv_cell, reason, write_atomic
from launcher.plan import rows, rows_memory, time
from launcher.plan.hardware import Rows
from launcher.plan.rows import Row
from launcher.plan.rows_shape import number

_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is predicted of a row; None where nothing can be told."""

    row_id: str
    tokens_per_s_per_gpu: float | None
    peak_memory_gib: float | None


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


def measured_speed(text: Mapping[str, str]) -> float | None:
    """Return a row's measured tokens/s of one device, from its TFLOP/s or step time where it does not say it itself.

    None where it says neither, or FLOPs by a convention that is not known.
    """
    told = number(text.get("tokens_per_s_per_gpu", ""))
    if told:
        return told
    batch, seconds, devices, sequence = (
        number(text.get(name, "")) for name in ("global_batch", "iter_time_s", "n_gpus", "seq_len")
    )
    if batch and seconds and devices and sequence:
        return batch * sequence / seconds / devices
    work, flops = _flops_per_token(text), number(text.get("tflops_per_gpu", ""))
    return flops * 1e12 / work if work and flops else None


def _flops_per_token(text: Mapping[str, str]) -> float | None:
    named = text.get("flops_convention", "").replace(" ", "")
    row = rows.parse(text)
    shape, s = row.setting.shape, row.setting.sequence
    if shape is None or not text.get("hidden"):
        return None
    n, layers, h, v = row.setting.parameters, shape.layers, shape.width, shape.vocabulary
    if "96B" in named:
        return 96 * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
    if "72B" in named:
        return 72 * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
    if "8N" in named:
        return 8.0 * n
    if "6(N-Vh)+12Lhs" in named:
        return 6.0 * (n - v * h) + 12.0 * layers * h * s
    if "6(N-Vh)+6Lhs" in named:
        return 6.0 * (n - v * h) + 6.0 * layers * h * s
    if "6N+12Lhs" in named:
        return 6.0 * n + 12.0 * layers * h * s
    return 6.0 * n if named == "6N" else None


def predict(path: Path, own: Rows | None = None) -> list[Prediction]:
    """Predict every row of a file; None where nothing can be told."""
    return [predict_row(row) for row in rows.read(path, own)]


def predict_row(row: Row) -> Prediction:
    """Predict one row."""
    told = None
    if row.device is not None:
        told = time.forecast(row.setting, row.device, layout=row.layout, stack=row.stack)
    return Prediction(
        row_id=row.row_id,
        tokens_per_s_per_gpu=told.tokens_per_second_per_device if told else None,
        peak_memory_gib=rows_memory.peak_gib(row),
    )


def write(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as CSV, empty where nothing could be told."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row_id", "tokens_per_s_per_gpu", "peak_memory_gib"])
    for one in predictions:
        speed, peak = one.tokens_per_s_per_gpu, one.peak_memory_gib
        writer.writerow(
            [csv_cell(one.row_id), "" if speed is None else f"{speed:.6g}", "" if peak is None else f"{peak:.4g}"]
        )
    try:
        write_atomic(path, text.getvalue())
    except OSError as error:
        raise RequestError(f"cannot be written: {reason(error)}", where=str(path), fix="name another file") from None


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


def measured_memory(text: Mapping[str, str]) -> float | None:
    """Return a row's measured peak in GiB, None where it says none."""
    said, unit = number(text.get("mem_GB", "")), text.get("unit", "")
    if said is None:
        said, unit = number(text.get("peak_mem_GB", "")), "GiB" if "GiB" in text.get("notes", "") else "GB"
    return said if said is None or unit.startswith("GiB") else said * 1e9 / 2**30
