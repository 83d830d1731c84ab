"""Read files that somebody else may have made: regular ones only, no longer than expected, and without ever waiting."""

import collections
import contextlib
import errno
import json
import math
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

RECORD_BYTES = 1 << 28
"""No record of a run, a checkpoint or a study is larger."""
LINE_BYTES = 1 << 24
"""No line of one is longer."""


def open_regular(path: Path, *, follow: bool = False) -> BinaryIO:
    """Open a regular file to read it; raises OSError, with a reason in `strerror`, for anything else.

    A pipe or a device is not waited for. A symbolic link is refused unless `follow`: in a folder that others may
    write, it leads where they like.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "it is no regular file", str(path)) from None
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, limit: int = RECORD_BYTES, *, follow: bool = False) -> bytes:
    """Read a regular file of at most `limit` bytes; raises OSError as `open_regular` does, and where it is larger."""
    with open_regular(path, follow=follow) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return content


def read_text(path: Path, limit: int = RECORD_BYTES, *, follow: bool = False) -> str:
    """Read a regular file as UTF-8; raises OSError, and ValueError where it is no UTF-8."""
    return text_of(read_bytes(path, limit, follow=follow))


def read_json(path: Path, limit: int = RECORD_BYTES, *, follow: bool = False) -> Any:
    """Read a regular file as JSON; raises OSError where it cannot be read, ValueError where it is damaged."""
    return loads(read_bytes(path, limit, follow=follow))


def read_toml(path: Path, limit: int = RECORD_BYTES, *, follow: bool = False) -> dict[str, Any]:
    """Read a regular file as TOML; raises OSError where it cannot be read, ValueError where it is none."""
    text = read_text(path, limit, follow=follow)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a regular file that holds a JSON object; raises as `read_json` does."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise ValueError("it is no JSON object")
    return tree


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file with their ends, one at a time; raises OSError where it cannot be read.

    A line beyond LINE_BYTES is cut into several, none of which is JSON.
    """
    with open_regular(path) as file:
        while line := file.readline(LINE_BYTES):
            yield line


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects that stand in a file, one a line; nothing where it cannot be read.

    Lines that are none are passed over: a torn last line is of a run that is going, or was killed.
    """
    with contextlib.suppress(OSError):
        for line in lines(path):
            try:
                row = loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def last_objects(path: Path, tail: int = 1 << 16) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the last `tail` bytes of a file, the newest first; nothing where it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            tail_lines = file.read(tail).splitlines()
    except OSError:
        return
    for line in reversed(tail_lines):
        try:
            row = loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def loads(content: bytes | str) -> Any:
    """Return what JSON says; raises ValueError for a key that stands twice, NaN, inf, and nesting that is too deep."""
    text = content if isinstance(content, str) else text_of(content)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None


def text_of(content: bytes) -> str:
    """Return bytes as text; raises ValueError where they are no UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name!r} twice")
    return tree


def _constant(word: str) -> Any:
    raise ValueError(f"it holds {word}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:40]}, which is no finite number")
    return number
