"""Make a folder appear whole or not at all: built beside its place, brought to the disk, and renamed."""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from halfstep.launcher.errors import RequestError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def appearing(out: Path, option: str = "--out") -> Iterator[Path]:
    """Give a new folder beside `out` to fill; it becomes `out` when the block ends well, and goes away otherwise.

    `option` is what the user named it with. Folders that killed processes of this host left behind are removed first.
    Raises RequestError when the disk is full or cannot be written, and FileExistsError when somebody else finished
    `out` meanwhile.
    """
    partial = out.with_name(f"{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        partial.mkdir()
        try:
            yield partial
            _to_disk(partial)
            _rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(out.parent)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            what = f"there is no room for it: {error.strerror}"
            fix = f"free some space, or name a folder on another disk with {option}; nothing was left behind"
        else:
            what = f"{out} cannot be written: {error.strerror or error}"
            fix = f"name a folder that you may write with {option}"
        raise RequestError(what, where=f"{option} {out}", fix=fix) from None


def _rename(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(str(out)) from None
        raise


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(out: Path) -> None:
    start = f"{out.name}.partial-{socket.gethostname()}-"
    for path in out.parent.iterdir():
        owner = path.name.removeprefix(start)
        if path.name.startswith(start) and owner.isdecimal() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process_id: int) -> bool:
    if process_id == os.getpid():
        return False  # Ours is not made yet: this one is of an earlier process with our number.
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
