"""Make a corpus: read the source, train or take a tokenizer, tokenise, hold back validation, publish the folder."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.launcher.corpus import corpus_manifest as manifests
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.corpus.vocabulary import tokenizer_sha256
from halfstep.launcher.data import (
    chat,
    encode,
    fidelity,
    formats,
    prepare_options,
    publish,
    sources,
    tokenizer,
    train_tokenizer,
    write_corpus,
)
from halfstep.launcher.data.progress_bar import Report, reporter
from halfstep.launcher.data.readers import Piece
from halfstep.launcher.errors import RequestError

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
    format: str = formats.AUTO,
    template: str | None = None,
    targets: str | None = None,
    skip_bad: bool = False,
    allow_lossy: bool = False,
    validation: float = 0.01,
    workers: int | None = None,
    seed: int = 0,
    progress: bool | Report = True,
) -> dict[str, Any]:
    """Prepare the corpus folder `out` and return its manifest.

    `source` is what `data.sources.find` understands. Either SentencePiece is trained with `vocab_size` tokens
    or `tokenizer` is used, which `data.tokenizer.named` understands. `format` says what all files hold where
    their names do not; `formats.SFT`: examples, laid out by `template` (`data.chat.named`), whose targets are `all`
    turns of the assistant or the `last`. With `skip_bad` rows that hold no text or example are counted and left out;
    with `allow_lossy` a tokenizer may lose any share of the text. `validation` is the share of the tokens held back.
    The files depend on the source, the tokenizer, these options and `seed` only. A folder that holds the same already
    is left alone.
    Raises RequestError for whatever is wrong with the request, the source or the disk.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    workers = prepare_options.check(vocab_size, tokenizer, validation, workers)
    prepare_options.check_layout(format, template, targets, vocab_size, field)
    readable = sources.find(source, field, format=format, skip_bad=skip_bad)
    chosen = {
        "format": format != formats.AUTO and format,
        "template": template,
        "targets": targets,
        "skip_bad": skip_bad,
        "allow_lossy": allow_lossy,
    }
    request = {
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "field": field,
        "validation_fraction": validation,
        "fingerprint": readable.fingerprint,
        "seed": seed,
        # Only what was asked for: so a corpus that was made before there were these options is recognised.
        **{key: value for key, value in chosen.items() if value},
    }
    if (there := _already_there(out, request)) is not None:
        if progress is True:
            print(f"{out} holds this corpus already: nothing to do", file=sys.stderr)
        return there
    job = _Job(source=readable, request=request, workers=workers)
    try:
        with reporter(progress) as report, publish.appearing(out) as partial:
            manifest = job.run(partial, report)
    except FileExistsError:
        if (there := _already_there(out, request)) is None:
            raise
        return there
    return manifest


