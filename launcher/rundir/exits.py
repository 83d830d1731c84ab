"""How an attempt ended: attempts/NNNN/exit.json, which the first to know writes, so that nothing hides the cause."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.system import clock, files, foreign

_EXIT, _REFUSAL = "exit.json", "refused.json"
_LARGEST = 255
"""Exit code of a process."""
_FAR = 2.0**53
"""Seconds since the epoch that no clock shows."""


def write_exit(attempt: Path, code: int, cause: str, rank: int) -> int | None:
    """Write how an attempt ended and return None, or the code that another rank wrote before.

    The first to write wins, so that a follow-up failure hides no cause.
    """
    about = {"code": code, "cause": cause, "rank": rank, "time": clock.now()}
    try:
        if files.write_once(attempt / _EXIT, json.dumps(about, indent=2) + "\n"):
            return None
    except OSError:
        return None  # it cannot be written, so it has to be said
    before = read_exit(attempt)
    return None if before is None else before["code"]


def write_refusal(run: Path, code: int, cause: str) -> None:
    """Write why a start ended before it became an attempt, for the job script; the first to know stands."""
    if read_refusal(run) is not None:
        return
    about = {"code": code, "cause": cause, "time": time.time(), **start_of_job()}
    with contextlib.suppress(OSError):
        files.write_atomic(run / _REFUSAL, json.dumps(about, indent=2) + "\n", sync=False)


def read_refusal(run: Path) -> dict[str, Any] | None:
    """Return what `write_refusal` wrote in this start of this job, else None."""
    record = _read(run / _REFUSAL)
    if record is None or any(record.get(key) != value for key, value in start_of_job().items()):
        return None
    return record


def start_of_job() -> dict[str, str]:
    """Return which start of which SLURM job this is; empty words outside one."""
    return {"job": os.environ.get("SLURM_JOB_ID", ""), "start": os.environ.get("SLURM_RESTART_COUNT", "0")}


def read_exit(attempt: Path) -> dict[str, Any] | None:
    """Return how an attempt ended: `code`, `cause`, `rank`, `time`; None where nobody has written it so far.

    None also where the file is damaged: `damaged_exit` tells the two apart.
    """
    return _read(attempt / _EXIT)


def damaged_exit(attempt: Path) -> bool:
    """Tell whether somebody has written how an attempt ended, and it cannot be read."""
    return os.path.lexists(attempt / _EXIT) and read_exit(attempt) is None


def _read(file: Path) -> dict[str, Any] | None:
    """Return a record of an end; None where there is none, or where it could not have been written by us."""
    try:
        record = foreign.read_object(file)
    except (OSError, ValueError):
        return None
    code, cause, rank, at = record.get("code"), record.get("cause", ""), record.get("rank"), record.get("time", 0.0)
    whole = isinstance(code, int) and not isinstance(code, bool) and 0 <= code <= _LARGEST
    numbered = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0)
    timed = isinstance(at, int | float) and not isinstance(at, bool) and abs(at) < _FAR
    if not (whole and numbered and timed and isinstance(cause, str)):
        return None
    return {**record, "code": code, "cause": cause, "rank": rank, "time": at}


def write_follow_up(attempt: Path, code: int, cause: str, rank: int, *, patience: float = 3.0) -> int | None:
    """Write how an attempt ended as `write_exit` does, but let whoever knows the cause write first.

    For errors that another rank's death explains (a broken connection): the dying rank closes its connections before
    its watchdog can see that it is gone, so this rank would often be first, with the lesser cause.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = read_exit(attempt)
        if found is not None:
            return int(found["code"])
        time.sleep(0.05)
    return write_exit(attempt, code, cause, rank)


def say(error: HalfstepError) -> None:
    """Print an error whole, whoever else is printing."""
    try:
        os.write(2, f"{error}\n".encode())
    except OSError:
        return
