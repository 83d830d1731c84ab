"""Write the tokens of a corpus: one stream as they come, then a pair of files for each split, with their hashes."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.launcher.corpus import file_hash
from halfstep.launcher.data import encode
from halfstep.launcher.data.split import validation_tokens


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


def write_stream(encoded: Iterable[encode.Encoded], file: Path) -> Stream:
    """Write all tokens to one file."""
    lengths, largest, unknown, length = array("q"), 0, 0, 0
    with file.open("wb") as out:
        for batch in encoded:
            out.write(batch.tokens.data)
            largest = max(largest, int(batch.tokens.max(initial=0)))
            unknown += batch.unknown
            for count, ends_document in batch.lengths:
                length += count
                if ends_document:
                    lengths.append(length)
                    length = 0
    assert length == 0, "the last piece ends its document"
    return Stream(file=file, lengths=np.asarray(lengths, dtype=np.int64), largest=largest, unknown=unknown)


def write_splits(
    folder: Path, stream: Stream, dtype: np.dtype, end_of_text: int, *, fraction: float, seed: int
) -> dict[str, Any]:
    """Divide a stream into a pair of files for training and one for validation; return what the manifest says of them.

    `fraction` is the share of the tokens held back.
    """
    # Loads torch and DeepSpeed, which the tokenising processes do without.
    from halfstep.launcher.data.tokens import open_writer

    held = validation_tokens(stream.lengths, fraction, seed)
    tokens = np.memmap(stream.file, dtype=dtype, mode="r")
    closing = np.asarray([end_of_text], dtype=dtype)
    stop = 0
    with open_writer(folder / "train", dtype) as train, open_writer(folder / "validation", dtype) as validation:
        for length, tail in zip(stream.lengths.tolist(), held.tolist(), strict=True):
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
        files = {ending: folder / f"{name}.{ending}" for ending in ("bin", "idx")}
        splits[name] = {
            "tokens": writer.tokens,
            "documents": writer.documents,
            "prefix": name,
            "bytes": {ending: file.stat().st_size for ending, file in files.items()},
            # Tokens were hashed on their way to the disk: `inspect` finds out if it kept others.
            "xxh3": {"bin": writer.xxh3, "idx": file_hash.whole(files["idx"])},
            "xxh3_sampled": {ending: file_hash.sampled(file) for ending, file in files.items()},
        }
    return splits
