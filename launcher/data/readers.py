"""Read each kind of file as a stream of pieces of text, and say exactly where a file is wrong."""

import json
import shlex
import tokenize
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from halfstep.launcher.corpus import hub
from halfstep.launcher.data import examples, formats, row_fields, streams, text_rows
from halfstep.launcher.data.examples import Example
from halfstep.launcher.errors import RequestError

PIECE_CHARACTERS = 2**20
_SNIFFED_LINES = 5

Skip = Callable[[RequestError], None]
"""Takes what is wrong with a row that is left out."""


class Piece(NamedTuple):
    """A stretch of one document; only long documents come in several."""

    text: str
    ends_document: bool
    example: Example | None = None
    """What the text is of, where it is to be laid out by a template; such a piece is a document."""


def file_pieces(path: Path, field: str, *, kind: str = formats.AUTO, skip: Skip | None = None) -> Iterator[Piece]:
    """Yield the documents of a file: the rows of a table, or the whole of any other file as UTF-8 text.

    `kind` is one of `formats.CHOICES`. Rows that hold no text go to `skip`, where there is one. Raises RequestError
    naming the file, and the line, row or byte where it is wrong.
    """
    given = formats.of(path, kind)
    try:
        if given.kind == formats.TEXT:
            yield from _text_pieces(path, given, field, sniff=kind == formats.AUTO)
            return
        if kind == formats.SFT:
            yield from _passed(text_rows.rows(path, given, examples.WANTED), skip)
        else:
            yield from _passed(text_rows.texts(path, given, field), skip)
    except OSError as error:
        raise RequestError(
            f"{path.name} cannot be read: {error.strerror or error}", where=str(path), fix="check the file"
        ) from None


def _passed(rows: Iterator[str | Example | RequestError], skip: Skip | None) -> Iterator[Piece]:
    """Yield the pieces of rows; what is wrong with one is raised, or told to `skip`."""
    for row in rows:
        if isinstance(row, str):
            yield from cut(row)
        elif isinstance(row, Example):
            yield Piece(row.text, True, row)
        elif skip is None:
            raise row
        else:
            skip(row)


def python_source(path: Path) -> str | None:
    """Return a Python file as Python itself decodes it (PEP 263), or None where Python cannot."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def cut(text: str) -> Iterator[Piece]:
    """Yield a text in pieces of about PIECE_CHARACTERS at most, cut after a line break where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        stop = text.rfind("\n", start, stop) + 1 or max(text.rfind(" ", start + 1, stop), 0) or stop
        yield Piece(text[start:stop], False)
        start = stop
    yield Piece(text[start:], True)


def _text_pieces(path: Path, given: formats.Format, field: str, *, sniff: bool) -> Iterator[Piece]:
    with streams.opened(path, given) as (stream, offset):
        buffer = stream.read(PIECE_CHARACTERS)
        if sniff:
            _refuse_json_lines(buffer, path, field)
        while following := stream.read(PIECE_CHARACTERS):
            buffer += following
            stop = _cut_bytes(buffer)
            yield Piece(streams.decode(buffer[:stop], path, offset), False)
            buffer, offset = buffer[stop:], offset + stop
        yield Piece(streams.decode(buffer, path, offset), True)


def _refuse_json_lines(buffer: bytes, path: Path, field: str) -> None:
    """Refuse text that begins with several JSON objects, a line each, or that is one with the field asked for."""
    if not buffer.lstrip().startswith(b"{"):
        return
    lines = list(islice((line for line in buffer.split(b"\n") if line.strip()), _SNIFFED_LINES + 1))
    if len(buffer) >= PIECE_CHARACTERS:
        del lines[-1:]  # perhaps not all of it
    objects = 0
    for line in lines[:_SNIFFED_LINES]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or (
            len(lines) == 1 and not isinstance(row_fields.text_of(row, field, "", ""), str)
        ):
            return
        objects += 1
    if objects:
        raise RequestError(
            f"{path.name} would be read as plain text, and its lines are JSON objects",
            where=str(path),
            fix=f"rename it to {shlex.quote(path.with_suffix('.jsonl').name)}, or say what it is: --format jsonl "
            "(or --format text)",
        )


def _cut_bytes(buffer: bytes) -> int:
    """Return where to cut: after the last line break, else before the last space, else between two characters."""
    if stop := buffer.rfind(b"\n") + 1 or max(buffer.rfind(b" ", 1), 0):
        return stop
    stop = len(buffer) - 1
    while stop > len(buffer) - 5 and buffer[stop] & 0xC0 == 0x80:  # A continuation byte of UTF-8.
        stop -= 1
    return stop


def hub_pieces(
    name: str, config: str | None, split: str, field: str, *, kind: str = formats.AUTO, skip: Skip | None = None
) -> Iterator[Piece]:
    """Yield the rows of a hub data set, streamed. Raises RequestError when the hub does not give it."""
    wanted = examples.WANTED if kind == formats.SFT else row_fields.of_field(field)
    where = f"--source hub:{name}"
    fix = "check the name; without network, fetch its files elsewhere and name their folder"
    if problem := hub.unreachable():
        raise RequestError(f"{name!r} is no file here, and {problem}", where=where, fix=fix)
    import datasets
    import datasets.exceptions

    try:
        table = datasets.load_dataset(name, config, split=split, streaming=True)
        taken = (wanted.take(row, f"{where}, row {n}", f"row {n}") for n, row in enumerate(table, start=1))
        yield from _passed(taken, skip)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(f"the hub did not give {name!r}: {reason}", where=where, fix=fix) from None