def _already_there(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest when `out` holds what is asked for, None when there is nothing; refuse anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    request = _storable(request)
    where, fix = f"--out {out}", "name another folder with --out, or remove this one yourself"
    try:
        _, manifest = manifests.read(out)
        before = manifest["request"]
        different = [key for key in {**request, **before} if before.get(key) != request.get(key)]
    except (OSError, KeyError, TypeError, AttributeError):
        raise RequestError(f"{out} exists and is not a corpus that Halfstep made", where=where, fix=fix) from None
    except RequestError as error:
        raise RequestError(f"{out} holds something else: {error.what}", where=where, fix=fix) from None
    if different:
        names = {"fingerprint": "the files of the source"}
        changes = [
            names.get(key, f"{key.replace('_', ' ')} {before.get(key)!r}, asked {request.get(key)!r}")
            for key in different
        ]
        raise RequestError(f"{out} holds another corpus; different: {'; '.join(changes)}", where=where, fix=fix)
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
        seed, named = self.request["seed"], self.request["tokenizer"]
        watch = fidelity.Watch(chosen, seed=seed, name=named or "", allowed=self.request.get("allow_lossy", False))
        read = watch.over(_reported(sources.pieces(self.source, tally), tally, report, known))
        layout, untaken = self._layout(chosen), sources.Tally()
        encoded = encode.encode(read, folder=home, kind=chosen.kind, dtype=dtype, workers=self.workers, layout=layout)
        with contextlib.closing(encoded):  # Ends the worker processes whatever happens.
            stream = write_corpus.write_stream(self._taken(encoded, untaken), partial / "tokens.unsplit")
        if not stream.lengths.size:
            raise _no_text(self.source, untaken if untaken.bad_rows else tally)
        if stream.targets is not None and not stream.targets.any():
            raise RequestError(
                f"none of the {len(stream.targets):,} examples has a target: the assistant says nothing in them",
                where=f"--source {self.source.asked}",
                fix="name conversations with messages of the role assistant, or rows with a completion",
            )
        if known is not None and known != tally:
            raise RequestError(
                "the source changed while it was read",
                where=f"--source {self.source.asked}",
                fix="start again when nothing writes to it",
            )
        came_back = watch.result()
        fraction = self.request["validation_fraction"]
        splits = write_corpus.write_splits(partial, stream, dtype, chosen.end_of_text, fraction=fraction, seed=seed)
        stream.file.unlink()
        stream.marks.unlink(missing_ok=True)
        manifest = {
            "format": manifests.FORMAT,
            "kind": manifests.KIND,
            "source": self._describe_source(tally, untaken),
            "request": self.request,
            "tokenizer": {
                "kind": chosen.kind,
                "name": named or f"sentencepiece-bpe-{chosen.vocabulary}",
                "path": home.name,
                "sha256": tokenizer_sha256(home),
                "vocabulary": chosen.vocabulary,
                "end_of_text": chosen.end_of_text,
            },
            **({} if layout is None else {"examples": stream.examples(layout)}),
            "token_dtype": dtype.name,
            "max_token_id": stream.largest,
            "fidelity": {**came_back.to_dict(), "unknown_tokens": stream.unknown},
            "seed": seed,
            "splits": splits,
            "versions": {package: version(package) for package in _PACKAGES},
        }
        manifest = _storable(manifest)
        manifest["checksum"] = manifests.checksum(manifest)
        (partial / manifests.NAME).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return manifest

    def _layout(self, chosen: tokenizer.Tokenizer) -> encode.Layout | None:
        """Return how examples become tokens; None where the source holds text."""
        if self.source.format != formats.SFT:
            return None
        template = chat.named(self.request.get("template"), chosen)
        return encode.Layout(template.name, self.request.get("targets") or chat.ALL)

    def _taken(self, encoded: Iterator[encode.Encoded], untaken: sources.Tally) -> Iterator[encode.Encoded]:
        """Yield what is encoded; raises what is wrong with an example that the template refuses, or counts it."""
        for batch in encoded:
            for error in batch.refused:
                if not self.source.skip_bad:
                    raise error
                untaken.skip(error)
            yield batch

    def _tokenizer(self, report: Report) -> tuple[tokenizer.Tokenizer, sources.Tally | None]:
        """Return the tokenizer, and what a first pass over the whole source counted, where there was one."""
        vocab_size, name = self.request["vocab_size"], self.request["tokenizer"]
        if name is not None:
            chosen = tokenizer.named(name)
            if vocab_size not in (None, chosen.vocabulary):
                raise RequestError(
                    f"the tokenizer has a vocabulary of {chosen.vocabulary}, not {vocab_size}",
                    where=f"--vocab-size {vocab_size} --tokenizer {name}",
                    fix="leave --vocab-size out, or leave --tokenizer out to train SentencePiece",
                )
            return chosen, None
        tally = sources.Tally()
        texts = (
            self._text(piece) for piece in _reported(sources.pieces(self.source, tally), tally, report, None, "reading")
        )
        if self.source.kind == sources.HUB:
            texts = _first(texts, _HUB_SAMPLE_CHARACTERS)
        blocks = train_tokenizer.sample_blocks(texts, self.request["seed"])
        if not blocks:
            raise _no_text(self.source, tally)
        report("training the tokenizer", 0, None)
        return train_tokenizer.train(blocks, vocab_size), None if self.source.kind == sources.HUB else tally

    def _text(self, piece: Piece) -> str:
        """Return what a tokenizer is to be trained on: of an example also what its template writes around it."""
        if piece.example is None:
            return piece.text
        return chat.written(self.request.get("template") or chat.PLAIN, piece.example.messages)

    def _describe_source(self, tally: sources.Tally, untaken: sources.Tally) -> dict[str, Any]:
        return {
            "asked": self.source.asked,
            "kind": self.source.kind,
            "files": len(self.source.files),
            "documents": tally.documents - untaken.bad_rows,
            "text_bytes": tally.text_bytes,
            "empty_documents": tally.empty_documents,
            "duplicates": tally.duplicates,
            "undecodable_files": tally.undecodable_files,
            "bad_rows": {
                "count": tally.bad_rows + untaken.bad_rows,
                "examples": (tally.bad_examples + untaken.bad_examples)[: sources.EXAMPLES],
            },
            "left_out": self.source.left_out.to_dict(),
            "fingerprint": self.source.fingerprint,
        }


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


def _storable(content: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON keeps of a tree: names of files may be no UTF-8."""
    return json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))


def _no_text(source: sources.Source, tally: sources.Tally) -> RequestError:
    if tally.bad_rows:
        return RequestError(
            f"all {tally.bad_rows:,} rows were left out as bad, the first: {tally.bad_examples[0]}",
            where=f"--source {source.asked} --skip-bad",
            fix=tally.bad_advice,
        )
    what = f"{source.files[0].name} is empty" if len(source.files) == 1 else "there is no text in any of its files"
    return RequestError(what, where=f"--source {source.asked}", fix="name a source that holds text")
