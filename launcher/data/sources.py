"""Find out what --source names: the standard library, files, or a hub data set, and read it as a stream of pieces."""

import dataclasses
import functools
import glob
import re
import sysconfig
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import xxhash

from halfstep.launcher.data import formats, readers, walk
from halfstep.launcher.data.readers import Piece
from halfstep.launcher.data.walk import LeftOut
from halfstep.launcher.errors import RequestError

STDLIB, FILES, HUB = "stdlib", "files", "hub"
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HUB_PLAIN = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_PREFIXED = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]:%+-]+))?")
EXAMPLES = 5
"""How many bad rows are shown."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that exists."""

    asked: str
    kind: str
    """stdlib, files or hub."""
    field: str
    """The JSON, CSV, parquet or hub field that holds the text."""
    format: str = formats.AUTO
    """What all files hold, one of `formats.CHOICES`; auto: what their names say."""
    skip_bad: bool = False
    """Whether rows that hold no text are left out and counted."""
    files: tuple[Path, ...] = ()
    """Sorted; each is one document or a table of them."""
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    """What lies in the source's folders and is not read."""
    fingerprint: str
    """Identifies the content: names below the common folder and sizes, or the hub id."""
    size_bytes: int | None = None
    """Of all files, as they lie on disk."""


@dataclass(kw_only=True)
class Tally:
    """What a pass over a source came across."""

    documents: int = 0
    text_bytes: int = 0
    """As UTF-8."""
    empty_documents: int = 0
    """Documents of nothing but whitespace, which are left out."""
    hashes: "array[int]" = dataclasses.field(default_factory=functools.partial(array, "Q"))
    """Of each document's content: eight bytes, of which two in 10^8 documents are seldom the same by chance."""
    undecodable_files: list[str] = dataclasses.field(default_factory=list)
    """Files of the standard library that Python itself cannot decode, which are left out."""
    bad_rows: int = 0
    """Rows that hold no text, which are left out where the request says so."""
    bad_examples: list[str] = dataclasses.field(default_factory=list)
    """What is wrong with the first of them."""
    bad_advice: str = ""
    """What would have been a way out for the first of them."""

    @property
    def duplicates(self) -> int:
        """How many documents have the content of an earlier one."""
        return len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, dtype=np.uint64))) if self.hashes else 0

    def skip(self, error: RequestError) -> None:
        """Count a row that is left out."""
        self.bad_rows += 1
        if len(self.bad_examples) < EXAMPLES:
            self.bad_examples.append(f"{error.where}: {error.what}")
            self.bad_advice = self.bad_advice or error.fix


def find(asked: str, text_field: str = "text", *, format: str = formats.AUTO, skip_bad: bool = False) -> Source:
    """Return the source that a word names: `stdlib`, a file, a folder, a glob, `hub:owner/name` or owner/name.

    Raises RequestError when there is nothing, or something that cannot be read.
    """
    try:
        return _find(asked, text_field, format, skip_bad)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"{asked[:100]} cannot be read: {reason}", where=f"--source {asked[:100]}", fix="check the path"
        ) from None


def _find(asked: str, text_field: str, format: str, skip_bad: bool) -> Source:
    if format not in formats.CHOICES:
        raise RequestError(
            f"there is no format {format!r}", where=f"--format {format}", fix=f"one of {', '.join(formats.CHOICES)}"
        )
    if asked == STDLIB and format == formats.SFT:
        raise RequestError(
            "the standard library is text, and no examples of what to answer",
            where=f"--source {asked} --format {format}",
            fix="name JSON lines or parquet with prompt and completion, or messages",
        )
    left_out = LeftOut()
    path = Path(asked).expanduser()
    if asked == STDLIB:
        kind, files = STDLIB, stdlib_files()
    elif path.is_file():
        kind, files = FILES, walk.once([path], path.parent, left_out)
    elif path.is_dir():
        kind, files = FILES, walk.files_below(path, left_out)
    elif path.exists():
        raise RequestError(
            f"{asked} is a pipe or a device, and a source is read more than once",
            where=f"--source {asked}",
            fix="write it to a file first and name that",
        )
    elif glob.has_magic(asked):
        names = (Path(name) for name in glob.glob(str(path), recursive=True))
        kind, files = FILES, walk.once(names, Path.cwd(), left_out)
    elif asked.startswith("hub:") or (_HUB_PLAIN.fullmatch(asked) and not formats.is_known(asked)):
        return Source(
            asked=asked,
            kind=HUB,
            field=text_field,
            format=format,
            skip_bad=skip_bad,
            fingerprint=sha256(asked.encode()).hexdigest(),
        )
    else:
        raise RequestError(
            f"there is no file or folder {asked!r}",
            where=f"--source {asked}",
            fix="name text, JSON lines, CSV or parquet files, a folder, a quoted glob, hub:OWNER/NAME, or stdlib",
        )
    return _of_files(asked, kind, text_field, files, left_out, format=format, skip_bad=skip_bad)


