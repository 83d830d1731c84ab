"""What benchmarks/planner_score.py prints: errors by split, trainer and device, of speed and of memory."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfstep.launcher.forecast import step_time
from halfstep.launcher.forecast.calibration import Calibration
from halfstep.launcher.forecast.published import published_runs, run_memory, score
from halfstep.launcher.forecast.published.published_runs import Row


@dataclass
class Known:
    """The runs that can be fitted: rows with a measured and a predictable speed."""

    rows: list[Row]
    measured: np.ndarray
    """Logarithm of tokens/s of one device."""
    weights: np.ndarray

    def subset(self, keep: Sequence[bool]) -> "Known":
        chosen = np.array(keep)
        kept = [row for row, kept in zip(self.rows, keep, strict=True) if kept]
        return Known(kept, self.measured[chosen], self.weights[chosen])


def predict(row: Row, known: Calibration) -> float | None:
    """Return the logarithm of a row's tokens/s of one device."""
    assert row.device is not None
    predicted = step_time.forecast(row.workload, row.device, layout=row.layout, stack=row.stack, known=known)
    return math.log(predicted.tokens_per_second_per_device) if predicted else None


def data_parallel_half(row: Row) -> bool:
    """Tell whether a row is of the kind that the goal is set for: 16 bits, nothing but data parallelism."""
    plain = row.layout.cut == 1 and row.layout.context == 1 and row.layout.arithmetic is None
    return plain and not row.source.startswith("VIA-Research")


def errors(predicted: np.ndarray, known: Known, keep: Sequence[bool]) -> str:
    """Return MAPE, its median and its 90th percentile over some rows, in percent."""
    wrong = sorted(abs(math.expm1(a - b)) for a, b, kept in zip(predicted, known.measured, keep, strict=True) if kept)
    if not wrong:
        return "no rows"
    p90 = wrong[min(len(wrong) - 1, math.ceil(0.9 * len(wrong)) - 1)]
    return (
        f"rows {len(wrong):4d}  MAPE {100 * statistics.mean(wrong):5.1f}  median {100 * statistics.median(wrong):5.1f}"
        f"  p90 {100 * p90:5.1f}"
    )


def report(predicted: np.ndarray, known: Known, title: str) -> list[str]:
    """Return the errors of one way of leaving out, by kind, by stack and by device."""
    own = [data_parallel_half(row) for row in known.rows]
    grid = [row.source.startswith("VIA-Research") for row in known.rows]
    lines = [title]
    kinds = {
        "data-parallel, 16 bits": own,
        "  without BigScience": [a and "bigscience" not in r.source for a, r in zip(own, known.rows, strict=True)],
        "vTrain": grid,
        "TP, PP, CP or fp8": [not (a or b) for a, b in zip(own, grid, strict=True)],
        "all": [True] * len(own),
    }
    lines += [f"  {name:<34} {errors(predicted, known, keep)}" for name, keep in kinds.items()]
    moved = predicted - _stack_medians(predicted, known)
    lines.append(f"  {'data-parallel, a constant a stack':<34} {errors(moved, known, own)}")
    for kind, of in (("stack", lambda row: row.stack), ("device", lambda row: row.device.name)):
        for name in sorted({of(row) for row in known.rows}):
            lines.append(
                f"  {kind + ' ' + name:<34} {errors(predicted, known, [of(row) == name for row in known.rows])}"
            )
    return lines


def _stack_medians(predicted: np.ndarray, known: Known) -> np.ndarray:
    """Return the median error of each row's stack: what one constant for each, fitted to all its rows, takes away."""
    stacks = np.array([row.stack for row in known.rows])
    off = predicted - known.measured
    return np.array([np.median(off[stacks == stack]) for stack in stacks])


def memory_report(paths: Iterable[Path]) -> list[str]:
    """Return the error of peak memory by trainer; nothing of it is fitted."""
    by: dict[str, list[float]] = {}
    for path in paths:
        for row in published_runs.read(path):
            seen, predicted = score.measured_memory(row.text), run_memory.peak_gib(row)
            if seen and predicted:
                by.setdefault(row.stack, []).append(100 * (predicted / seen - 1))
    lines = ["peak memory: rows, mean, mean absolute and median absolute error in percent"]
    for name, wrong in sorted(by.items()):
        away = [abs(error) for error in wrong]
        lines.append(
            f"  {name:<24} {len(wrong):4d} {statistics.mean(wrong):+7.0f} {statistics.mean(away):6.0f} "
            f"{statistics.median(away):6.0f}"
        )
    return lines


def scaling(known: Calibration) -> list[str]:
    """Return the MFU of llm-foundry's 7B on H100 at each published size, `palm` convention, in percent."""
    lines = ["llm-foundry 7B on H100, s=2048: devices, micro-batch, MFU (6N + 12Lhs)"]
    text = {"row_id": "-", "source": "mosaicml/llm-foundry", "gpu": "H100-80GB", "model_params_B": "6.6589"}
    text |= {"layers": "32", "hidden": "4096", "heads": "32", "ffn": "16384", "vocab": "50368", "seq_len": "2048"}
    for devices, micro, shard in ((8, 6, "FULL_SHARD"), (16, 10, "FULL_SHARD"), (32, 10, "FULL_SHARD"),
                                  (64, 10, "FULL_SHARD"), (128, 8, "FULL_SHARD"), (256, 8, "FULL_SHARD"),
                                  (512, 8, "FULL_SHARD")):  # fmt: skip
        more = {"n_gpus": str(devices), "micro_batch": str(micro), "global_batch": str(micro * devices)}
        row = published_runs.parse({**text, **more, "precision": "amp_bf16", "sharding": f"FSDP {shard}",
                          "activation_checkpointing": "none"})  # fmt: skip
        speed = math.exp(predict(row, known) or 0)
        lines.append(f"  {devices:4d} {micro:3d} {100 * speed * (6 * 6.6589e9 + 12 * 32 * 4096 * 2048) / 989e12:6.1f}")
    return lines
