"""What a whole run takes: hours, SLURM jobs, device-hours, money; from the forecast of one step."""

import math
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.legal import shown
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import communication, step_time, tensors
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.states import FULL, optimizer_bytes
from halfstep.launcher.forecast.step_time import TimeForecast
from halfstep.launcher.forecast.workload import Workload

_HIGHEST_PRICE = 1e12
"""Of a device-hour, in any money."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a run does."""

    steps: int
    evaluations: int | None
    """None where no data is named."""
    evaluation_sequences: int
    """Read at each."""
    checkpoints: int


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a user asks besides: the limit of a job, and what a device costs."""

    limit_seconds: int | None = None
    notice_seconds: int = 300
    """Of the limit, kept for the last save."""
    price: float | None = None
    """Of one device-hour, in the user's money."""


def of(
    workload: Workload, hardware: Hardware | None, device: str, work: Work, terms: Terms | None = None
) -> dict[str, Any]:
    """Return the plan's `time`: a step and the run; where that is not known only what a step sends, and why."""
    if hardware is None:
        if workload.accelerator == "cpu":
            return _unknown(workload, "this machine was not measured; `halfstep doctor --measure` does that once")
        named = f"the device {device!r} is not in the table" if device else "the device is not known"
        return _unknown(workload, f"{named}; name it with hardware=NAME")
    step = step_time.forecast(workload, hardware)
    if step is None:
        why = (
            "arithmetic of the model's family"
            if workload.shape is None
            else f"{workload.arithmetic} speed of the device"
        )
        return _unknown(workload, f"the {why} is not known")
    return {
        "unknown": None,
        "hardware": hardware.name,
        **step.to_dict(),
        **_run(step, workload, hardware, work, terms or Terms()),
    }


def price(text: str) -> float:
    """Read a price of a device-hour; raises RequestError where it is no number from zero on."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _HIGHEST_PRICE:
        raise RequestError(
            f"--price {shown(text)!r} is not a price",
            where="the command line",
            fix="give a number, such as --price 2.50",
        )
    return number


def _run(step: TimeForecast, workload: Workload, hardware: Hardware, work: Work, terms: Terms) -> dict[str, Any]:
    training = work.steps * step.step_seconds
    evaluating = None
    if work.evaluations is not None:
        evaluating = work.evaluations * _evaluation(step, workload, work.evaluation_sequences)
    saving = _saving(workload, hardware, work.checkpoints)
    seconds = training + (evaluating or 0.0) + (saving or 0.0)
    device_hours = seconds / 3600 * step.devices
    jobs = None
    if terms.limit_seconds is not None:
        jobs = math.ceil(seconds / max(1, terms.limit_seconds - terms.notice_seconds))
    return {
        "steps": work.steps,
        "devices": step.devices,
        "training_seconds": training,
        "evaluation_seconds": evaluating,
        "checkpoint_seconds": saving,
        "hours": seconds / 3600,
        "days": seconds / 86400,
        "device_hours": device_hours,
        "jobs": jobs,
        "time_limit_seconds": terms.limit_seconds,
        "price_per_device_hour": terms.price,
        "price": None if terms.price is None else device_hours * terms.price,
    }


def _evaluation(step: TimeForecast, workload: Workload, sequences: int) -> float:
    """Return the seconds of one evaluation: forward passes, a third of computing without recomputation."""
    terms = step.terms
    computing = (
        terms.matmul + terms.attention + terms.memory_bound + terms.host_bound + terms.tensor_parallel
    ) / workload.accumulation
    passes = 4 if workload.activation_checkpointing else 3
    return computing / passes * math.ceil(sequences / (workload.micro * workload.ranks))


def _saving(workload: Workload, hardware: Hardware, checkpoints: int) -> float | None:
    """Return the seconds of all saves, None where the speed of the nodes' storage is not known."""
    storage = hardware.storage
    if checkpoints == 0:
        return 0.0
    if storage is None:
        return None
    # A 16-bit weight and its fp32 master, and the optimizer's states.
    trained = tensors.trained(workload).elements
    each = (2 + FULL) * trained + optimizer_bytes(workload, trained)
    nodes = max(1, workload.ranks // workload.ranks_per_node)
    return checkpoints * each / (storage * (1 if workload.zero == 0 else nodes))


_FIELDS = (
    "hardware",
    "step_seconds",
    "low_seconds",
    "high_seconds",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu",
    "flops_convention",
    "communication_bytes_per_rank",
    "hidden_communication_seconds",
    "terms",
    "steps",
    "devices",
    "training_seconds",
    "evaluation_seconds",
    "checkpoint_seconds",
    "hours",
    "days",
    "device_hours",
    "jobs",
    "time_limit_seconds",
    "price_per_device_hour",
    "price",
)


def _unknown(workload: Workload, why: str) -> dict[str, Any]:
    sent = communication.volume(workload, Layout()).total_bytes
    return {"unknown": why, **dict.fromkeys(_FIELDS), "communication_bytes_per_rank": sent}
