"""How an attempt ended: attempts/NNNN/exit.json, which the first to know writes, so that nothing hides the cause.

Standard library only, since jobs ask it too.
"""

import contextlib
import enum
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher import errors
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.rundir import layout
from halfstep.launcher.system import clock, files, foreign

EXIT, REFUSAL = "exit.json", "refused.json"
"""The first in the folder of an attempt; the second in a run directory, of a start that became none."""
EXIT_TIMED_OUT = 124
"""Exit code of a run that took longer than its limit, as timeout(1) has it."""
_LARGEST = 255
"""Exit code of a process."""
_FAR = 2.0**53
"""Seconds since the epoch that no clock shows."""


class Kind(enum.StrEnum):
    """What kind of end it was, for programs; the cause says it to people."""

    DONE = "done"
    STOPPED = "stopped"
    """Asked to stop, and nothing lost."""
    INTERRUPTED = "interrupted"
    """By a second Ctrl-C."""
    REQUEST = "request"
    """The request is wrong."""
    REFUSED = "refused"
    """The request cannot work here."""
    OUT_OF_DEVICE_MEMORY = "out-of-device-memory"
    OUT_OF_HOST_MEMORY = "out-of-host-memory"
    DISK_FULL = "disk-full"
    NUMERICS = "numerics"
    """No progress that is worth anything, like a loss that is not finite."""
    STALL = "stall"
    """A rank stopped moving."""
    SIGNAL = "signal"
    """A rank was killed, or crashed."""
    LOST_RANK = "lost-rank"
    """A rank was gone, and nobody saw how."""
    TIMED_OUT = "timed-out"
    """It took longer than the time it was given."""
    FAILED = "failed"
    """Anything else."""


_OF_ERROR: dict[type[BaseException], Kind] = {
    errors.RequestError: Kind.REQUEST,
    errors.RefusedError: Kind.REFUSED,
    errors.OutOfDeviceMemory: Kind.OUT_OF_DEVICE_MEMORY,
    errors.OutOfHostMemory: Kind.OUT_OF_HOST_MEMORY,
    errors.DiskFull: Kind.DISK_FULL,
    errors.NumericsError: Kind.NUMERICS,
    errors.Stopped: Kind.STOPPED,
    errors.Stalled: Kind.STALL,
    errors.Interrupted: Kind.INTERRUPTED,
}
_OF_CODE = {
    0: Kind.DONE,
    errors.EXIT_REQUEST: Kind.REQUEST,
    errors.EXIT_REFUSED: Kind.REFUSED,
    errors.EXIT_STOPPED: Kind.STOPPED,
    errors.EXIT_NUMERICS: Kind.NUMERICS,
    errors.EXIT_STALLED: Kind.STALL,
    EXIT_TIMED_OUT: Kind.TIMED_OUT,
    errors.Interrupted.exit_code: Kind.INTERRUPTED,
}


def kind_of_error(error: BaseException) -> Kind:
    """Return the kind of an end that an error brings."""
    return next((_OF_ERROR[above] for above in type(error).__mro__ if above in _OF_ERROR), Kind.FAILED)


def kind_of_code(code: int) -> Kind:
    """Return the kind of an end of which only the exit code is known; 128 and more are signals, as a shell has them."""
    return _OF_CODE.get(code, Kind.SIGNAL if code > 128 else Kind.FAILED)


