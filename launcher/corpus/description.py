"""Read what a corpus says of itself, and check it: the manifest of a prepared folder, or a bare Megatron pair."""

import glob
import hashlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.config.digest import digest
from halfstep.launcher.corpus import corpus_manifest, example_counts, file_hash, megatron
from halfstep.launcher.corpus.corpus_manifest import AGAIN, Manifest, Mask, Split
from halfstep.launcher.corpus.packing import Lengths
from halfstep.launcher.corpus.vocabulary import TokenizerFacts, table_digest, tokenizer_sha256
from halfstep.launcher.errors import RequestError

_NOT_READ = ("left_out", "bad_rows", "duplicates")
"""Of the source in a manifest: what was passed over, and what is only counted."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the corpus says of itself."""

    path: str
    train_prefix: str
    """The .bin/.idx pair without its endings."""
    validation_prefix: str | None
    train_tokens: int
    validation_tokens: int
    train_documents: int | None = None
    """Documents that its index knows, examples among them; None for a mixture."""
    vocabulary: int | None
    """Of its tokenizer: token ids are below this; None where the corpus does not say."""
    max_token_id: int | None = None
    """The largest id that it holds; None where it does not say."""
    train_lengths: Lengths | None = None
    """Of a corpus of examples: how long they are; None for text, whose documents are read as one stream."""
    validation_lengths: Lengths | None = None
    """The same of the validation split."""
    train_first_targets: Lengths | None = None
    """Of the training examples that have a target: how many tokens stand before the first."""
    tokenizer: TokenizerFacts = field(default_factory=TokenizerFacts)
    has_tokenizer: bool
    """Whether the corpus says how it was tokenised."""
    digest: str
    """Identifies the content by what its manifest or index says, wherever the folder lies."""
    tokens_digest: str | None = None
    """Identifies the tokens themselves, by the sample of `halfstep.launcher.corpus.file_hash`."""
    parts: tuple["Part", ...] = ()
    """Of a mixture, what it is made of; then `path` is the mixture as text, and there are no prefixes of its own."""

    @property
    def has_examples(self) -> bool:
        """Whether it is a corpus of examples, or one part of it is."""
        return self.train_lengths is not None or any(part.corpus.has_examples for part in self.parts)

    @property
    def vocabulary_digest(self) -> str | None:
        """What identifies the token table of the corpus's tokenizer."""
        return self.tokenizer.vocabulary_digest


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus of a mixture."""

    corpus: DataFacts
    weight: float
    """Its share of the sequences, 0 to 1."""


def read_data(path: str) -> DataFacts:
    """Read a prepared folder's manifest, or the index of a bare Megatron .bin/.idx pair, and check the files by it.

    Sizes, counts and indexes are checked whole, tokens by a sample (all of them up to 64 MiB); `verify_tokens` reads
    the rest. Raises RequestError for what is missing, damaged or contradicts itself.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            if (folder / corpus_manifest.NAME).exists():
                return _of_folder(folder)
            raise _unfinished(folder, path)
        if Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file():
            return _of_pair(path)
        raise _missing(folder, path)
    except OSError as error:
        named = error.filename if error.filename is not None else path
        raise RequestError(
            f"the corpus cannot be read: {error.strerror or error}",
            where=str(named)[:300],
            fix="check the path and permissions",
        ) from None


def verify_tokens(path: str) -> bool:
    """Read all of a prepared folder's tokens and compare them with the manifest; False where it has no hashes.

    Raises RequestError naming the file that is not what was written.
    """
    folder = Path(path)
    about, _ = corpus_manifest.read(folder)
    for split in _splits(about):
        for pair in filter(None, (split, split.mask)):
            if pair.xxh3 is None:
                return False
            for file, expected in zip(_files(folder, pair), (pair.xxh3.bin, pair.xxh3.idx), strict=True):
                if file_hash.whole(file) != expected:
                    raise _changed(file)
    return True


def _unfinished(folder: Path, path: str) -> RequestError:
    prefixes = sorted(str(index.with_suffix("")) for index in folder.glob("*.idx"))
    return RequestError(
        f"{folder} holds no manifest.json, so it was not finished or not made by `halfstep data prepare`",
        where=f"data={path}",
        fix="prepare it again into a new folder"
        + (f", or name one Megatron pair of it: data={prefixes[0]}" if prefixes else ""),
    )


def _missing(folder: Path, path: str) -> RequestError:
    name = glob.escape(folder.name)
    partial = sorted(folder.parent.glob(f"{name}.partial*")) + sorted(folder.parent.glob(f".{name}.partial*"))
    if partial:
        return RequestError(
            f"{folder} was never finished: only the unfinished {partial[0].name} is there",
            where=f"data={path}",
            fix="run `halfstep data prepare` again and let it end",
        )
    if folder.suffix in (".bin", ".idx") and folder.exists():
        return RequestError(
            f"{folder.name} is one file of a Megatron pair, and data names both",
            where=f"data={path}",
            fix=f"leave its ending out: data={folder.with_suffix('')}",
        )
    halves = [half for half in (Path(f"{path}.idx"), Path(f"{path}.bin")) if half.is_file()]
    if halves:
        return RequestError(
            f"of a Megatron pair only {halves[0].name} is there",
            where=f"data={path}",
            fix="copy the other file beside it",
        )
    if folder.is_file():
        name = folder.name.partition(".")[0] or "text"
        making = ["halfstep", "data", "prepare", "--source", str(folder), "--out", f"data/{name}", "--vocab-size"]
        inside = (folder.parent / corpus_manifest.NAME).is_file()
        return RequestError(
            f"{folder.name} is a file{' of a prepared corpus' if inside else ', not a prepared corpus'}",
            where=f"data={path}",
            fix=f"name its folder: data={folder.parent}" if inside else f"prepare it: {shlex.join(making)} 4096",
        )
    if "," in path and all(Path(part.strip()).exists() for part in path.split(",")):
        return RequestError(
            "several corpora have no weights to mix them by",
            where=f"data={path}",
            fix=f"data={','.join(f'{part.strip()}:1' for part in path.split(','))} reads as much of each",
        )
    return RequestError(
        f"there is no data at {folder}",
        where=f"data={path}",
        fix=f"make it: halfstep data prepare --source stdlib --out {folder} --vocab-size 4096",
    )


