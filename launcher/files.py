"""Write files so that a reader, or a crash, sees the old content or the new and nothing between."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import RequestError


def write_atomic(file: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new and nothing between."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


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


@contextlib.contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into a RequestError about a run directory."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> RequestError:
    """Return what to tell a user whose run directory cannot be written."""
    return RequestError(
        f"{path} cannot be written: {error.strerror}",
        where=f"out={path}",
        fix="check permissions and free space, or choose another out",
    )