def _of_files(
    asked: str, kind: str, text_field: str, files: list[Path], left_out: LeftOut, *, format: str, skip_bad: bool
) -> Source:
    if not files:
        passed = ", ".join(f"{len(names)} {what}" for what, names in left_out.names.items())
        raise RequestError(
            "there are no files in it" + (f" but {passed}" if passed else ""),
            where=f"--source {asked}",
            fix="name files that hold text",
        )
    if kind == FILES:
        for file in files:
            formats.of(file, format)  # a kind that is not read is refused before hours of work
    top = files[0].parent if len(files) == 1 else _common_folder(files)
    sizes = [file.stat().st_size for file in files]
    names = [file.relative_to(top).as_posix() for file in files]
    listing = "".join(f"{name}\0{size}\n" for name, size in zip(names, sizes, strict=True))
    return Source(
        asked=asked,
        kind=kind,
        field=text_field,
        format=format,
        skip_bad=skip_bad,
        files=tuple(files),
        left_out=left_out,
        fingerprint=sha256(listing.encode(errors="surrogateescape")).hexdigest(),
        size_bytes=sum(sizes),
    )


def pieces(source: Source, tally: Tally) -> Iterator[Piece]:
    """Yield the documents of a source in their order, long ones in several pieces; `tally` counts as they pass."""
    skip = tally.skip if source.skip_bad else None
    if source.kind == HUB:
        yield from _counted(
            readers.hub_pieces(*_hub_name(source.asked), source.field, kind=source.format, skip=skip), tally
        )
        return
    for file in source.files:
        if source.kind == STDLIB:
            text = readers.python_source(file)
            if text is None:
                tally.undecodable_files.append(file.name)
                continue
            yield from _counted(readers.cut(text), tally)
        else:
            yield from _counted(readers.file_pieces(file, source.field, kind=source.format, skip=skip), tally)


def _counted(stream: Iterator[Piece], tally: Tally) -> Iterator[Piece]:
    within = False
    content = xxhash.xxh3_64()
    for piece in stream:
        if not within and piece.ends_document and not piece.text.strip():
            tally.empty_documents += 1
            continue
        within = not piece.ends_document
        encoded = piece.text.encode()
        content.update(encoded if piece.example is None else repr(piece.example.messages).encode())
        tally.text_bytes += len(encoded)
        if piece.ends_document:
            tally.documents += 1
            tally.hashes.append(content.intdigest())
            content.reset()
        yield piece


def _common_folder(files: list[Path]) -> Path:
    top = files[0].parent
    while not all(file.is_relative_to(top) for file in files):
        top = top.parent
    return top


def stdlib_files() -> list[Path]:
    """Return the files of Python's standard library, without its tests, in the order of their paths."""
    top = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in top.rglob("*.py") if not _NOT_STDLIB & set(file.relative_to(top).parts)]
    return sorted(files, key=lambda file: file.as_posix())


def _hub_name(asked: str) -> tuple[str, str | None, str]:
    """Return name, configuration and split of `hub:owner/name[/config][:split]` or plain owner/name."""
    match = _HUB_PREFIXED.fullmatch(asked if asked.startswith("hub:") else f"hub:{asked}")
    if match is None:
        raise RequestError(
            "this is not the name of a hub data set",
            where=f"--source {asked}",
            fix="hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or hub:OWNER/NAME:SPLIT",
        )
    return match["name"], match["config"], match["split"] or "train"
