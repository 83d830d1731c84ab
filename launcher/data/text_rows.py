"""Read the rows of JSON lines, CSV, TSV and parquet, mostly for their text, and say exactly which row is wrong."""

import contextlib
import csv
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halfstep.launcher.data import formats, parquet_rows, streams
from halfstep.launcher.data.formats import Format
from halfstep.launcher.data.row_fields import SKIP, Row, Wanted, no_field, of_field, text_of
from halfstep.launcher.data.streams import LONGEST_LINE, Line, Opened
from halfstep.launcher.errors import RequestError

_DELIMITERS = {formats.CSV: (",", ";", "\t"), formats.TSV: ("\t",)}


def rows(path: Path, given: Format, wanted: Wanted) -> Iterator[Any]:
    """Yield what is wanted of each row of JSON lines or parquet, or the RequestError that is said of a row alone.

    Raises RequestError for a table that cannot be read further.
    """
    with streams.opened(path, given) as file:  # refuses what is not the file itself
        if given.kind == formats.JSON_LINES:
            yield from _of_json(file, path, wanted)
    if given.kind == formats.PARQUET:
        yield from parquet_rows.rows(path, wanted)


def texts(path: Path, given: Format, field: str) -> Iterator[Row]:
    """Yield what each row of a table holds in a field; `meta.text` names a field inside another.

    Raises RequestError for a table that cannot be read further.
    """
    if given.kind == formats.PARQUET:
        with streams.opened(path, given):  # refuses what is not the file itself
            pass
        yield from parquet_rows.texts(path, field)
        return
    with streams.opened(path, given) as file:
        yield from (
            _of_json(file, path, of_field(field))
            if given.kind == formats.JSON_LINES
            else _of_csv(file, path, field, given.kind)
        )


def _of_json(file: Opened, path: Path, wanted: Wanted) -> Iterator[Any]:
    for line in streams.lines(file, path):
        try:
            text = streams.decode(line.content, path, line.offset)
        except RequestError as error:
            yield error
            continue
        if text.strip():
            yield _json_row(text, wanted, path, line)


def _json_row(text: str, wanted: Wanted, path: Path, line: Line) -> Any:
    where, name = f"{path}, line {line.number}", f"line {line.number}"
    try:
        row = json.loads(text)
        if any(text.count(f'"{key}"') > 1 for key in wanted.keys):
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
            f"{name} is a JSON {type(row).__name__}, not {wanted.shape}",
            where=where,
            fix=_one_array(path) if isinstance(row, list) and line.number == 1 else "write one object a line",
        )
    return wanted.take(row, where, name)


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
        raise no_field(dict.fromkeys(names), field, where, path.name)
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
