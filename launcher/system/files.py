"""Write files so that a reader, or a crash, sees the old content or the new and nothing between.

No name of a temporary file can be foreseen and no link is followed: a folder that others may write leads nowhere else.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import DiskFull, Fault, HalfstepError, RefusedError, RequestError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What it is when a disk is full."""
_NAMES = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL)
"""What is wrong with a name that somebody gave."""
_FIXES = {
    errno.EMFILE: "allow this process more open files: ulimit -n 1024",
    errno.ENFILE: "the system has too many files open: end what holds them",
    errno.EFBIG: "allow larger files (ulimit -f), or write to another file system",
    errno.EIO: "look at the disk or the file server, then start the same command again",
    errno.ESTALE: "the file server was restarted or the folder replaced: start the same command again",
    errno.EROFS: "write elsewhere: out=DIR",
}
_SHORTENED = 200
"""Bytes of a name that its temporary file keeps: a file system takes 255."""


def write_atomic(file: Path, content: str | bytes, *, mode: int = 0o644, sync: bool = True) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new and nothing between.

    `mode` is what the umask leaves of it; a file for its owner's eyes is 0o600. Without `sync` a loss of power may
    undo it.
    """
    temporary = _temporary(file)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(handle, _bytes(content))
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(file)
        if sync:
            sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_once(file: Path, content: str | bytes) -> bool:
    """Write a file whole unless there is one already; tell whether it was this call that did."""
    temporary = _temporary(file)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            write_all(handle, _bytes(content))
        finally:
            os.close(handle)
        try:
            os.link(temporary, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if os.path.lexists(file):
                return False
            temporary.replace(file)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def open_append(file: Path) -> int:
    """Open a file of lines to append to it and return the handle; half a line that was cut short is ended first.

    Raises OSError where it is a link, or no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(file, flags, 0o644)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(file))
        if about.st_size and os.pread(handle, 1, about.st_size - 1) != b"\n":
            write_all(handle, b"\n")
    except OSError:
        os.close(handle)
        raise
    return handle


def append(file: Path, content: str | bytes) -> None:
    """Append whole lines to a file with one write."""
    handle = open_append(file)
    try:
        write_all(handle, _bytes(content))
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes) -> None:
    """Write bytes to a handle, however many writes that takes."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(file: Path, value: Any) -> None:
    """Replace a file with a value's JSON, atomically."""
    write_atomic(file, pretty(value))


def pretty(value: Any) -> str:
    """Return a value's JSON as people read it; inf and NaN are refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def csv_cell(value: Any) -> Any:
    """Return a value as a cell that no spreadsheet takes for a formula: text that looks like one gets a quote."""
    if not isinstance(value, str) or not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


@contextlib.contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into a RequestError about a run directory."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> RequestError:
    """Return what to tell a user whose run directory cannot be written."""
    fix = _FIXES.get(error.errno or 0, "check permissions and free space, or choose another out")
    return RequestError(f"{path} cannot be written: {reason(error)}", where=f"out={path}", fix=fix)


def explained(error: Exception, where: str) -> HalfstepError:
    """Return an exception as one of ours; `where` is where it was caught, for one that names no place itself.

    A name that no file can have is a RequestError. What the operating system refused otherwise is a RefusedError:
    nothing in the request is wrong, and it works when the system does. A broken connection is what another process's
    end looks like, and stays a Fault.
    """
    if isinstance(error, HalfstepError):
        return error
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError) or error.errno is None:
        return Fault.of(error, where=where)
    place = str(error.filename) if error.filename is not None else where
    if error.errno in FULL:
        return DiskFull("the disk is full", where=place, fix="free some space, or write elsewhere: out=DIR")
    if error.errno in _NAMES:
        return RequestError(f"no such file can be used: {reason(error)}", where=place, fix="check the path")
    fix = _FIXES.get(error.errno, "check that it may be read and written")
    return RefusedError(f"the operating system refused: {reason(error)}", where=place, fix=fix)


def reason(error: OSError) -> str:
    """Return why the operating system refused."""
    return error.strerror or str(error) or type(error).__name__


def _temporary(file: Path) -> Path:
    kept = os.fsdecode(os.fsencode(file.name)[:_SHORTENED])
    return file.with_name(f".{kept}.{os.urandom(8).hex()}")


def _bytes(content: str | bytes) -> bytes:
    # A path that is no UTF-8 has halves of characters in it; \\udc80 is what JSON calls one.
    return content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace")
