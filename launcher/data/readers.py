"""Read each kind of file as a stream of pieces of text, and say exactly where a file is wrong."""

import gzip
import json
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import RequestError, nearest
from launcher.plan import hub

PIECE_CHARACTERS = 2**20
KNOWN_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".md", ".py", ".gz")
_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_PARQUET_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """A stretch of one document; only long documents come in several."""

    text: str
    ends_document: bool


def file_pieces(path: Path, field: str) -> Iterator[Piece]:
    """Yield the documents of a file: rows of JSON lines or parquet, or the whole of any other file as UTF-8 text.

    Raises RequestError naming the file, and the line, row or byte where it is wrong.
    """
    try:
        if path.name.endswith(_JSON_SUFFIXES):
            for text in _json_texts(path, field):
                yield from cut(text)
        elif path.suffix == ".parquet":
            for text in _parquet_texts(path, field):
                yield from cut(text)
        else:
            yield from _text_pieces(path)
    except OSError as error:
        raise RequestError(
            f"{path.name} cannot be read: {error.strerror or error}", where=str(path), fix="check the file"
        ) from None


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


def _text_pieces(path: Path) -> Iterator[Piece]:
    with path.open("rb") as file:
        buffer = file.read(PIECE_CHARACTERS)
        offset = len(_BOM) if buffer.startswith(_BOM) else 0
        buffer = buffer[offset:]
        while following := file.read(PIECE_CHARACTERS):
            buffer += following
            stop = _cut_bytes(buffer)
            yield Piece(_decode(buffer[:stop], path, offset), False)
            buffer, offset = buffer[stop:], offset + stop
        yield Piece(_decode(buffer, path, offset), True)


def _cut_bytes(buffer: bytes) -> int:
    """Return where to cut: after the last line break, else before the last space, else between two characters."""
    if stop := buffer.rfind(b"\n") + 1 or max(buffer.rfind(b" ", 1), 0):
        return stop
    stop = len(buffer) - 1
    while stop > len(buffer) - 5 and buffer[stop] & 0xC0 == 0x80:  # A continuation byte of UTF-8.
        stop -= 1
    return stop


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path.name} is not UTF-8 text: {error.reason} 0x{data[error.start]:02x} at byte {offset + error.start}",
            where=str(path),
            fix="convert it (iconv -f ENCODING -t UTF-8), or leave it out with a glob",
        ) from None


def _json_texts(path: Path, field: str) -> Iterator[str]:
    offset = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = _decode(line.removeprefix(_BOM) if number == 1 else line, path, offset)
                offset += len(line)
                if text.strip():
                    yield _json_text(text, field, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(
            f"{path.name} is not a whole gzip file: {error}", where=str(path), fix="copy it again"
        ) from None


def _json_text(line: str, field: str, path: Path, number: int) -> str:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        array = number == 1 and line.lstrip().startswith("[")
        raise RequestError(
            f"line {number} is not JSON: {error.msg} at column {error.colno}",
            where=where,
            fix="JSON lines hold one object a line, not one array over many" if array else "mend or remove that line",
        ) from None
    except (RecursionError, ValueError) as error:
        raise RequestError(
            f"line {number} is JSON that cannot be read: {error}", where=where, fix="remove that line"
        ) from None
    if not isinstance(row, dict):
        raise RequestError(
            f"line {number} is a JSON {type(row).__name__}, not an object with a field {field!r}",
            where=where,
            fix="write one object a line",
        )
    return _text_of(row, field, where, f"line {number}")


def _text_of(row: dict[str, Any], field: str, where: str, name: str) -> str:
    """Return the text field of a row."""
    if field not in row:
        meant = nearest(field, row) or list(row)[:5]
        raise RequestError(
            f"{name} has no field {field!r}; it has {', '.join(map(repr, list(row)[:8])) or 'none at all'}",
            where=where,
            fix=f"--field {meant[0]}" if meant else "remove that line",
        )
    text = row[field]
    if not isinstance(text, str):
        raise RequestError(
            f"the field {field!r} of {name} holds {type(text).__name__}, not text", where=where, fix="mend that row"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the field {field!r} of {name} holds half a surrogate pair at character {error.start}, which is no text",
            where=where,
            fix="mend that row",
        ) from None
    return text


def _parquet_texts(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                _text_of(dict.fromkeys(names), field, str(path), path.name)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    yield _text_of({field: _as_python(value)}, field, f"{path}, row {number}", f"row {number}")
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{path.name} is not a readable parquet file: {reason}", where=str(path), fix="copy it again"
        ) from None


def _as_python(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def hub_pieces(name: str, config: str | None, split: str, field: str) -> Iterator[Piece]:
    """Yield the rows of a hub data set, streamed. Raises RequestError when the hub does not give it."""
    where = f"--source hub:{name}"
    fix = "check the name; without network, fetch its files elsewhere and name their folder"
    if problem := hub.unreachable():
        raise RequestError(f"{name!r} is no file here, and {problem}", where=where, fix=fix)
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield from cut(_text_of(row, field, f"{where}, row {number}", f"row {number}"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(f"the hub did not give {name!r}: {reason}", where=where, fix=fix) from None
