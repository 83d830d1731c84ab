"""Read the JSON lines of a run that still stand, while it is going or after it was killed in the middle of one."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import RequestError

_Parsed = TypeVar("_Parsed")


def parse(file: Path, convert: Callable[[dict[str, Any]], _Parsed]) -> list[_Parsed]:
    """Return the rows that stand, each converted; raises RequestError with the line of one that is damaged.

    A start goes on after the steps it names (`steps_done`, else none): what came before about later steps, or about no
    step, is of a series that is gone.
    """
    standing: list[tuple[int, bytes, dict[str, Any] | None]] = []
    for number, line, is_start in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if is_start:
            done = row.get("steps_done", 0) if isinstance(row, dict) else 0
            standing = [one for one in standing if one[2] is not None and 0 < _step(one[2]) <= done]
        standing.append((number, line, row))
    found = []
    for number, line, row in standing:
        try:
            found.append(convert(json.loads(line) if row is None else row))
        except ValueError as error:
            raise _damaged(file, number, str(error)) from None
        except KeyError as missing:
            raise _damaged(file, number, f"it has no {missing.args[0]}") from None
        except TypeError:
            raise _damaged(file, number, "it is no object") from None
    return found


def _step(row: dict[str, Any]) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else 0


def _lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (line number, line, whether it is an attempt's start); not a last line that is still being written."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from None
    *whole, rest = content.split(b"\n")
    for number, line in enumerate(whole, 1):
        # An attempt that was killed half-way through a line has the next attempt's start on the same line.
        start = re.search(rb'\{"event": ?"start"', line)
        yield number, line[start.start() :] if start else line, start is not None
    with contextlib.suppress(ValueError):
        json.loads(rest)
        yield len(whole) + 1, rest, False


def _damaged(file: Path, number: int, reason: str) -> RequestError:
    return RequestError(
        f"{file.name} is damaged in line {number}: {reason}",
        where=f"{file}:{number}",
        fix="restore the file from a copy, or delete that line",
    )


def unreadable(file: Path, error: OSError) -> RequestError:
    """Return what to tell a user whose run cannot be read."""
    return RequestError(f"{file} cannot be read: {error.strerror}", where=str(file), fix="check its permissions")
