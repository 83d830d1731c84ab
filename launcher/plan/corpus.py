"""Read what a corpus says of itself: the manifest of a prepared folder, or the index of a bare Megatron pair."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RequestError
from launcher.spec.digest import digest

MANIFEST_KIND = "halfstep-data"
MANIFEST_FORMAT = 1

# Megatron .idx: magic, version 1, a type code, the number of sequences and of document ends; then each sequence's
# length (int32) and byte offset (int64). Little-endian throughout.
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the corpus says of itself."""

    path: str
    train_prefix: str
    """The .bin/.idx pair without its endings."""
    validation_prefix: str | None
    train_tokens: int
    validation_tokens: int
    vocabulary: int | None
    """Token ids are below this; None where the corpus does not say."""
    vocabulary_digest: str | None
    """Identifies the vocabulary of a Hugging Face tokenizer; None for SentencePiece and bare pairs."""
    has_tokenizer: bool
    """Whether the corpus says how it was tokenised."""
    digest: str
    """Identifies the content, wherever the folder lies."""


def read_data(path: str) -> DataFacts:
    """Read a prepared folder's manifest, or the header of a bare Megatron .bin/.idx pair, and check the sizes."""
    folder = Path(path)
    if folder.is_dir():
        manifest = folder / "manifest.json"
        if manifest.is_file():
            return _read_manifest(folder, manifest)
        prefixes = sorted(str(found.with_suffix("")) for found in folder.glob("*.idx"))
        raise RequestError(
            f"{folder} holds no manifest.json, so it was not finished or not made by `halfstep data prepare`",
            where=f"data={path}",
            fix="prepare it again into a new folder"
            + (f", or name one Megatron pair of it: data={prefixes[0]}" if prefixes else ""),
        )
    if Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file():
        tokens, file_digest = _read_index(Path(f"{path}.idx"), Path(f"{path}.bin"))
        return DataFacts(
            path=path,
            train_prefix=path,
            validation_prefix=None,
            train_tokens=tokens,
            validation_tokens=0,
            vocabulary=None,
            vocabulary_digest=None,
            has_tokenizer=False,
            digest=file_digest,
        )
    partial = sorted(folder.parent.glob(f"{folder.name}.partial*")) + sorted(
        folder.parent.glob(f".{folder.name}.partial*")
    )
    if partial:
        raise RequestError(
            f"{folder} was never finished: only the unfinished {partial[0].name} is there",
            where=f"data={path}",
            fix="run `halfstep data prepare` again and let it end",
        )
    raise RequestError(
        f"there is no data at {folder}",
        where=f"data={path}",
        fix=f"make it: halfstep data prepare --source stdlib --out {folder} --vocab-size 4096",
    )


def _read_manifest(folder: Path, manifest: Path) -> DataFacts:
    where = str(manifest)
    again = "prepare the data again into a new folder"
    try:
        content = json.loads(manifest.read_text("utf-8"))
        if (content["kind"], content["format"]) != (MANIFEST_KIND, MANIFEST_FORMAT):
            raise RequestError(
                f"the manifest is of kind {content['kind']!r} and format {content['format']!r}, "
                f"not {MANIFEST_KIND!r} and {MANIFEST_FORMAT}",
                where=where,
                fix=again,
            )
        splits, tokenizer = content["splits"], content["tokenizer"]
        for split in splits.values():
            for ending, size in split["bytes"].items():
                _check_size(folder / f"{split['prefix']}.{ending}", size, where)
        found = tokenizer_sha256(folder / tokenizer["path"])
        if found != tokenizer["sha256"]:
            raise RequestError(
                "the tokens were made with another tokenizer than the one in the folder: "
                f"its hash is {found[:12]}, the manifest says {tokenizer['sha256'][:12]}",
                where=str(folder / tokenizer["path"]),
                fix=f"put the right tokenizer back, or {again}",
            )
        train, validation = splits["train"], splits["validation"]
        return DataFacts(
            path=str(folder),
            train_prefix=str(folder / train["prefix"]),
            validation_prefix=str(folder / validation["prefix"]) if validation["tokens"] else None,
            train_tokens=train["tokens"],
            validation_tokens=validation["tokens"],
            vocabulary=tokenizer["vocabulary"],
            vocabulary_digest=vocabulary_digest(folder / tokenizer["path"] / "tokenizer.json"),
            has_tokenizer=True,
            # The moment and the machine of the preparation do not make another corpus.
            digest=digest(
                [splits, tokenizer["sha256"], content["token_dtype"], content["source"], content.get("seed")]
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"the manifest is damaged: {type(error).__name__} {error}", where=where, fix=again) from None
    except OSError as error:
        raise RequestError(
            f"cannot be read: {error.strerror}", where=str(error.filename), fix="check permissions"
        ) from None


def _check_size(file: Path, size: int, where: str) -> None:
    actual = file.stat().st_size if file.is_file() else None
    if actual != size:
        found = "is missing" if actual is None else f"has {actual} bytes"
        raise RequestError(
            f"{file.name} {found}, the manifest says {size} bytes: the folder is half-written or damaged",
            where=where,
            fix="copy the folder again, or prepare the data again into a new folder",
        )


def _read_index(idx: Path, bin_file: Path) -> tuple[int, str]:
    """Return the number of tokens of a Megatron pair and a digest of its index.

    The width of a token follows from the last sequence's offset and length, not from the type code: code 8 is uint16 in
    Megatron and GPT-NeoX and uint64 in DeepSpeed, which writes uint16 as 6.
    """
    content = idx.read_bytes()
    size = bin_file.stat().st_size
    try:
        magic, version, _, sequences, _ = _IDX_HEADER.unpack_from(content)
        (length,) = struct.unpack_from("<i", content, _IDX_HEADER.size + 4 * (sequences - 1))
        (offset,) = struct.unpack_from("<q", content, _IDX_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        width = (size - offset) // length
        if (magic, version) != (_IDX_MAGIC, 1) or width not in (1, 2, 4, 8) or offset + length * width != size:
            raise ValueError("its lengths do not add up to the size of the .bin file")
    except (struct.error, ValueError, ZeroDivisionError) as error:
        raise RequestError(
            f"{idx.name} is not the index of {bin_file.name}: {error}",
            where=str(idx),
            fix="copy both files again, or tokenise the corpus again",
        ) from None
    return size // width, digest([hashlib.sha256(content).hexdigest(), size])


def tokenizer_sha256(folder: Path) -> str:
    """Return one hash over a tokenizer's files: their names and contents, in the order of the names."""
    hasher = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        hasher.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return hasher.hexdigest()


def vocabulary_digest(tokenizer_json: Path) -> str | None:
    """Hash the token table alone: a tokenizer.json that was saved again differs in layout, not in tokens."""
    if not tokenizer_json.is_file():
        return None
    return digest(json.loads(tokenizer_json.read_text("utf-8"))["model"]["vocab"])
