"""Write the tokens of a corpus: one stream as they come, then a pair of files for each split, with their hashes."""

import contextlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.launcher.corpus import corpus_manifest, file_hash
from halfstep.launcher.data import encode
from halfstep.launcher.data.split import validation_documents, validation_tokens


@dataclass(frozen=True, kw_only=True)
class Stream:
    """All tokens, in the order of the source."""

    file: Path
    lengths: np.ndarray
    """Tokens of each document, its end included."""
    largest: int
    """The largest token id."""
    unknown: int
    """Tokens that stand for text that the tokenizer does not know."""
    targets: np.ndarray | None = None
    """Of examples: how many tokens of each are targets."""

    @property
    def marks(self) -> Path:
        """The file that tells of each token whether it is a target, a byte each."""
        return self.file.with_name(f"{self.file.name}{corpus_manifest.MASK}")

    def examples(self, layout: encode.Layout) -> dict[str, Any]:
        """Return what the manifest says of examples."""
        assert self.targets is not None, "examples have targets"
        return {
            "template": layout.template,
            "targets": layout.targets,
            "without_targets": int((self.targets == 0).sum()),
            "longest": int(self.lengths.max()),
        }


def write_stream(encoded: Iterable[encode.Encoded], file: Path) -> Stream:
    """Write all tokens to one file, and the marks of examples to another."""
    lengths, largest, unknown, length = array("q"), 0, 0, 0
    targets: array[int] | None = None
    marks_file = Path(f"{file}{corpus_manifest.MASK}")
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(file.open("wb"))
        marks_out = None
        for batch in encoded:
            out.write(batch.tokens.data)
            largest = max(largest, int(batch.tokens.max(initial=0)))
            unknown += batch.unknown
            place = 0
            if batch.marks is not None:
                marks_out = marks_out or stack.enter_context(marks_file.open("wb"))
                marks_out.write(batch.marks.data)
                targets = array("q") if targets is None else targets
            for count, ends_document in batch.lengths:
                length += count
                if ends_document:
                    lengths.append(length)
                    length = 0
                if batch.marks is not None and targets is not None:
                    targets.append(int(batch.marks[place : place + count].sum()))
                    place += count
    assert length == 0, "the last piece ends its document"
    return Stream(
        file=file,
        lengths=np.asarray(lengths, dtype=np.int64),
        largest=largest,
        unknown=unknown,
        targets=None if targets is None else np.asarray(targets, dtype=np.int64),
    )


def write_splits(
    folder: Path, stream: Stream, dtype: np.dtype, end_of_text: int, *, fraction: float, seed: int
) -> dict[str, Any]:
    """Divide a stream into a pair of files for training and one for validation; return what the manifest says of them.

    `fraction` is the share of the tokens held back. Examples are never divided, and each split of them has a second
    pair of the same shape, of 1 for each target and 0.
    """
    if stream.targets is None:
        held = validation_tokens(stream.lengths, fraction, seed)
        return _write(folder, "", stream.file, stream.lengths, held, dtype, end_of_text)
    held = validation_documents(stream.lengths, stream.targets > 0, fraction, seed)
    splits = _write(folder, "", stream.file, stream.lengths, held, dtype, end_of_text)
    masks = _write(folder, corpus_manifest.MASK, stream.marks, stream.lengths, held, np.dtype(np.uint8), 0)
    for name, inside in (("train", held == 0), ("validation", held > 0)):
        mask = {key: masks[name][key] for key in ("prefix", "bytes", "xxh3", "xxh3_sampled")}
        splits[name] |= {"targets": int(stream.targets[inside].sum()), "mask": mask}
    return splits


def _write(
    folder: Path, ending: str, file: Path, lengths: np.ndarray, held: np.ndarray, dtype: np.dtype, end_of_text: int
) -> dict[str, Any]:
    """Write a stream of tokens, or of what is said of each; `held` are how many at the end of each document are held
    back. Return what the manifest says of each split.
    """
    # Loads torch and DeepSpeed, which the tokenising processes do without.
    from halfstep.launcher.data.tokens import open_writer

    names = {name: f"{name}{ending}" for name in ("train", "validation")}
    tokens = np.memmap(file, dtype=dtype, mode="r")
    closing = np.asarray([end_of_text], dtype=dtype)
    stop = 0
    with (
        open_writer(folder / names["train"], dtype) as train,
        open_writer(folder / names["validation"], dtype) as validation,
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
    splits = {}
    for name, writer in (("train", train), ("validation", validation)):
        files = {part: folder / f"{names[name]}.{part}" for part in ("bin", "idx")}
        splits[name] = {
            "tokens": writer.tokens,
            "documents": writer.documents,
            "prefix": names[name],
            "bytes": {part: file.stat().st_size for part, file in files.items()},
            # Tokens were hashed on their way to the disk: `inspect` finds out if it kept others.
            "xxh3": {"bin": writer.xxh3, "idx": file_hash.whole(files["idx"])},
            "xxh3_sampled": {part: file_hash.sampled(file) for part, file in files.items()},
        }
    return splits
