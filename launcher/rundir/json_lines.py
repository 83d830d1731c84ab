"""Read the JSON lines of a run that still stand, while it is going or after it was killed in the middle of one."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import reason

_Parsed = TypeVar("_Parsed")


def parse(file: Path, convert: Callable[[dict[str, Any]], _Parsed]) -> list[_Parsed]:
    """Return the rows that stand, each converted; raises RequestError with the line of one that is damaged.

    A start goes on after the steps it names (`steps_done`, else none): what came before about later steps, or about no
    step, is of a series that is gone. `convert` raises ValueError for a row that is none.
    """
    standing: list[tuple[int, bytes, dict[str, Any] | None]] = []
    for number, line, is_start in _lines(file):
        try:
            row = foreign.loads(line)
        except ValueError:
            row = None
        if is_start:
            done = _steps_done(file, number, row)
            standing = [one for one in standing if one[2] is not None and 0 < _step(one[2]) <= done]
        standing.append((number, line, row))
    found = []
    for number, line, row in standing:
        try:
            seen = foreign.loads(line) if row is None else row
            if not isinstance(seen, dict):
                raise ValueError("it is no object")
            found.append(convert(seen))
        except ValueError as error:
            raise _damaged(file, number, str(error)) from None
    return found


def _steps_done(file: Path, number: int, row: Any) -> int:
    done = row.get("steps_done", 0) if isinstance(row, dict) else 0
    if not isinstance(done, int) or isinstance(done, bool) or done < 0:
        raise _damaged(file, number, f"steps_done = {done!r} is no number of steps")
    return done


def _step(row: dict[str, Any]) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else 0


def _lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (line number, line, whether it is an attempt's start); not a last line that is still being written."""
    try:
        for number, content in enumerate(foreign.lines(file), 1):
            line = content.removesuffix(b"\n")
            if line == content:
                try:
                    foreign.loads(line)
                except ValueError:
                    return
            yield number, *from_start(line)
    except OSError as error:
        raise unreadable(file, error) from None


def from_start(line: bytes) -> tuple[bytes, bool]:
    """Return a line and whether it is an attempt's start, which may stand behind half a line of one that was killed."""
    start = re.search(rb'\{"event": ?"start"', line)
    return line[start.start() :] if start else line, start is not None


def _damaged(file: Path, number: int, reason: str) -> RequestError:
    return RequestError(
        f"{file.name} is damaged in line {number}: {reason}",
        where=f"{file}:{number}",
        fix="restore the file from a copy, or delete that line",
    )


def unreadable(file: Path, error: OSError) -> RequestError:
    """Return what to tell a user whose run cannot be read."""
    return RequestError(f"{file} cannot be read: {reason(error)}", where=str(file), fix="check its permissions")
