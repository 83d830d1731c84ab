"""The lease of a run directory: one launch at a time, and a dead one gives it back."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launcher.errors import RequestError
from launcher.files import cannot_write, unwritable, write_json

LEASE_STALE_SECONDS = 300
"""A lease held from another host counts as abandoned when its file was not touched for this long."""

_TOUCHED_EVERY = LEASE_STALE_SECONDS / 5

LEASE_FILES = _LEASE, _LOCK = "lease", ".lease.lock"


@contextlib.contextmanager
def lease(path: Path) -> Iterator[Path]:
    """Hold a run directory for one launch; the kernel gives it back when the holder dies, however it dies.

    Raises RequestError where another launch holds it. On a shared file system without locks between hosts, the file's
    age decides (LEASE_STALE_SECONDS): whoever holds it touches it.
    """
    file = path / _LEASE
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / _LOCK, timeout=0)
    holder = _read_holder(file)
    try:
        lock.acquire()
    except Timeout:
        raise _held(path, holder) from None
    except OSError as error:
        raise unwritable(path, error) from None
    released = threading.Event()
    try:
        job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        if holder and holder.get("host") != socket.gethostname():
            # SLURM has ended all of a job before it starts it again, unless it could not reach a node of it.
            again = job is not None and holder.get("job") == job and holder.get("start") != start
            _outlive(path, file, holder, _TOUCHED_EVERY * 2 if again else LEASE_STALE_SECONDS, waits=job is not None)
        with cannot_write(path):
            about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
            write_json(file, {**about, "job": job, "start": start})
        threading.Thread(target=_touch, args=(file, released), daemon=True).start()
        try:
            yield file
        finally:
            released.set()
            file.unlink(missing_ok=True)
    finally:
        lock.release()


def holder(path: Path) -> dict[str, Any] | None:
    """Return who holds a run directory, as far as it can be seen from this host; None where nobody who lives does."""
    file = path / _LEASE
    found, touched = _read_holder(file), _touched(file)
    if not found or touched is None:
        return None
    if found.get("host") == socket.gethostname():
        began = _began(found.get("pid"))
        # A process that began after the lease was taken only has the holder's number.
        return found if began is not None and began <= found.get("since", 0.0) + 2 else None
    return found if time.time() - touched < LEASE_STALE_SECONDS else None


def _began(pid: Any) -> float | None:
    """Return when a process of this host was started, seconds since the epoch; None where there is none."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # starttime, proc(5)
    except (OSError, ValueError, IndexError):
        return None
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _outlive(path: Path, file: Path, holder: dict[str, Any], limit: float, *, waits: bool) -> None:
    """Raise RequestError while another host's lease counts; a job waits, because its predecessor may just have died.

    Whoever lives touches its lease, and that ends the waiting.
    """
    seen, told = _touched(file), False
    while (at := _touched(file)) is not None and time.time() - at < limit:
        if not waits or at != seen:
            raise _held(path, holder)
        if not told:
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            print(f"{who} held this run directory; waiting to see whether it lives", flush=True)
            told = True
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
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _touched(file: Path) -> float | None:
    """Return when a lease was last touched; None where it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None
