"""What is wanted of a row of a table: the text in one of its fields, or whatever else is made of it."""

import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from halfstep.launcher.errors import RequestError, nearest

_SHOWN_CHARACTERS = 40
SKIP = "repair that row, or leave such rows out: --skip-bad"

Row = str | RequestError
"""A row's text, or what is wrong with that row alone."""


class Wanted(NamedTuple):
    """What is read of each row of a table."""

    fields: tuple[str, ...]
    """The fields that are looked at."""
    keys: tuple[str, ...]
    """The keys of JSON that no object may have twice."""
    take: Callable[[dict[str, Any], str, str], Any]
    """Makes of a row, where it stands and what it is called what is wanted, or a RequestError."""
    shape: str
    """What a message calls an object that has it."""


def of_field(field: str) -> Wanted:
    """Return how the text in a field is wanted."""

    def take(row: dict[str, Any], where: str, name: str) -> Row:
        return text_of(row, field, where, name)

    return Wanted((field,), (field.rpartition(".")[2],), take, f"an object with a field {field!r}")


def text_of(row: dict[str, Any], field: str, where: str, name: str) -> Row:
    """Return the text field of a row; `name` is what a message calls the row."""
    inside: Any = row
    for part in (field,) if field in row else field.split("."):
        if not isinstance(inside, dict) or part not in inside:
            return no_field(row, field, where, name)
        inside = inside[part]
    if not isinstance(inside, str):
        kind = "null" if inside is None else type(inside).__name__
        return RequestError(f"the field {field!r} of {name} holds {kind}, not text", where=where, fix=SKIP)
    try:
        inside.encode()
    except UnicodeEncodeError as error:
        return RequestError(
            f"the field {field!r} of {name} holds half a surrogate pair at character {error.start}, which is no text",
            where=where,
            fix=SKIP,
        )
    return inside


def no_field(row: dict[str, Any], field: str, where: str, name: str) -> RequestError:
    names = list(_names(row))
    meant = nearest(field, names) or names[:1]
    shown = ", ".join(repr(name[:_SHOWN_CHARACTERS]) for name in names[:8])
    return RequestError(
        f"{name} has no field {field!r}; it has {shown or 'none at all'}",
        where=where,
        fix=f"--field {shlex.quote(meant[0])}" if meant else SKIP,
    )


def _names(row: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, dict) and value and before.count(".") < 3:
            yield from _names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"
