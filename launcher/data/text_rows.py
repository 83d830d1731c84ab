"""Read the text of each row of JSON lines, CSV, TSV and parquet, and say exactly which row is wrong."""

import contextlib
import csv
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halfstep.launcher.data import formats, streams
from halfstep.launcher.data.formats import Format
from halfstep.launcher.data.streams import LONGEST_LINE, Line, Opened
from halfstep.launcher.errors import RequestError, nearest

_PARQUET_ROWS = 1024
_DELIMITERS = {formats.CSV: (",", ";", "\t"), formats.TSV: ("\t",)}
_SHOWN_CHARACTERS = 40
SKIP = "repair that row, or leave such rows out: --skip-bad"

Row = str | RequestError
"""A row's text, or what is wrong with that row alone."""


def texts(path: Path, given: Format, field: str) -> Iterator[Row]:
    """Yield what each row of a table holds in a field; `meta.text` names a field inside another.

    Raises RequestError for a table that cannot be read further.
    """
    if given.kind == formats.PARQUET:
        with streams.opened(path, given):  # refuses what is not the file itself
            pass
        yield from _of_parquet(path, field)
        return
    with streams.opened(path, given) as file:
        yield from (
            _of_json(file, path, field) if given.kind == formats.JSON_LINES else _of_csv(file, path, field, given.kind)
        )


def text_of(row: dict[str, Any], field: str, where: str, name: str) -> Row:
    """Return the text field of a row; `name` is what a message calls the row."""
    inside: Any = row
    for part in (field,) if field in row else field.split("."):
        if not isinstance(inside, dict) or part not in inside:
            return _no_field(row, field, where, name)
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


def _no_field(row: dict[str, Any], field: str, where: str, name: str) -> RequestError:
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


def _of_json(file: Opened, path: Path, field: str) -> Iterator[Row]:
    for line in streams.lines(file, path):
        try:
            text = streams.decode(line.content, path, line.offset)
        except RequestError as error:
            yield error
            continue
        if text.strip():
            yield _json_text(text, field, path, line)


def _json_text(text: str, field: str, path: Path, line: Line) -> Row:
    where, name = f"{path}, line {line.number}", f"line {line.number}"
    try:
        row = json.loads(text)
        if text.count(f'"{field.rpartition(".")[2]}"') > 1:
            # Whoever wrote the same key twice meant one of them, and nobody knows which.
            row = json.loads(text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        return RequestError(
            f"{name} is not JSON: {error.msg} at column {error.colno}", where=where, fix=_advice(text, path, error)
        )
    except (RecursionError, ValueError) as error:
        return RequestError(f"{name} is JSON that cannot be read: {error}", where=where, fix=SKIP)
    if not isinstance(row, dict):
        return RequestError(
            f"{name} is a JSON {type(row).__name__}, not an object with a field {field!r}",
            where=where,
            fix=_one_array(path) if isinstance(row, list) and line.number == 1 else "write one object a line",
        )
    return text_of(row, field, where, name)


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return row


def _advice(text: str, path: Path, error: json.JSONDecodeError) -> str:
    begins = text.lstrip()[:1]
    if begins == "[" and error.pos >= len(text.rstrip()):
        return _one_array(path)
    if (begins == "{" and error.pos >= len(text.rstrip())) or error.msg == "Extra data":
        return f"JSON lines hold one object a line: jq -c . {shlex.quote(path.name)}"
    return SKIP


def _one_array(path: Path) -> str:
    return f"JSON lines hold one object a line, not one array over many: jq -c '.[]' {shlex.quote(path.name)}"


def _of_csv(file: Opened, path: Path, field: str, kind: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    last = 0

    def decoded() -> Iterator[str]:
        nonlocal last
        for line in streams.lines(file, path):
            last = line.number
            yield streams.decode(line.content, path, line.offset)

    source = decoded()
    header = next((line for line in source if line.strip()), None)
    if header is None:
        return
    reader = csv.reader(itertools.chain([header], source), delimiter=_delimiter(header, field, kind), strict=True)
    names: list[str] | None = None
    column = 0
    while True:
        first = last if names is None else last + 1
        where, name = f"{path}, line {first}", f"line {first}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if names is None or "end of data" in str(error):
                raise _unreadable(path, name, error) from None
            yield RequestError(f"{name} is no row of a table: {error}", where=where, fix=SKIP)
            continue
        if names is None:
            names = row
            column = _column(names, field, path)
        elif row:
            yield _cell(row, column, len(names), kind, field, where, name)


def _delimiter(header: str, field: str, kind: str) -> str:
    """Return what separates the columns: what makes the field a column of its own, else what the name says."""
    for delimiter in _DELIMITERS[kind]:
        with contextlib.suppress(csv.Error):
            if field in next(csv.reader([header], delimiter=delimiter), []):
                return delimiter
    return _DELIMITERS[kind][0]


def _column(names: list[str], field: str, path: Path) -> int:
    where = f"{path}, line 1"
    if field not in names:
        raise _no_field(dict.fromkeys(names), field, where, path.name)
    if names.count(field) > 1:
        raise RequestError(f"{path.name} has {names.count(field)} columns {field!r}", where=where, fix="rename one")
    return names.index(field)


def _cell(row: list[str], column: int, columns: int, kind: str, field: str, where: str, name: str) -> Row:
    if len(row) != columns:
        return RequestError(
            f"the row that begins in {name} has {len(row)} columns, and the table {columns}", where=where, fix=SKIP
        )
    if kind == formats.TSV and any("\t" in cell and "\n" in cell for cell in row):
        # Most who write such tables know no quotes: two cells that begin and end with one would swallow all between.
        return RequestError(
            f"the row that begins in {name} has quotation marks around tabs and line breaks: rows that are not one",
            where=where,
            fix="double the quotation marks inside cells and quote those cells, or write JSON lines; or --skip-bad",
        )
    return text_of({field: row[column]}, field, where, name)


def _unreadable(path: Path, name: str, error: csv.Error) -> RequestError:
    return RequestError(
        f"a quotation mark in the row that begins in {name} is never closed: {error}",
        where=f"{path}, {name}",
        fix="double the quotation marks inside cells and quote those cells, or write JSON lines",
    )


def _of_parquet(path: Path, field: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            steps = _steps(table.schema_arrow, field, path)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    inside = _as_python(value)
                    for step in steps:
                        inside = inside.get(step) if isinstance(inside, dict) else None
                    yield text_of({field: inside}, field, f"{path}, row {number}", f"row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{path.name} is not a readable parquet file: {reason}", where=str(path), fix="copy it again"
        ) from None


def _steps(schema: Any, field: str, path: Path) -> list[str]:
    """Return the names that lead to a field from its column, after looking that it is there, once."""
    columns = schema.get_all_field_indices(field)
    if len(columns) > 1:
        raise RequestError(f"{path.name} has {len(columns)} columns {field!r}", where=str(path), fix="rename one")
    if columns:
        return []
    row, (root, *steps) = _as_row(schema), field.split(".")
    inside: Any = row
    for part in (root, *steps):
        if not isinstance(inside, dict) or part not in inside:
            raise _no_field(row, field, str(path), path.name)
        inside = inside[part]
    return steps


def _as_row(fields: Any) -> dict[str, Any]:
    """Return the names of a schema or struct as a row of them."""
    import pyarrow

    return {each.name: _as_row(each.type) if pyarrow.types.is_struct(each.type) else None for each in fields}


def _as_python(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else None
