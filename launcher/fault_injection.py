"""Faults on purpose, for tests: HALFSTEP_FAULT="point:rank:steps:action", inert unless that is set.

HALFSTEP_FAULT=fwd:1:7:nan            the loss of rank 1 is NaN at step 7
HALFSTEP_FAULT=bwd:*:7-9:inf,fwd:0:20-:nan     steps may be a range, open at its end; * is every rank or step
HALFSTEP_FAULT=save.sync:1:20:kill9   rank 1 is killed where the save after step 20 syncs its shard
"""

import errno
import functools
import os
import signal
import time
from dataclasses import dataclass

from halfstep.launcher.errors import RequestError

VARIABLE = "HALFSTEP_FAULT"
_VALUES = ("nan", "inf")
_SIGNALS = {"kill9": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}
_COUNTED = {"exit": "N", "sleep": "S"}
_ACTIONS = (*_SIGNALS, "exit=N", "sleep=S", "hang", "raise", "enospc")
POINTS = {
    "fwd": (*_VALUES, *_ACTIONS),
    "bwd": (*_VALUES, *_ACTIONS),
    **dict.fromkeys(("import", "init", "jit", "data", "step", "eval", "load", "exit"), _ACTIONS),
    **dict.fromkeys(("save.begin", "save.shard", "save.sync", "save.manifest", "save.rename", "save.prune"), _ACTIONS),
}
"""Every point of a run at which a fault can be set, and what can happen there.

A save's points have the step that is saved, `load` the one that is loaded, the points before the first step have 0.
"""


@dataclass(frozen=True, kw_only=True)
class _Fault:
    point: str
    rank: int | None
    first: int
    last: float
    action: str
    number: float = 0.0


def set_here() -> str | None:
    """Return the faults that are set, or None; raises RequestError for one that nobody can set."""
    said = os.environ.get(VARIABLE)
    if said:
        _read(said)
    return said or None


def armed(point: str, *, rank: int, step: int) -> str | None:
    """Return the value that is to go wrong at a point (`nan`, `inf`), or None.

    Raises RequestError for a fault nobody can set.
    """
    fault = _here(point, rank, step)
    return fault.action if fault and fault.action in _VALUES else None


def hit(point: str, *, rank: int, step: int = 0) -> None:
    """Let happen what is set for a point of the run, if anything: death, a stop, a sleep or an error."""
    fault = _here(point, rank, step)
    if fault is None or fault.action in _VALUES:
        return
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    elif fault.action == "exit":
        os._exit(int(fault.number))
    elif fault.action in ("sleep", "hang"):
        end = time.monotonic() + (fault.number if fault.action == "sleep" else 1e9)
        while time.monotonic() < end:  # a signal's handler cuts one sleep short, and must not end the fault
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{VARIABLE} at {point}")
    else:
        raise RuntimeError(f"{VARIABLE} at {point}")


def _here(point: str, rank: int, step: int) -> _Fault | None:
    said = os.environ.get(VARIABLE)
    if not said:
        return None
    for fault in _read(said):
        if fault.point == point and fault.rank in (None, rank) and fault.first <= step <= fault.last:
            return fault
    return None


@functools.cache
def _read(said: str) -> tuple[_Fault, ...]:
    faults = []
    for entry in said.split(","):
        try:
            point, rank, steps, action = entry.strip().split(":")
            action, equals, number = action.partition("=")
            if (f"{action}={_COUNTED.get(action)}" if equals else action) not in POINTS[point]:
                raise ValueError(action)
            first, dash, last = ("0", "-", "") if steps == "*" else steps.partition("-")
            end = float(last) if last else (float("inf") if dash else float(first))
            where = None if rank == "*" else int(rank)
            amount = float(number) if equals else 0.0
            if not 0 <= amount < float("inf"):
                raise ValueError(number)
            faults.append(_Fault(point=point, rank=where, first=int(first), last=end, action=action, number=amount))
        except (ValueError, KeyError):
            points = ", ".join(POINTS)
            raise RequestError(
                f"{entry!r} is no fault",
                where=VARIABLE,
                fix=f"unset it, or write POINT:RANK:STEPS:ACTION with POINT one of {points}, ACTION one of "
                f"{', '.join(_ACTIONS)}, and {' or '.join(_VALUES)} at fwd and bwd",
            ) from None
    return tuple(faults)
