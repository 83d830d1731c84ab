"""Open a file as the bytes of its text, decompressed, and read them in lines that fit in memory."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from halfstep.launcher.data import formats
from halfstep.launcher.data.formats import Format
from halfstep.launcher.errors import RequestError

LONGEST_LINE = 2**28
"""Bytes; what is longer is no line of text, and would fill the memory."""
_BUFFER_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"


class Opened(NamedTuple):
    """A file at its first character."""

    stream: io.BufferedReader
    offset: int
    """Bytes, decompressed, that were passed over."""


class Line(NamedTuple):
    """One line of a file, its end included."""

    number: int
    """From 1."""
    offset: int
    """Of its first byte, decompressed."""
    content: bytes


@contextlib.contextmanager
def opened(path: Path, given: Format) -> Iterator[Opened]:
    """Open a file, decompressed, at its first character; a byte order mark of UTF-8 is passed over.

    Raises RequestError, now or while it is read, for files that are not what their names say or are not whole.
    """
    with io.BufferedReader(path.open("rb", buffering=0), _BUFFER_BYTES) as file:
        formats.check_head(path, file.peek(formats.HEAD_BYTES)[: formats.HEAD_BYTES], given)
        with contextlib.ExitStack() as stack:
            stream: io.BufferedReader[Any] = file
            if given.compression is not None:
                raw = _Checked(path, given.compression, _decompressor(path, file, given.compression, stack))
                stream = stack.enter_context(io.BufferedReader(raw, _BUFFER_BYTES))
            formats.check_content(path, stream.peek(formats.HEAD_BYTES)[: formats.HEAD_BYTES], given.kind)
            mark = stream.read(len(_BOM)) if stream.peek(len(_BOM)).startswith(_BOM) else b""
            yield Opened(stream, len(mark))


def lines(file: Opened, path: Path) -> Iterator[Line]:
    """Yield the lines of a file. Raises RequestError for one that is too long."""
    number, offset = 0, file.offset
    while content := file.stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(content) > LONGEST_LINE:
            raise RequestError(
                f"line {number} is longer than {LONGEST_LINE >> 20} MiB",
                where=f"{path}, line {number}",
                fix="write one row a line, or name the file for what it holds",
            )
        yield Line(number, offset, content)
        offset += len(content)


def decode(data: bytes, path: Path, offset: int) -> str:
    """Return the text of bytes that lie at an offset of a file. Raises RequestError naming the byte that is wrong."""
    if b"\0" in data:
        raise formats.binary(path, offset + data.index(b"\0"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path.name} is not UTF-8 text: {error.reason} 0x{data[error.start]:02x} at byte {offset + error.start}",
            where=str(path),
            fix="convert it (iconv -f ENCODING -t UTF-8), or leave it out with a glob",
        ) from None


def _decompressor(
    path: Path, file: "io.BufferedReader[Any]", compression: str, stack: contextlib.ExitStack
) -> Callable[[int], bytes]:
    """Return a function that gives the next bytes, at most as many as it is asked for."""
    if compression == "gzip":
        return stack.enter_context(gzip.GzipFile(fileobj=file)).read1
    if compression == "zstd":
        import pyarrow

        return stack.enter_context(pyarrow.input_stream(str(path), compression="zstd")).read
    if compression == "bzip2":
        return _Streams(file, bz2.BZ2Decompressor, b"").read
    return _Streams(file, lzma.LZMADecompressor, b"\0").read  # an .xz may be padded between its streams


class _Streams:
    """Decompress .bz2 and .xz files of one stream or several.

    Python's own readers take whatever follows the first stream for its end if it is damaged, and the rest of the file
    is lost without a word.
    """

    def __init__(self, file: io.BufferedReader, new: Callable[[], Any], padding: bytes) -> None:
        self._file, self._new, self._padding = file, new, padding
        self._stream, self._ahead = new(), b""

    def read(self, size: int) -> bytes:
        """Return some bytes, at most `size`; none at the end."""
        while True:
            if self._stream.eof and not self._begin_next():
                return b""
            given = b""
            if self._stream.needs_input:
                given, self._ahead = self._ahead or self._file.read(_BUFFER_BYTES), b""
                if not given:
                    raise EOFError("it is cut short")
            if data := self._stream.decompress(given, size):
                return data

    def _begin_next(self) -> bool:
        self._ahead = self._stream.unused_data.lstrip(self._padding)
        while not self._ahead:
            chunk = self._file.read(_BUFFER_BYTES)
            if not chunk:
                return False
            self._ahead = chunk.lstrip(self._padding)
        self._stream = self._new()
        return True


class _Checked(io.RawIOBase):
    """What a decompressor gives, its complaints in our words."""

    def __init__(self, path: Path, compression: str, read: Callable[[int], bytes]) -> None:
        self._path, self._compression, self._next = path, compression, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._next(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # The disk's fault, not the file's.
            raise RequestError(
                f"{self._path.name} is not a whole {self._compression} file: {error}",
                where=str(self._path),
                fix="copy it again",
            ) from None
        buffer[: len(data)] = data
        return len(data)
