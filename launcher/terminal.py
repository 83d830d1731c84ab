"""The one way to a person's screen: text that others wrote cannot move the cursor, hide a line or colour one."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

# Control characters (also the 8-bit ones, which terminals obey too), what breaks or turns a line around, and halves of
# characters, which no terminal takes.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
TAB = "\t"
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, keep: str = "") -> str:
    """Return text with every character that a terminal would obey written out, such as \\x1b; those in `keep` stay."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _written_out(match[0]), text)


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


def _written_out(letter: str) -> str:
    # JSON knows \\u009b and no \\x9b; what JSON itself escapes is written as people know it.
    return _SHORT.get(letter) or (f"\\x{ord(letter):02x}" if ord(letter) < 32 else f"\\u{ord(letter):04x}")


def table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Return rows as lines whose columns stand under each other, `right` or left; the last column is free text.

    A cell is one line, whatever it holds.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)
        ]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return lines
