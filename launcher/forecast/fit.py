"""Whether a rank's memory suffices: the peak and its terms, the largest micro-batch, what to change first."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.bucket_sizes import Sizes, bucket
from halfstep.launcher.forecast.memory import FITS, Forecast, forecast
from halfstep.launcher.forecast.workload import Setting
from halfstep.models import shapes

_LARGEST_MICRO = 4096
_WORTH_NAMING = 0.98
"""A change that leaves more of the peak than this is not named."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something to change, in a user's words, and the peak it is foretold to bring."""

    words: str
    peak_bytes: int
    verdict: str | None


def described(setting: Setting, capacity_bytes: int | None) -> dict[str, Any]:
    """Return what a plan says about a rank's memory, JSON-able."""
    told = forecast(setting)
    states = told.states.totals()
    verdict = told.verdict(capacity_bytes)
    changes = better(setting, told, capacity_bytes) if verdict not in (None, FITS) else []
    return {
        "model_states_bytes_per_rank": states,
        "model_states_total_bytes": sum(states.values()),
        "predicted_peak_bytes": told.peak_bytes,
        "predicted_low_bytes": told.low_bytes,
        "predicted_high_bytes": told.high_bytes,
        "predicted_host_bytes": told.host_bytes,
        "outside_bytes": told.outside_bytes,
        "peak_at": told.peak_at,
        "by_moment": told.by_moment,
        "device_terms": [dataclasses.asdict(term) for term in told.device],
        "host_terms": [dataclasses.asdict(term) for term in told.host],
        "capacity_bytes": capacity_bytes,
        "verdict": verdict,
        "largest_micro": largest_micro(setting, capacity_bytes),
        "changes": [dataclasses.asdict(one) for one in changes],
        "excludes": "activations: a family whose arithmetic is not known" if setting.shape is None else "nothing known",
    }


def largest_micro(setting: Setting, capacity_bytes: int | None) -> int | None:
    """Return the largest micro-batch that fits, 0 where none does; None where that cannot be told."""
    if capacity_bytes is None or setting.shape is None:
        return None

    def fits(micro: int) -> bool:
        return forecast(dataclasses.replace(setting, micro=micro)).verdict(capacity_bytes) == FITS

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _LARGEST_MICRO and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def better(setting: Setting, told: Forecast, capacity_bytes: int | None) -> list[Change]:
    """Return what to change first: what makes it fit, the gentlest first, then what helps; pairs if need be."""

    def tried(changes: list[tuple[str, Setting]]) -> list[Change]:
        outcomes = [(words, forecast(changed)) for words, changed in changes]
        return [
            Change(words=words, peak_bytes=one.peak_bytes, verdict=one.verdict(capacity_bytes))
            for words, one in outcomes
            if one.peak_bytes < told.peak_bytes * _WORTH_NAMING
        ]

    singles = _changes(setting)
    found = tried(singles)
    if not any(one.verdict == FITS for one in found) and not setting.activation_checkpointing:
        both = "activation_checkpointing=true"
        found += tried([(f"{words} {both}", _recomputing(changed)) for words, changed in singles if both not in words])
    return sorted(
        found, key=lambda change: (change.verdict != FITS, 0 if change.verdict == FITS else change.peak_bytes)
    )


def _recomputing(setting: Setting) -> Setting:
    return dataclasses.replace(setting, activation_checkpointing=True)


def _changes(setting: Setting) -> list[tuple[str, Setting]]:
    """Return single changes, the gentlest first: those that cost no time before those that do."""
    found: list[tuple[str, Setting]] = []
    if setting.zero in (1, 2, 3) and setting.reduce_bucket > 2**24:
        quarter = setting.reduce_bucket // 4
        words = f"ds.zero_optimization.reduce_bucket_size={quarter}"
        found.append((words, dataclasses.replace(setting, reduce_bucket=quarter)))
    found += [(f"zero={zero}", _at_stage(setting, zero)) for zero in range(setting.zero + 1, 4)]
    if setting.micro > 1:
        micro = largest_part(setting.micro)
        more = setting.accumulation * setting.micro // micro
        found.append((f"batch.micro={micro}", dataclasses.replace(setting, micro=micro, accumulation=more)))
    if not setting.activation_checkpointing:
        found.append(("activation_checkpointing=true", _recomputing(setting)))
    if setting.accelerator == "cuda" and setting.offload_optimizer == "none":
        stage = _at_stage(setting, max(1, setting.zero))
        words = "offload=optimizer-cpu" if setting.zero else "zero=1 offload=optimizer-cpu"
        found.append((words, dataclasses.replace(stage, offload_optimizer="cpu")))
    if setting.accelerator == "cuda" and setting.offload_param == "none":
        away = dataclasses.replace(_at_stage(setting, 3), offload_optimizer="cpu", offload_param="cpu")
        found.append(("offload=cpu" if setting.zero == 3 else "zero=3 offload=cpu", away))
    return found


def _at_stage(setting: Setting, zero: int) -> Setting:
    """Return the setting at another stage, with the sizes that the composition would scale to the model."""
    if zero == setting.zero:
        return setting
    largest = shapes.largest_tensor(setting.shape) if setting.shape else setting.parameters
    width = setting.shape.width if setting.shape else 1024
    sizes = Sizes(parameters=setting.parameters, largest_tensor=largest, width=width)
    elements = bucket(sizes, zero)
    return dataclasses.replace(
        setting,
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
