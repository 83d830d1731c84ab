"""Say what a file holds: by its name, whatever the case of its letters, and by its first bytes where these differ."""

from pathlib import Path
from typing import NamedTuple

from halfstep.launcher.errors import RequestError

AUTO, TEXT, JSON_LINES, CSV, TSV, PARQUET = "auto", "text", "jsonl", "csv", "tsv", "parquet"
SFT = "sft"
"""Examples of what to answer, in JSON lines or parquet."""
CHOICES = (AUTO, TEXT, JSON_LINES, CSV, TSV, PARQUET, SFT)

_KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), JSON_LINES),
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    **dict.fromkeys((".txt", ".md", ".py"), TEXT),
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_ARCHIVE = ("is an archive, which is not read", "unpack it and name the folder, or leave it out with a glob")
_TABLE = ("is a table of a kind that is not read", "save it as parquet, JSON lines or CSV, or leave it out with a glob")
_DOCUMENT = ("is a document, not plain text", "extract its text first, or leave it out with a glob")
_PACKED = (
    "is compressed in a way that is not read",
    "compress it as .gz, .zst, .xz or .bz2, or leave it out with a glob",
)
_REFUSED = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx", ".ods"), _TABLE),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub"), _DOCUMENT),
    **dict.fromkeys((".lz4", ".br", ".lzma", ".z"), _PACKED),
}
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "git-LFS", "git lfs pull"),
    (b"/annex/objects/", "git-annex", "git annex get"),
)
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    *((b"BZh%d" % level + block, "bzip2") for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
)
_SKIPPABLE_ZSTD = b"\x2a\x4d\x18"
"""Bytes 1 to 3 of a frame that pzstd puts first."""
_UTF16 = {b"\xff\xfe": "UTF-16LE", b"\xfe\xff": "UTF-16BE"}
_UTF32 = {b"\xff\xfe\x00\x00": "UTF-32LE", b"\x00\x00\xfe\xff": "UTF-32BE"}
HEAD_BYTES = 512
"""What `check_head` and `check_content` have to see; a tar archive says what it is at byte 257."""


class Format(NamedTuple):
    """What a file holds, and what it is compressed with."""

    kind: str
    compression: str | None


def of(path: Path, asked: str = AUTO) -> Format:
    """Return a file's format by its name; `asked` overrides the kind, not the compression.

    Raises RequestError for files of kinds that are known and not read.
    """
    name = path.name.lower()
    inner, compression = _split_compression(name)
    suffix = Path(inner).suffix
    if asked in (AUTO, SFT) and suffix in _REFUSED:
        raise _refusal(path, *_REFUSED[suffix])
    kind = _KINDS.get(suffix, TEXT) if asked in (AUTO, SFT) else asked
    if asked == SFT and kind not in (JSON_LINES, PARQUET):
        raise _refusal(
            path,
            "holds no examples by its name",
            "examples are .jsonl or .parquet: rename it, or leave it out with a glob",
        )
    if kind == PARQUET and compression:
        raise _refusal(path, f"is a parquet file inside {compression}", "decompress it: parquet is compressed itself")
    return Format(kind, compression)


def is_known(name: str) -> bool:
    """Tell whether a name ends as a file's does."""
    inner, compression = _split_compression(name.lower())
    suffix = Path(inner).suffix
    return compression is not None or suffix in _KINDS or suffix in _REFUSED


def _split_compression(name: str) -> tuple[str, str | None]:
    suffix = Path(name).suffix
    compression = _COMPRESSIONS.get(suffix)
    return (name.removesuffix(suffix), compression) if compression else (name, None)


def check_head(path: Path, head: bytes, given: Format) -> None:
    """Refuse a file whose first bytes, as they lie on disk, are not what its name says.

    Raises RequestError for pointers to files that were never fetched, and for a compression that is there and not
    named, or named and not there.
    """
    for start, tool, command in _POINTERS:
        if head.startswith(start):
            raise RequestError(
                f"{path.name} is a {tool} pointer: the file itself was not fetched",
                where=str(path),
                fix=f"run `{command}` in its repository",
            )
    actual = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    if head[1:4] == _SKIPPABLE_ZSTD:
        actual = "zstd"
    if given.compression is None:
        if actual is not None and given.kind != PARQUET:
            suffix = next(suffix for suffix, name in _COMPRESSIONS.items() if name == actual)
            raise _refusal(path, f"is compressed with {actual}, and its name does not say so", f"add {suffix} to it")
    elif not head:
        raise _refusal(path, f"has 0 bytes, and a whole {given.compression} file has more", "copy it again")
    elif actual != given.compression:
        what = f"compressed with {actual}" if actual else "not compressed"
        raise _refusal(path, f"is not a whole {given.compression} file: it is {what}", "name it for what it holds")


def check_content(path: Path, head: bytes, kind: str) -> None:
    """Refuse a file whose first bytes, decompressed, are not the text that is read from it."""
    if kind == PARQUET:
        return
    encoding = next((name for mark, name in {**_UTF32, **_UTF16}.items() if head.startswith(mark)), None)
    if encoding:
        raise _refusal(
            path,
            f"is {encoding}, not UTF-8 text",
            f"convert it (iconv -f {encoding} -t UTF-8), or leave it out with a glob",
        )
    if any(head.startswith(magic) for magic, _ in _MAGIC):
        raise _refusal(path, "is compressed twice", "decompress it once")
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        raise _refusal(path, *_ARCHIVE)
    if head.startswith(b"PAR1"):
        raise _refusal(path, "is a parquet file, and its name does not say so", "end its name in .parquet")
    if b"\0" in head:
        raise binary(path, head.index(b"\0"))


def binary(path: Path, at: int) -> RequestError:
    """Return what to say of a file with a NUL byte, which no text has."""
    return _refusal(
        path,
        f"has a NUL byte at byte {at}: it is binary, or text in UTF-16 or UTF-32",
        "convert it (iconv -f ENCODING -t UTF-8), or leave it out with a glob",
    )


def _refusal(path: Path, what: str, fix: str) -> RequestError:
    return RequestError(f"{path.name} {what}", where=str(path), fix=fix)
