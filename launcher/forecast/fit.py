"""Whether a rank's memory suffices: the peak and its terms, the largest micro-batch, what to change first."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.bucket_sizes import Sizes, bucket
from halfstep.launcher.forecast.answering import Asking
from halfstep.launcher.forecast.memory import FITS, Forecast, forecast
from halfstep.launcher.forecast.phases import BOUND
from halfstep.launcher.forecast.workload import Workload
from halfstep.models import shapes

NOTHING = "nothing known"
"""What a forecast of memory says that it leaves out, where that is so."""
UNKNOWN = "activations: a family whose arithmetic is not known"
_LARGEST_MICRO = 4096
_WORTH_NAMING = 0.98
"""A change that leaves more of the peak than this is not named."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something to change, as run keys, and the peak it is predicted to bring."""

    run_keys: str
    peak_bytes: int
    verdict: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {"words": self.run_keys, "peak_bytes": self.peak_bytes, "verdict": self.verdict}


def described(workload: Workload, capacity_bytes: int | None, tasks: Sequence[Asking] = ()) -> dict[str, Any]:
    """Return what a plan says about a rank's memory, JSON-able; `tasks` are answered at evaluations."""
    needed = forecast(workload, tasks=tasks)
    states = needed.states.totals()
    verdict = needed.verdict(capacity_bytes)
    changes = better(workload, needed, capacity_bytes, tasks) if verdict not in (None, FITS) else []
    return {
        "model_states_bytes_per_rank": states,
        "model_states_total_bytes": sum(states.values()),
        "predicted_peak_bytes": needed.peak_bytes,
        "predicted_low_bytes": needed.low_bytes,
        "predicted_high_bytes": needed.high_bytes,
        "predicted_host_bytes": needed.host_bytes,
        "outside_bytes": needed.outside_bytes,
        "peak_at": needed.peak_at,
        "peak_is_bound": needed.peak_at == BOUND,
        "by_moment": needed.by_phase,
        "device_terms": [dataclasses.asdict(term) for term in needed.device],
        "host_terms": [dataclasses.asdict(term) for term in needed.host],
        "capacity_bytes": capacity_bytes,
        "verdict": verdict,
        "largest_micro": largest_micro(workload, capacity_bytes),
        "changes": [change.to_dict() for change in changes],
        "excludes": NOTHING if workload.shape else UNKNOWN + (", and answers to tasks" if tasks else ""),
    }


