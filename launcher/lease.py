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
        elsewhere = bool(holder) and holder.get("host") != socket.gethostname()
        # SLURM has ended all of a job before it starts it again, also what ran on a node that it lost.
        job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        started_again = job is not None and holder.get("job") == job and holder.get("start") != start
        if elsewhere and not started_again and _age(file) < LEASE_STALE_SECONDS:
            raise _held(path, holder)
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


def _touch(file: Path, released: threading.Event) -> None:
    """Tell other hosts, for as long as this process lives, that the lease is held."""
    while not released.wait(LEASE_STALE_SECONDS / 5):
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


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return float("inf")
