"""Find out what --source names: the standard library, files, or a hub data set, and read it as a stream of pieces."""

import glob
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from launcher.data import readers
from launcher.data.readers import Piece
from launcher.errors import RequestError

STDLIB, FILES, HUB = "stdlib", "files", "hub"
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HUB_PLAIN = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_PREFIXED = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that exists."""

    asked: str
    kind: str
    """stdlib, files or hub."""
    field: str
    """The JSON, parquet or hub field that holds the text."""
    files: tuple[Path, ...] = ()
    """Sorted; each is one document or a table of them."""
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
    undecodable_files: list[str] = field(default_factory=list)
    """Files of the standard library that Python itself cannot decode, which are left out."""


def find(asked: str, text_field: str = "text") -> Source:
    """Return the source that a word names: `stdlib`, a file, a folder, a glob, `hub:owner/name` or owner/name.

    Raises RequestError when there is nothing.
    """
    if asked == STDLIB:
        return _of_files(asked, STDLIB, text_field, _stdlib_files())
    path = Path(asked).expanduser()
    if path.is_file():
        return _of_files(asked, FILES, text_field, [path])
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        return _of_files(asked, FILES, text_field, files)
    if glob.has_magic(asked):
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        return _of_files(asked, FILES, text_field, files)
    if asked.startswith("hub:") or (_HUB_PLAIN.fullmatch(asked) and path.suffix not in readers.KNOWN_SUFFIXES):
        return Source(asked=asked, kind=HUB, field=text_field, fingerprint=sha256(asked.encode()).hexdigest())
    raise RequestError(
        f"there is no file or folder {asked!r}",
        where=f"--source {asked}",
        fix="name text, JSON lines or parquet files, a folder, a quoted glob, hub:OWNER/NAME, or stdlib",
    )


def pieces(source: Source, tally: Tally) -> Iterator[Piece]:
    """Yield the documents of a source in their order, long ones in several pieces; `tally` counts as they pass."""
    if source.kind == HUB:
        yield from _counted(readers.hub_pieces(*_hub_name(source.asked), source.field), tally)
        return
    for file in source.files:
        if source.kind == STDLIB:
            text = readers.python_source(file)
            if text is None:
                tally.undecodable_files.append(file.name)
                continue
            yield from _counted(readers.cut(text), tally)
        else:
            yield from _counted(readers.file_pieces(file, source.field), tally)


def _counted(stream: Iterator[Piece], tally: Tally) -> Iterator[Piece]:
    within = False
    for piece in stream:
        if not within and piece.ends_document and not piece.text.strip():
            tally.empty_documents += 1
            continue
        within = not piece.ends_document
        tally.documents += piece.ends_document
        tally.text_bytes += len(piece.text.encode())
        yield piece


def _of_files(asked: str, kind: str, text_field: str, files: list[Path]) -> Source:
    if not files:
        raise RequestError("there are no files in it", where=f"--source {asked}", fix="name files that hold text")
    ordered = sorted(files, key=lambda file: file.as_posix())
    top = ordered[0].parent if len(ordered) == 1 else _common_folder(ordered)
    sizes = [file.stat().st_size for file in ordered]
    names = [file.relative_to(top).as_posix() for file in ordered]
    listing = "".join(f"{name}\0{size}\n" for name, size in zip(names, sizes, strict=True))
    return Source(
        asked=asked,
        kind=kind,
        field=text_field,
        files=tuple(ordered),
        fingerprint=sha256(listing.encode(errors="surrogateescape")).hexdigest(),
        size_bytes=sum(sizes),
    )


def _common_folder(files: list[Path]) -> Path:
    top = files[0].parent
    while not all(file.is_relative_to(top) for file in files):
        top = top.parent
    return top


def _stdlib_files() -> list[Path]:
    top = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in top.rglob("*.py") if not _NOT_STDLIB & set(file.relative_to(top).parts)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


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
