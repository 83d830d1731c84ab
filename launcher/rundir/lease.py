"""The lease of a run directory: one launch at a time, and a dead one gives it back."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign, processes
from halfstep.launcher.system.files import cannot_write, unwritable, write_json

LEASE_STALE_SECONDS = 300
"""A lease held from another host counts as abandoned when its file was not touched for this long."""

_TOUCHED_EVERY = LEASE_STALE_SECONDS / 5

LEASE_FILES = _LEASE, _LOCK = "lease", ".lease.lock"


@contextlib.contextmanager
def lease(path: Path) -> Iterator[Path]:
    """Hold a run directory for one launch; the kernel gives it back when the holder dies, however it dies.

    Raises RequestError where another launch holds it or has reserved it. On a shared file system without locks between
    hosts, the file's age decides (LEASE_STALE_SECONDS): whoever holds it touches it.
    """
    with _locked(path) as file, _touching(file):
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def reserved(path: Path, launch: str) -> Iterator[None]:
    """Keep a run directory for the launch of that name until its rank 0 holds the lease, or this process ends.

    Between the moment a plan is written and the moment the ranks have read it, nobody else may write another. Raises
    RequestError as `lease` does.
    """
    with _locked(path, launch) as file:
        pass
    with _touching(file):
        try:
            yield
        finally:
            if _read_holder(file).get("pid") == os.getpid():
                file.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, launch: str | None = None) -> Iterator[Path]:
    """Take the lock of a run directory and write who holds it; `launch` is what it is only reserved for."""
    file = path / _LEASE
    with cannot_write(path):
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    lock = FileLock(path / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _held(path, _read_holder(file)) from None
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        _refuse_other(path, file, _read_holder(file))
        with cannot_write(path):
            own = processes.stat(os.getpid())
            about = {"host": socket.gethostname(), "pid": os.getpid(), "began": own.start if own else None}
            about |= {"since": time.time(), "launch": launch}
            write_json(file, {**about, "job": os.environ.get("SLURM_JOB_ID"), "start": _start()})
        yield file
    finally:
        lock.release()


@contextlib.contextmanager
def _touching(file: Path) -> Iterator[None]:
    """Tell other hosts that the lease is held, for as long as the block lasts and this process lives."""
    released = threading.Event()
    threading.Thread(target=_touch, args=(file, released), daemon=True).start()
    try:
        yield
    finally:
        released.set()


def _refuse_other(path: Path, file: Path, holder: dict[str, Any]) -> None:
    """Raise RequestError where somebody who may live holds or has reserved a directory whose lock is free."""
    if not holder or (holder.get("launch") and holder["launch"] == os.environ.get("HALFSTEP_LAUNCH")):
        return
    if holder.get("host") == socket.gethostname():
        if holder.get("launch") and _lives(holder):
            raise _held(path, holder)
        return
    job = os.environ.get("SLURM_JOB_ID")
    # SLURM has ended all of a job before it starts it again, unless it could not reach a node of it.
    again = job is not None and holder.get("job") == job and holder.get("start") != _start()
    _outlive(path, file, holder, _TOUCHED_EVERY * 2 if again else LEASE_STALE_SECONDS, waits=job is not None)


def _start() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def holder(path: Path) -> dict[str, Any] | None:
    """Return who holds a run directory, as far as it can be seen from this host; None where nobody who lives does."""
    file = path / _LEASE
    holding, touched = _read_holder(file), _touched(file)
    if not holding or touched is None:
        return None
    if holding.get("host") == socket.gethostname():
        return holding if _lives(holding) else None
    return holding if time.time() - touched < LEASE_STALE_SECONDS else None


def _lives(holder: dict[str, Any]) -> bool:
    """Tell whether a holder on this host lives: a process that began at another time only has its number."""
    pid, began, since = holder.get("pid"), holder.get("began"), holder.get("since")
    there = processes.stat(pid) if type(pid) is int else None
    if there is None or there.state in "ZX":
        return False
    if began is not None:
        return began == there.start
    # An older Halfstep wrote the time of day alone.
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + there.start / os.sysconf("SC_CLK_TCK")
    return isinstance(since, int | float) and started <= since + 2


def _outlive(path: Path, file: Path, holder: dict[str, Any], limit: float, *, waits: bool) -> None:
    """Raise RequestError while another host's lease counts; a job waits, because its predecessor may just have died.

    Whoever lives touches its lease, and that ends the waiting.
    """
    seen, announced = _touched(file), False
    while (at := _touched(file)) is not None and time.time() - at < limit:
        if not waits or at != seen:
            raise _held(path, holder)
        if not announced:
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            print(f"{who} held this run directory; waiting to see whether it lives", flush=True)
            announced = True
        time.sleep(min(1.0, limit / 10))


def _touch(file: Path, released: threading.Event) -> None:
    """Tell other hosts, for as long as this process lives, that the lease is held."""
    while not released.wait(_TOUCHED_EVERY):
        with contextlib.suppress(OSError):
            os.utime(file)


def _held(path: Path, holder: dict[str, Any]) -> RequestError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}" if holder else "another launch"
    return RequestError(
        f"{path} is in use by {who}",
        where=f"out={path}",
        fix="wait for it to end, stop it, or choose another out",
    )


def _read_holder(file: Path) -> dict[str, Any]:
    try:
        return foreign.read_object(file)
    except (OSError, ValueError):
        return {}


def _touched(file: Path) -> float | None:
    """Return when a lease was last touched; None where it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None
