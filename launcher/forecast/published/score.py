"""Predict published runs, and read what was measured of them."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import step_time
from halfstep.launcher.forecast.hardware import Rows
from halfstep.launcher.forecast.published import published_runs, run_memory
from halfstep.launcher.forecast.published.published_runs import Row
from halfstep.launcher.forecast.published.run_shape import number
from halfstep.launcher.system.files import csv_cell, reason, write_atomic


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is predicted of a row; None where nothing can be predicted."""

    row_id: str
    tokens_per_s_per_gpu: float | None
    peak_memory_gib: float | None


def measured_speed(text: Mapping[str, str]) -> float | None:
    """Return a row's measured tokens/s of one device, from its TFLOP/s or step time where it does not say it itself.

    None where it says neither, or FLOPs by a convention that is not known.
    """
    speed = number(text.get("tokens_per_s_per_gpu", ""))
    if speed:
        return speed
    batch, seconds, devices, sequence = (
        number(text.get(name, "")) for name in ("global_batch", "iter_time_s", "n_gpus", "seq_len")
    )
    if batch and seconds and devices and sequence:
        return batch * sequence / seconds / devices
    work, flops = _flops_per_token(text), number(text.get("tflops_per_gpu", ""))
    return flops * 1e12 / work if work and flops else None


def _flops_per_token(text: Mapping[str, str]) -> float | None:
    named = text.get("flops_convention", "").replace(" ", "")
    row = published_runs.parse(text)
    shape, s = row.workload.shape, row.workload.sequence
    if shape is None or not text.get("hidden"):
        return None
    n, layers, h, v = row.workload.parameters, shape.layers, shape.width, shape.vocabulary
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
    """Predict every row of a file; None where nothing can be predicted."""
    return [predict_row(row) for row in published_runs.read(path, own)]


def predict_row(row: Row) -> Prediction:
    """Predict one row."""
    step = None
    if row.device is not None:
        step = step_time.forecast(row.workload, row.device, layout=row.layout, stack=row.stack)
    return Prediction(
        row_id=row.row_id,
        tokens_per_s_per_gpu=step.tokens_per_second_per_device if step else None,
        peak_memory_gib=run_memory.peak_gib(row),
    )


def write(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as CSV, empty where nothing could be predicted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row_id", "tokens_per_s_per_gpu", "peak_memory_gib"])
    for prediction in predictions:
        speed, peak = prediction.tokens_per_s_per_gpu, prediction.peak_memory_gib
        writer.writerow(
            [
                csv_cell(prediction.row_id),
                "" if speed is None else f"{speed:.6g}",
                "" if peak is None else f"{peak:.4g}",
            ]
        )
    try:
        write_atomic(path, text.getvalue())
    except OSError as error:
        raise RequestError(f"cannot be written: {reason(error)}", where=str(path), fix="name another file") from None


def measured_memory(text: Mapping[str, str]) -> float | None:
    """Return a row's measured peak in GiB, None where it says none."""
    said, unit = number(text.get("mem_GB", "")), text.get("unit", "")
    if said is None:
        said, unit = number(text.get("peak_mem_GB", "")), "GiB" if "GiB" in text.get("notes", "") else "GB"
    return said if said is None or unit.startswith("GiB") else said * 1e9 / 2**30