def kind_of_old_record(code: int, cause: str) -> Kind:
    """Return the kind of an end from a record without one, as earlier versions wrote them: their causes tell these."""
    if "out of device memory" in cause:
        return Kind.OUT_OF_DEVICE_MEMORY
    if "out of host memory" in cause or "the host is out of memory" in cause:
        return Kind.OUT_OF_HOST_MEMORY
    if "the disk is full" in cause:
        return Kind.DISK_FULL
    return kind_of_code(code)


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How an attempt, or a start that became none, ended."""

    code: int
    cause: str
    kind: Kind
    rank: int | None = None
    time: float = 0.0


def write_exit(attempt: Path, code: int, cause: str, rank: int, kind: Kind | None = None) -> int | None:
    """Write how an attempt ended and return None, or the code that another rank wrote before.

    The first to write wins, so that a follow-up failure hides no cause. Without a kind it is that of the code.
    """
    end = Exit(code=code, cause=cause, kind=kind or kind_of_code(code), rank=rank, time=clock.now())
    try:
        if files.write_once(attempt / EXIT, json.dumps(asdict(end), indent=2) + "\n"):
            return None
    except OSError:
        return None  # it cannot be written, so it has to be said
    before = read_exit(attempt)
    return None if before is None else before.code


def write_refusal(run: Path, error: HalfstepError) -> None:
    """Write why a start ended before it became an attempt, for the job script; the first to know stands."""
    if read_refusal(run) is not None:
        return
    about = {"code": error.exit_code, "cause": error.what, "kind": kind_of_error(error), "time": time.time()}
    with contextlib.suppress(OSError):
        files.write_atomic(run / REFUSAL, json.dumps({**about, **start_of_job()}, indent=2) + "\n", sync=False)


def read_refusal(run: Path) -> Exit | None:
    """Return what `write_refusal` wrote in this start of this job, else None."""
    try:
        tree = foreign.read_object(run / REFUSAL)
        return _checked(tree) if all(tree.get(key) == value for key, value in start_of_job().items()) else None
    except (OSError, ValueError):
        return None


def start_of_job() -> dict[str, str]:
    """Return which start of which SLURM job this is; empty words outside one."""
    return {"job": os.environ.get("SLURM_JOB_ID", ""), "start": os.environ.get("SLURM_RESTART_COUNT", "0")}


def attempt_of_this_start(run: Path) -> Path | None:
    """Return the attempt that this start of the job has made, if its ranks came so far."""
    attempts = layout.attempts(run)
    try:
        about = foreign.read_object(attempts[-1] / "env.json").get("environment")
    except (OSError, ValueError, IndexError):
        return None
    if not isinstance(about, dict):
        return None
    made_by = {"job": about.get("SLURM_JOB_ID", ""), "start": about.get("SLURM_RESTART_COUNT", "0")}
    return attempts[-1] if made_by == start_of_job() else None


def read_exit(attempt: Path) -> Exit | None:
    """Return how an attempt ended; None where nobody has written it so far, or what was written cannot be read."""
    try:
        return read(attempt / EXIT)
    except (OSError, ValueError):
        return None


def read(file: Path) -> Exit | None:
    """Return a record of an end, None where there is none.

    Raises OSError where it cannot be read, and ValueError where it could not have been written by us.
    """
    try:
        return _checked(foreign.read_object(file))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _checked(tree: dict[str, Any]) -> Exit:
    code, cause, rank, at = tree.get("code"), tree.get("cause", ""), tree.get("rank"), tree.get("time", 0.0)
    if not isinstance(code, int) or isinstance(code, bool) or not 0 <= code <= _LARGEST:
        raise ValueError("its code is no exit code")
    if not isinstance(cause, str):
        raise ValueError("its cause is no text")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise ValueError("its rank is no rank")
    if not isinstance(at, int | float) or isinstance(at, bool) or abs(at) >= _FAR:
        raise ValueError("its time is no time")
    return Exit(code=code, cause=cause, kind=_kind(tree.get("kind"), code, cause), rank=rank, time=at)


def _kind(name: Any, code: int, cause: str) -> Kind:
    if name is None:
        return kind_of_old_record(code, cause)
    try:
        return Kind(name)
    except ValueError:  # a newer Halfstep knows more of them
        return kind_of_code(code)


def write_follow_up(
    attempt: Path, code: int, cause: str, rank: int, kind: Kind | None = None, *, patience: float = 3.0
) -> int | None:
    """Write how an attempt ended as `write_exit` does, but let whoever knows the cause write first.

    For errors that another rank's death explains (a broken connection): the dying rank closes its connections before
    its watchdog can see that it is gone, so this rank would often be first, with the lesser cause.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = read_exit(attempt)
        if before is not None:
            return before.code
        time.sleep(0.05)
    return write_exit(attempt, code, cause, rank, kind)


def say(error: HalfstepError) -> None:
    """Print an error whole, whoever else is printing."""
    try:
        os.write(2, f"{error}\n".encode())
    except OSError:
        return
