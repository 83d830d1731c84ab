"""Make a corpus: read the source, train or take a tokenizer, tokenise, hold back validation, publish the folder."""

import contextlib
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data import encode, folder, sources, tokenizer, vocabulary
from launcher.data.progress import Report, reporter
from launcher.data.readers import Piece
from launcher.data.split import validation_tokens
from launcher.errors import RequestError
from launcher.plan.corpus import MANIFEST_FORMAT, MANIFEST_KIND, tokenizer_sha256

MANIFEST = "manifest.json"
_LARGEST_FRACTION = 0.3
_UINT16_VOCABULARY = 2**16
# A hub data set is sampled from its start alone, or it would be fetched twice as a whole.
_HUB_SAMPLE_CHARACTERS = 2**28
_PACKAGES = ("numpy", "deepspeed", "sentencepiece", "tokenizers", "transformers", "datasets")


def prepare(
    source: str,
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    field: str = "text",
    validation: float = 0.01,
    workers: int | None = None,
    seed: int = 0,
    progress: bool | Report = True,
) -> dict[str, Any]:
    """Prepare the corpus folder `out` and return its manifest.

    `source` is what `launcher.data.sources.find` understands. Either SentencePiece is trained with `vocab_size` tokens
    or the Hugging Face `tokenizer` is used. `validation` is the share of the tokens held back. The files depend on the
    source, the tokenizer, `validation` and `seed` only. A folder that holds the same already is left alone.
    Raises RequestError for whatever is wrong with the request, the source or the disk.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    workers = _check(vocab_size, tokenizer, validation, workers)
    found = sources.find(source, field)
    request = {
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "field": field,
        "validation_fraction": validation,
        "fingerprint": found.fingerprint,
        "seed": seed,
    }
    if (there := _already_there(out, request)) is not None:
        if progress is True:
            print(f"{out} holds this corpus already: nothing to do", file=sys.stderr)
        return there
    job = _Job(source=found, request=request, workers=workers)
    try:
        with reporter(progress) as report, folder.appearing(out) as partial:
            manifest = job.run(partial, report)
    except FileExistsError:
        if (there := _already_there(out, request)) is None:
            raise
        return there
    return manifest


def _check(vocab_size: int | None, tokenizer: str | None, validation: float, workers: int | None) -> int:
    """Refuse impossible options; return the number of processes."""
    if vocab_size is None and tokenizer is None:
        raise RequestError(
            "nothing says how to tokenise", where="no --vocab-size, no --tokenizer", fix="--vocab-size 4096"
        )
    if vocab_size is not None and vocab_size < 1:
        raise RequestError(
            f"a vocabulary of {vocab_size} tokens holds nothing", where="--vocab-size", fix="--vocab-size 4096"
        )
    if not 0 < validation <= _LARGEST_FRACTION:
        raise RequestError(
            f"{validation} of the tokens cannot be held back for validation",
            where="--validation-fraction",
            fix=f"a share above 0 and at most {_LARGEST_FRACTION}, such as 0.01",
        )
    if workers is not None and workers < 1:
        raise RequestError(f"{workers} processes do no work", where="--workers", fix="--workers 1")
    return workers or len(os.sched_getaffinity(0))


def _already_there(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest when `out` holds what is asked for, None when there is nothing; refuse anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    where, fix = f"--out {out}", "name another folder with --out, or remove this one yourself"
    try:
        manifest = json.loads((out / MANIFEST).read_text("utf-8"))
        before = manifest["request"]
        different = [key for key in request if before.get(key) != request[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(f"{out} exists and is not a corpus that Halfstep made", where=where, fix=fix) from None
    if different:
        names = {"fingerprint": "the files of the source"}
        changes = [
            names.get(key, f"{key.replace('_', ' ')} {before.get(key)!r}, asked {request[key]!r}") for key in different
        ]
        raise RequestError(f"{out} holds another corpus; different: {'; '.join(changes)}", where=where, fix=fix)
    from launcher.plan.facts import read_data

    read_data(str(out))
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One preparation under way."""

    source: sources.Source
    request: dict[str, Any]
    workers: int

    def run(self, partial: Path, report: Report) -> dict[str, Any]:
        """Fill the folder and return the manifest, which is written last."""
        chosen, known = self._tokenizer(report)
        home = partial / "tokenizer"
        home.mkdir()
        chosen.save(home)
        dtype = np.dtype(np.uint16 if chosen.vocabulary <= _UINT16_VOCABULARY else np.int32)
        tally = sources.Tally()
        stream = partial / "tokens.unsplit"
        read = _reported(sources.pieces(self.source, tally), tally, report, known)
        encoded = encode.encode(read, folder=home, kind=chosen.kind, dtype=dtype, workers=self.workers)
        with contextlib.closing(encoded):  # Ends the worker processes whatever happens.
            lengths, largest = _write_stream(encoded, stream)
        if not lengths:
            raise _no_text(self.source)
        if known is not None and known != tally:
            raise RequestError(
                "the source changed while it was read",
                where=f"--source {self.source.asked}",
                fix="start again when nothing writes to it",
            )
        splits = self._write_splits(partial, stream, dtype, np.frombuffer(lengths, dtype=np.int64), chosen.end_of_text)
        stream.unlink()
        manifest = {
            "format": MANIFEST_FORMAT,
            "kind": MANIFEST_KIND,
            "source": self._describe_source(tally),
            "request": self.request,
            "tokenizer": {
                "kind": chosen.kind,
                "name": self.request["tokenizer"] or f"sentencepiece-bpe-{chosen.vocabulary}",
                "path": home.name,
                "sha256": tokenizer_sha256(home),
                "vocabulary": chosen.vocabulary,
                "end_of_text": chosen.end_of_text,
            },
            "token_dtype": dtype.name,
            "max_token_id": largest,
            "seed": self.request["seed"],
            "splits": splits,
            "versions": {package: version(package) for package in _PACKAGES},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return manifest

    def _tokenizer(self, report: Report) -> tuple[tokenizer.Tokenizer, sources.Tally | None]:
        """Return the tokenizer, and what a first pass over the whole source counted, where there was one."""
        vocab_size, name = self.request["vocab_size"], self.request["tokenizer"]
        if name is not None:
            chosen = tokenizer.HuggingFace.load(name)
            if vocab_size not in (None, chosen.vocabulary):
                raise RequestError(
                    f"the tokenizer has a vocabulary of {chosen.vocabulary}, not {vocab_size}",
                    where=f"--vocab-size {vocab_size} --tokenizer {name}",
                    fix="leave --vocab-size out, or leave --tokenizer out to train SentencePiece",
                )
            return chosen, None
        tally = sources.Tally()
        texts = (piece.text for piece in _reported(sources.pieces(self.source, tally), tally, report, None, "reading"))
        if self.source.kind == sources.HUB:
            texts = _first(texts, _HUB_SAMPLE_CHARACTERS)
        blocks = vocabulary.sample_blocks(texts, self.request["seed"])
        if not blocks:
            raise _no_text(self.source)
        report("training the tokenizer", 0, None)
        return vocabulary.train(blocks, vocab_size), None if self.source.kind == sources.HUB else tally

    def _write_splits(
        self, partial: Path, stream: Path, dtype: np.dtype, lengths: np.ndarray, end_of_text: int
    ) -> dict[str, Any]:
        # Loads torch and DeepSpeed, which the tokenising processes do without.
        from launcher.data.tokens import open_writer

        held = validation_tokens(lengths, self.request["validation_fraction"], self.request["seed"])
        tokens = np.memmap(stream, dtype=dtype, mode="r")
        closing = np.asarray([end_of_text], dtype=dtype)
        stop = 0
        with (
            open_writer(partial / "train", dtype) as train,
            open_writer(partial / "validation", dtype) as validation,
        ):
            for length, tail in zip(lengths.tolist(), held.tolist(), strict=True):
                start, stop = stop, stop + length
                if tail == 0:
                    train.add_document(tokens[start:stop])
                    continue
                if tail < length:
                    # Both parts of a divided document end as documents do.
                    train.add_document(tokens[start : stop - tail], closing)
                validation.add_document(tokens[stop - tail : stop])
        writers = {"train": train, "validation": validation}
        return {
            name: {
                "tokens": writer.tokens,
                "documents": writer.documents,
                "prefix": name,
                "bytes": {ending: (partial / f"{name}.{ending}").stat().st_size for ending in ("bin", "idx")},
            }
            for name, writer in writers.items()
        }

    def _describe_source(self, tally: sources.Tally) -> dict[str, Any]:
        return {
            "asked": self.source.asked,
            "kind": self.source.kind,
            "files": len(self.source.files),
            "documents": tally.documents,
            "text_bytes": tally.text_bytes,
            "empty_documents": tally.empty_documents,
            "undecodable_files": tally.undecodable_files,
            "fingerprint": self.source.fingerprint,
        }


def _write_stream(encoded: Iterable[encode.Encoded], path: Path) -> tuple[array, int]:
    """Write all tokens to one file; return the length of each document in tokens, and the largest token id."""
    lengths, largest, length = array("q"), 0, 0
    with path.open("wb") as file:
        for tokens, piece_lengths in encoded:
            file.write(tokens.data)
            largest = max(largest, int(tokens.max(initial=0)))
            for count, ends_document in piece_lengths:
                length += count
                if ends_document:
                    lengths.append(length)
                    length = 0
    assert length == 0, "the last piece ends its document"
    return lengths, largest


def _reported(
    pieces: Iterator[Piece],
    tally: sources.Tally,
    report: Report,
    known: sources.Tally | None,
    stage: str = "tokenising",
) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        report(stage, tally.text_bytes, known.text_bytes if known else None)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _no_text(source: sources.Source) -> RequestError:
    what = f"{source.files[0].name} is empty" if len(source.files) == 1 else "there is no text in any of its files"
    return RequestError(what, where=f"--source {source.asked}", fix="name a source that holds text")
