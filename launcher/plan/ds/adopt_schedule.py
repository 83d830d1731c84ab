"""Take a DeepSpeed file's scheduler into the run keys of the schedule, or say which run keys to use instead."""

import dataclasses
from typing import Any

from halfstep.launcher.config.load import Request
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.ds.dsfile import Own
from halfstep.launcher.plan.schedule import SHAPES

Taken = dict[str, tuple[Any, str]]

_KINDS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_PARAMS = "scheduler.params."
_LR = "optimizer.params.lr"
# What runtime/lr_schedules.py takes where a file is silent.
_WARMUP_STEPS = 1000
_DECAY_PEAK = 0.001
_COSINE_FLOOR = 0.0001


def schedule(request: Request, own: Own) -> tuple[Taken, Own]:
    """Return the run keys that say what the file's scheduler does, and the file without it.

    Halfstep writes the learning rate itself, with a linear warm-up from zero. Raises RequestError for a scheduler that
    is another curve, or contradicts the request.
    """
    params = {path.removeprefix(_PARAMS): value for path, value in own.leaves.items() if path.startswith(_PARAMS)}
    kind = own.leaves.get("scheduler.type")
    paths = [path for path in own.leaves if path.startswith("scheduler.")]
    rest = own.without(paths)
    if kind is None and (not paths or "scheduler.type" in own.autos):
        return {}, rest
    if kind not in _KINDS:
        what = f"scheduler.type {kind} is no curve that Halfstep can write" if kind else "the scheduler has no type"
        raise RequestError(
            what,
            where=own.origin,
            fix=f"remove the scheduler, and give schedule.kind ({', '.join(SHAPES)}) and schedule.warmup",
        )
    _check_warmup(kind, params, own)
    taken: Taken = {"schedule.kind": (_KINDS[kind], own.place("scheduler.type"))}
    if kind == "WarmupDecayLR":
        taken["schedule.min_ratio"] = (0.0, own.place("scheduler.type"))
    defaults: dict[str, tuple[str, float]] = {"schedule.warmup": ("warmup_num_steps", _WARMUP_STEPS)}
    if kind == "WarmupCosineLR":
        defaults["schedule.min_ratio"] = ("cos_min_ratio", _COSINE_FLOOR)
    for key, (name, default) in defaults.items():
        if name in params or (key not in request.origins and _PARAMS + name not in own.autos):
            taken[key] = (params.get(name, default), own.place(_PARAMS + name))
    if "total_num_steps" in params:
        taken["steps"] = (params["total_num_steps"], own.place(f"{_PARAMS}total_num_steps"))
    taken |= _peak(kind, params, own, request)
    for key, (value, place) in taken.items():
        _agree(key, value, place, request)
    said = (
        f"Halfstep writes the learning rate that {own.name}'s {kind} describes; DeepSpeed would give the first two "
        "steps a rate of 0"
    )
    return taken, dataclasses.replace(rest, warnings=(said,))


def _check_warmup(kind: str, params: dict[str, Any], own: Own) -> None:
    curve = params.get("warmup_type", "log" if f"{_PARAMS}warmup_num_steps" not in own.autos else "linear")
    if curve != "linear":
        raise RequestError(
            f"{kind} warms up along a logarithm unless warmup_type says otherwise; Halfstep's warm-up is linear",
            where=own.place(f"{_PARAMS}warmup_type"),
            fix='write "warmup_type": "linear", or remove the scheduler and give schedule.kind and schedule.warmup',
        )
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        if params.get(name):
            raise RequestError(
                f"{name} is {params[name]}; Halfstep's warm-up begins at 0",
                where=own.place(_PARAMS + name),
                fix="write 0, or remove the scheduler and give schedule.kind and schedule.warmup",
            )
    if params.get("last_batch_iteration", -1) != -1:
        raise RequestError(
            "last_batch_iteration begins in the middle of a schedule; a run of Halfstep resumes from its checkpoint",
            where=own.place(f"{_PARAMS}last_batch_iteration"),
            fix="remove it",
        )


def _peak(kind: str, params: dict[str, Any], own: Own, request: Request) -> Taken:
    """Return the peak that the scheduler sets; the optimizer's own rate counts for nothing beside it."""
    name = f"{_PARAMS}warmup_max_lr"
    if kind == "WarmupCosineLR" or name in own.autos or (kind == "WarmupLR" and "warmup_max_lr" not in params):
        return {}
    peak = params.get("warmup_max_lr", _DECAY_PEAK)
    rates = {_LR: own.leaves.get(_LR)}
    if "optimizer.lr" in request.origins:
        rates = {f"optimizer.lr from {request.origins['optimizer.lr']}": request.spec.optimizer.lr}
    for other, rate in rates.items():
        if rate is not None and rate != peak:
            default = "" if "warmup_max_lr" in params else ", which DeepSpeed takes where it is left out"
            raise RequestError(
                f"the schedule peaks at warmup_max_lr {peak}{default}, and {other} is {rate}",
                where=own.place(name),
                fix=f"write the same in both; {kind} pays no heed to the optimizer's lr",
            )
    return {} if _LR in own.leaves else {"optimizer.lr": (peak, own.place(name))}


def _agree(key: str, value: Any, place: str, request: Request) -> None:
    """Raise RequestError where a run key was given that says something else."""
    given = request.origins.get(key)
    other = "tokens" if key == "steps" and "tokens" in request.origins else key
    if given is None and other == key:
        return
    section, _, name = other.rpartition(".")
    asked = getattr(getattr(request.spec, section) if section else request.spec, name)
    if other == key and asked == value:
        return
    raise RequestError(
        f"{place} is {value}, and the run key {other} is {asked}",
        where=f"{place} and {other} from {request.origins[other]}",
        fix=f"drop {other}, or take the scheduler out of the file",
    )
