"""Corpora mixed by weight, as a request names them: `a:0.7,b:0.3`, or a list of tables in a run file."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

from halfstep.launcher.config import legal
from halfstep.launcher.errors import RequestError

MOST_PARTS = 64
_SMALLEST, _LARGEST = Decimal("1e-9"), Decimal("1e9")
_LONGEST_WEIGHT = 30
"""Characters; a number of any length would make the exact arithmetic of the order as long."""
_LIKE = 'data=a:0.7,b:0.3, or in a run file data = [{ path = "a", weight = 0.7 }, { path = "b", weight = 0.3 }]'


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """One part of a mixture."""

    path: str
    weight: float
    """Its share of the sequences, 0 to 1: what was asked for, divided by the sum over the parts."""


def placed(value: str | list[Any], base: Path, origin: str) -> str:
    """Return what `data` names, with whole paths: a path as it is, a mixture as text.

    Raises RequestError for a mixture that is none.
    """
    pieces = _of_text(value, origin) if isinstance(value, str) else _of_tables(value, origin)
    if not pieces:
        assert isinstance(value, str), "a list of no tables is refused"
        return legal.absolute("data", value, base, origin)
    pieces = [(legal.absolute("data", path, base, origin), weight) for path, weight in pieces]
    _check(pieces, origin)
    return ",".join(f"{path}:{weight}" for path, weight in pieces)


def text_of(tables: list[Any], origin: str) -> str:
    """Return a list of tables as text, with its paths as they are. Raises RequestError for a mixture that is none."""
    return ",".join(f"{path}:{weight}" for path, weight in _of_tables(tables, origin))


def parts(text: str) -> list[Weighed]:
    """Return the parts of a mixture as `placed` wrote it; none for a single path."""
    pieces = _of_text(text, "data")
    if pieces:
        _check(pieces, "data")
    total = sum(Fraction(weight) for _, weight in pieces)
    return [Weighed(path=path, weight=float(Fraction(weight) / total)) for path, weight in pieces]


def _of_text(text: str, origin: str) -> list[tuple[str, str]]:
    """Return the paths and weights in a text; none where it is a path, which may hold colons or commas but not both."""
    pieces = [piece.strip().rpartition(":") for piece in text.split(",")]
    if len(pieces) == 1 or not any(_is_number(weight) for _, colon, weight in pieces if colon):
        return []
    for path, _, weight in pieces:
        if not path or not _is_number(weight):
            name = f"{path}:{weight}" if path else weight
            what = f"{legal.shown(name)!r} has no weight" if name else "a part of the mixture is empty"
            raise RequestError(what, where=f"{origin}: data={legal.shown(text)}", fix=f"write {_LIKE}")
    return [(path, weight.strip()) for path, _, weight in pieces]


def _of_tables(tables: list[Any], origin: str) -> list[tuple[str, str]]:
    pieces = []
    for table in tables:
        right = isinstance(table, dict) and table.keys() == {"path", "weight"} and isinstance(table["path"], str)
        if not right or not table["path"] or isinstance(table["weight"], bool | list | dict):
            raise RequestError(
                f"a part of data is {legal.shown(table)}, not a path and a weight", where=origin, fix=f"write {_LIKE}"
            )
        pieces.append((table["path"], str(table["weight"])))
    if len(pieces) < 2:
        raise RequestError(
            f"data lists {len(pieces)} corpora, and a mixture has two or more",
            where=origin,
            fix='name a single one by its path: data = "PATH"',
        )
    return pieces


def _check(pieces: Sequence[tuple[str, str]], origin: str) -> None:
    """Raise RequestError for weights that no order could keep, and paths that the text of a mixture cannot hold."""
    if len(pieces) > MOST_PARTS:
        raise RequestError(
            f"data mixes {len(pieces)} corpora; at most {MOST_PARTS} can be",
            where=origin,
            fix="prepare some of them together",
        )
    for path, weight in pieces:
        if "," in path:
            raise RequestError(
                f"the path {legal.shown(path)} holds a comma, which parts the corpora of a mixture",
                where=origin,
                fix="link to it under another name",
            )
        if not _is_number(weight):
            raise RequestError(
                f"the weight of {path} is {legal.shown(weight)!r}, which is no number",
                where=origin,
                fix=f"write {_LIKE}",
            )
    weights = [Decimal(weight) for _, weight in pieces]
    finite = all(weight.is_finite() for weight in weights)
    if finite and max(abs(weight) for weight in weights) <= _LARGEST and sum(weights) <= 0:
        raise RequestError(
            f"the weights of the mixture sum to {sum(weights)}, not to a positive number",
            where=f"{origin}: data, weights {', '.join(weight for _, weight in pieces)}",
            fix="give every part a weight above 0, such as the tokens to be read of it",
        )
    for (path, given), weight in zip(pieces, weights, strict=True):
        if not weight.is_finite() or not _SMALLEST <= weight <= _LARGEST or len(given) > _LONGEST_WEIGHT:
            raise RequestError(
                f"the weight of {path} is {legal.shown(given)}, not a number from {_SMALLEST:g} to {_LARGEST:g}",
                where=f"{origin}: data",
                fix="give a number above 0, or leave the part out",
            )


def _is_number(text: str) -> bool:
    try:
        Decimal(text.strip())
    except InvalidOperation:
        return False
    return True
