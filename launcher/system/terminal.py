"""The one way to a person's screen: text that others wrote cannot move the cursor, hide a line or colour one."""

import json
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from halfstep.launcher.errors import printable

_COLOUR = re.compile("\x1b\\[[0-9;]*m")
TAB = "\t"


def of_log(text: str) -> str:
    """Return lines of a log for a screen: colours are dropped, other control characters are written out."""
    return printable(_COLOUR.sub("", text), keep="\n\t")


def say(*lines: str, error: bool = False) -> None:
    """Print lines to the screen, with `error` to stderr; a line break inside of one does not make two of it."""
    _print("".join(f"{printable(line, keep=TAB)}\n" for line in lines or ("",)), error=error)


def say_text(text: str, *, error: bool = False) -> None:
    """Print text of several lines, such as a script or what a model wrote, as it stands but for control characters."""
    _print(printable(text, keep="\n\t"), error=error)


def say_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON."""
    say_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def _print(text: str, *, error: bool) -> None:
    print(text, end="", file=sys.stderr if error else sys.stdout, flush=True)


def table(rows: Sequence[Sequence[str]], *, left: Collection[int] | None = None) -> list[str]:
    """Return rows as lines whose columns stand under each other: to the left those in `left` (None: all), else right.

    A cell is one line, whatever it holds.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if left is None or column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