def largest_micro(workload: Workload, capacity_bytes: int | None) -> int | None:
    """Return the largest micro-batch that fits, 0 where none does; None where that cannot be needed."""
    if capacity_bytes is None or workload.shape is None:
        return None

    def fits(micro: int) -> bool:
        return forecast(dataclasses.replace(workload, micro=micro)).verdict(capacity_bytes) == FITS

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _LARGEST_MICRO and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_fitting(workload: Workload, capacity_bytes: int, sizes: Sequence[int]) -> tuple[int, int] | None:
    """Return the largest of some micro-batches that surely fits, and the upper bound of its peak; None where none does.

    `sizes` ascend and divide the rank's share of the batch. The bound is in bytes, with what lies outside of torch.
    """
    share = workload.micro * workload.accumulation

    def bound(micro: int) -> int:
        needed = forecast(dataclasses.replace(workload, micro=micro, accumulation=share // micro))
        return needed.high_bytes + needed.outside_bytes

    # Without accumulation there are no sums to keep: the whole share may need less than a part of it.
    if (whole := bound(sizes[-1])) <= capacity_bytes:
        return sizes[-1], whole
    fitting = bisect.bisect_right(sizes, capacity_bytes, hi=len(sizes) - 1, key=bound)
    return (sizes[fitting - 1], bound(sizes[fitting - 1])) if fitting else None


def better(
    workload: Workload, needed: Forecast, capacity_bytes: int | None, tasks: Sequence[Asking] = ()
) -> list[Change]:
    """Return what to change first: what makes it fit, the gentlest first, then what helps; pairs if need be."""

    def tried(changes: list[tuple[str, Workload]], tasks: Sequence[Asking] = tasks) -> list[Change]:
        outcomes = [(keys, forecast(changed, tasks=tasks)) for keys, changed in changes]
        return [
            Change(run_keys=keys, peak_bytes=outcome.peak_bytes, verdict=outcome.verdict(capacity_bytes))
            for keys, outcome in outcomes
            if outcome.peak_bytes < needed.peak_bytes * _WORTH_NAMING
        ]

    singles = _changes(workload)
    helpful = tried(singles)
    for number, task in enumerate(tasks):
        fewer = dataclasses.replace(task, rows=max(1, task.rows // 2))
        others = (*tasks[:number], fewer, *tasks[number + 1 :])
        helpful += tried([(f"batch = {fewer.rows} in the task {task.name}", workload)], others)
    if not any(change.verdict == FITS for change in helpful) and not workload.activation_checkpointing:
        both = "activation_checkpointing=true"
        helpful += tried([(f"{keys} {both}", _recomputing(changed)) for keys, changed in singles if both not in keys])
    return sorted(
        helpful, key=lambda change: (change.verdict != FITS, 0 if change.verdict == FITS else change.peak_bytes)
    )


def _recomputing(workload: Workload) -> Workload:
    return dataclasses.replace(workload, activation_checkpointing=True)


def _changes(workload: Workload) -> list[tuple[str, Workload]]:
    """Return single changes, the gentlest first: those that cost no time before those that do."""
    singles: list[tuple[str, Workload]] = []
    if workload.zero in (1, 2, 3) and workload.reduce_bucket > 2**24:
        quarter = workload.reduce_bucket // 4
        keys = f"ds.zero_optimization.reduce_bucket_size={quarter}"
        singles.append((keys, dataclasses.replace(workload, reduce_bucket=quarter)))
    singles += [(f"zero={zero}", _at_stage(workload, zero)) for zero in range(workload.zero + 1, 4)]
    if workload.micro > 1:
        micro = largest_part(workload.micro)
        more = workload.accumulation * workload.micro // micro
        singles.append((f"batch.micro={micro}", dataclasses.replace(workload, micro=micro, accumulation=more)))
    if workload.shape and not workload.fused_head:
        singles.append(("fused_head=true", dataclasses.replace(workload, fused_head=True)))
    if not workload.activation_checkpointing:
        singles.append(("activation_checkpointing=true", _recomputing(workload)))
    if workload.accelerator == "cuda" and workload.offload_optimizer == "none":
        stage = _at_stage(workload, max(1, workload.zero))
        keys = "offload=optimizer-cpu" if workload.zero else "zero=1 offload=optimizer-cpu"
        singles.append((keys, dataclasses.replace(stage, offload_optimizer="cpu")))
    if workload.accelerator == "cuda" and workload.offload_param == "none":
        away = dataclasses.replace(_at_stage(workload, 3), offload_optimizer="cpu", offload_param="cpu")
        singles.append(("offload=cpu" if workload.zero == 3 else "zero=3 offload=cpu", away))
    return singles


def _at_stage(workload: Workload, zero: int) -> Workload:
    """Return the workload at another stage, with the sizes that the composition would scale to the model."""
    if zero == workload.zero:
        return workload
    largest = shapes.largest_tensor(workload.shape) if workload.shape else workload.parameters
    width = workload.shape.width if workload.shape else 1024
    sizes = Sizes(parameters=workload.parameters, largest_tensor=largest, width=width)
    elements = bucket(sizes, zero)
    return dataclasses.replace(
        workload,
        zero=zero,
        reduce_bucket=elements,
        allgather_bucket=elements,
        prefetch_bucket=min(50_000_000, elements),
        persistence_threshold=10 * width,
        overlap_comm=zero == 3,
    )


def largest_part(number: int) -> int:
    """Return the largest divisor of a number above 1 that is smaller than it."""
    smallest = next((size for size in range(2, math.isqrt(number) + 1) if number % size == 0), number)
    return number // smallest
