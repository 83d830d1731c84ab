"""Faults on purpose, for tests: HALFSTEP_FAULT="point:rank:steps:action", inert unless that is set.

HALFSTEP_FAULT=fwd:1:7:nan            the loss of rank 1 is NaN at step 7
HALFSTEP_FAULT=bwd:*:7-9:inf,fwd:0:20-:nan     steps may be a range, open at its end; * is every rank or step
"""

import functools
import os
from dataclasses import dataclass

from launcher.errors import RequestError

VARIABLE = "HALFSTEP_FAULT"
POINTS = {"fwd": ("nan", "inf"), "bwd": ("nan", "inf")}
"""Every point of a run at which a fault can be set, and what can happen there."""


@dataclass(frozen=True, kw_only=True)
class _Fault:
    point: str
    rank: int | None
    first: int
    last: float
    action: str


def set_here() -> str | None:
    """Return the faults that are set, or None; raises RequestError for one that nobody can set."""
    said = os.environ.get(VARIABLE)
    if said:
        _read(said)
    return said or None


def armed(point: str, *, rank: int, step: int) -> str | None:
    """Return what is to go wrong at a point of the run, or None; raises RequestError for a fault nobody can set."""
    said = os.environ.get(VARIABLE)
    if not said:
        return None
    for fault in _read(said):
        if fault.point == point and fault.rank in (None, rank) and fault.first <= step <= fault.last:
            return fault.action
    return None


@functools.cache
def _read(said: str) -> tuple[_Fault, ...]:
    faults = []
    for one in said.split(","):
        try:
            point, rank, steps, action = one.strip().split(":")
            if action not in POINTS[point]:
                raise ValueError(action)
            first, dash, last = ("0", "-", "") if steps == "*" else steps.partition("-")
            end = float(last) if last else (float("inf") if dash else float(first))
            where = None if rank == "*" else int(rank)
            faults.append(_Fault(point=point, rank=where, first=int(first), last=end, action=action))
        except (ValueError, KeyError):
            known = ", ".join(f"{point}:RANK:STEPS:{'|'.join(actions)}" for point, actions in POINTS.items())
            raise RequestError(f"{one!r} is no fault", where=VARIABLE, fix=f"unset it, or write {known}") from None
    return tuple(faults)