def _of_folder(folder: Path) -> DataFacts:
    about, content = corpus_manifest.read(folder)
    tokens_digests = [_check_pair(folder, split, split, about.token_dtype) for split in _splits(about)]
    tokens_digests += [_check_pair(folder, split, split.mask, "uint8") for split in _splits(about) if split.mask]
    home = folder / about.tokenizer.path
    sha256 = tokenizer_sha256(home)
    if sha256 != about.tokenizer.sha256:
        raise RequestError(
            "the tokens were made with another tokenizer than the one in the folder: "
            f"its hash is {sha256[:12]}, the manifest says {about.tokenizer.sha256[:12]}",
            where=str(home),
            fix=f"put the right tokenizer back, or {AGAIN}",
        )
    train, validation = _splits(about)
    return DataFacts(
        path=str(folder),
        train_prefix=str(folder / train.prefix),
        validation_prefix=str(folder / validation.prefix) if validation.tokens else None,
        train_tokens=train.tokens,
        train_documents=train.documents,
        validation_tokens=validation.tokens,
        vocabulary=about.tokenizer.vocabulary,
        max_token_id=about.max_token_id,
        train_lengths=example_counts.lengths(folder, train),
        validation_lengths=example_counts.lengths(folder, validation),
        train_first_targets=example_counts.first_targets(folder, train),
        tokenizer=TokenizerFacts(sha256=sha256, vocabulary_digest=table_digest(home)),
        has_tokenizer=True,
        digest=_digest(about, content),
        tokens_digest=digest(tokens_digests),
    )


def _digest(about: Manifest, content: dict[str, Any]) -> str:
    """Identify a prepared corpus.

    The moment and the machine of the preparation do not make another corpus, nor does what was passed over. Of what
    stands in the manifest, not of what the schema makes of it: a corpus of an earlier version keeps its digest, and its
    runs resume.
    """
    source = {key: value for key, value in content["source"].items() if key not in _NOT_READ}
    return digest([content["splits"], about.tokenizer.sha256, about.token_dtype, source, content.get("seed")])


def _splits(about: Manifest) -> tuple[Split, Split]:
    return about.splits.train, about.splits.validation


def _files(folder: Path, pair: Split | Mask) -> tuple[Path, Path]:
    return folder / f"{pair.prefix}.bin", folder / f"{pair.prefix}.idx"


def _check_pair(folder: Path, split: Split, stored: Split | Mask, expected_dtype: str) -> list[str]:
    """Compare a pair, of a split's tokens or of its mask, with what the manifest says; return hashes of a sample."""
    files = _files(folder, stored)
    for file, size in zip(files, (stored.bytes.bin, stored.bytes.idx), strict=True):
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes"
            raise RequestError(
                f"{file.name} {state}, the manifest says {size} bytes: the folder is half-written or damaged",
                where=str(folder / corpus_manifest.NAME),
                fix=f"copy the folder again, or {AGAIN}",
            )
    pair = megatron.read_pair(folder / stored.prefix)
    dtype = pair.dtype.__name__ if pair.tokens else expected_dtype
    if (pair.tokens, pair.documents, dtype) != (split.tokens, split.documents, expected_dtype):
        raise RequestError(
            f"{files[1].name} speaks of {pair.tokens} tokens of type {dtype} in {pair.documents} documents, "
            f"the manifest of {split.tokens} of type {expected_dtype} in {split.documents}",
            where=str(folder / corpus_manifest.NAME),
            fix=f"copy the folder again, or {AGAIN}",
        )
    sampled = [file_hash.sampled(file) for file in files]
    if stored.xxh3_sampled is not None:
        expected_hashes = (stored.xxh3_sampled.bin, stored.xxh3_sampled.idx)
        for file, actual, expected in zip(files, sampled, expected_hashes, strict=True):
            if actual != expected:
                raise _changed(file)
    return sampled


def _changed(file: Path) -> RequestError:
    return RequestError(
        f"{file.name} does not hold what was prepared: its hash is not the one in the manifest",
        where=str(file),
        fix=f"copy the folder again, or {AGAIN}",
    )


def _of_pair(path: str) -> DataFacts:
    pair = megatron.read_pair(path)
    idx, bin_file = Path(f"{path}.idx"), Path(f"{path}.bin")
    if Path(f"{path}{corpus_manifest.MASK}.idx").is_file():
        raise RequestError(
            "a pair of examples is no stream of text: which of its tokens are targets is said by the mask beside it",
            where=f"data={path}",
            fix=f"name the prepared folder: data={idx.parent}",
        )
    if pair.tokens == 0:
        raise RequestError("there are no tokens in it", where=str(bin_file), fix="name a corpus that holds text")
    with idx.open("rb") as content:
        index = hashlib.file_digest(content, "sha256").hexdigest()
    return DataFacts(
        path=path,
        train_prefix=path,
        validation_prefix=None,
        train_tokens=pair.tokens,
        train_documents=pair.documents,
        validation_tokens=0,
        vocabulary=None,
        has_tokenizer=False,
        digest=digest([index, bin_file.stat().st_size]),
        tokens_digest=digest([[file_hash.sampled(bin_file), file_hash.sampled(idx)]]),
    )
