"""Read the JSON lines of a run's last attempt, while it is going or after it was killed in the middle of one."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import RequestError

_Parsed = TypeVar("_Parsed")


def parse(file: Path, convert: Callable[[dict[str, Any]], _Parsed]) -> list[_Parsed]:
    """Return the rows, each converted; raises RequestError with the line of a row that is damaged or lacks a key."""
    found = []
    for number, line, whole in _last_attempt(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            if whole:
                raise _damaged(file, number, str(error)) from None
            continue  # the run is writing this line, or was killed while it did
        try:
            found.append(convert(row))
        except KeyError as missing:
            raise _damaged(file, number, f"it has no {missing.args[0]}") from None
        except TypeError:
            raise _damaged(file, number, "it is no object") from None
    return found


def _last_attempt(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (line number, line, whether its end was written) from the last start on, or of the whole file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from None
    # Not by line: an attempt that was killed half-way through one has the next attempt's start on the same line.
    starts = [match.start() for match in re.finditer(rb'\{"event": ?"start"', content)]
    begin = starts[-1] if starts else 0
    first = content.count(b"\n", 0, begin) + 1
    *whole, rest = content[begin:].split(b"\n")
    for number, line in enumerate(whole, first):
        yield number, line, True
    if rest:
        yield first + len(whole), rest, False


def _damaged(file: Path, number: int, reason: str) -> RequestError:
    return RequestError(
        f"{file.name} is damaged in line {number}: {reason}",
        where=f"{file}:{number}",
        fix="restore the file from a copy, or delete that line",
    )


def unreadable(file: Path, error: OSError) -> RequestError:
    """Return what to tell a user whose run cannot be read."""
    return RequestError(f"{file} cannot be read: {error.strerror}", where=str(file), fix="check its permissions")
