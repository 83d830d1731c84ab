"""Tokens on disk: Megatron .bin/.idx pairs, written and read through DeepSpeed's own indexed dataset."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

from halfstep.launcher.corpus import megatron
from halfstep.launcher.data.documents import Documents
from halfstep.launcher.errors import RequestError

_MEGATRON_UINT16 = 8


class TokenFile:
    """All tokens of a .bin/.idx pair as one stream, mapped into memory and cut into windows.

    Raises RequestError when the pair is missing, cut short or not a Megatron pair.
    """

    def __init__(self, prefix: str | Path, *, vocabulary: int | None = None) -> None:
        self.prefix = str(prefix)
        self.vocabulary = vocabulary
        pair = megatron.read_pair(prefix)
        if pair.tokens == 0:
            raise RequestError("there are no tokens in it", where=f"{prefix}.bin", fix="name a corpus that holds text")
        self.documents, self.tokens, self.dtype = pair.documents, pair.tokens, pair.dtype
        self._begin = Documents(self.prefix, pair)
        self._stream = np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r", shape=(self.tokens,))
        self._plain = self._stream.view(np.ndarray)  # the same memory, of which a small part is taken much faster

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.tokens

    def windows(self, sequence: int) -> int:
        """Return how many windows of sequence + 1 tokens there are; neighbours share one token."""
        return max(0, (self.tokens - 1) // sequence)

    def batch(self, indices: Sequence[int] | np.ndarray, sequence: int) -> torch.Tensor:
        """Return windows as token ids, int64, shape (len(indices), sequence + 1).

        Window i is tokens[i * sequence : i * sequence + sequence + 1]. Raises RequestError at a token id outside the
        vocabulary.
        """
        starts = np.asarray(indices, dtype=np.int64) * sequence
        count = self.windows(sequence)
        assert starts.size == 0 or (starts.min() >= 0 and starts.max() < count * sequence), (
            f"windows are numbered below {count}"
        )
        ids = self._stream[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)
        if self.vocabulary is not None:
            self._check_vocabulary(ids, starts, self.vocabulary)
        return torch.from_numpy(ids)

    def document_starts(self, indices: Sequence[int] | np.ndarray, sequence: int) -> torch.Tensor:
        """Tell of each token of `batch` whether a document begins with it; bool, shape (len(indices), sequence + 1)."""
        firsts = np.asarray(indices, dtype=np.int64) * sequence
        return torch.from_numpy(self._begin.begin(firsts, sequence + 1))

    def stretch(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from one position up to another, as they are stored; checked as those of `batch` are."""
        ids = self._plain[start:stop]
        if self.vocabulary is not None:
            self._check_vocabulary(ids.astype(np.int64)[None], np.array([start]), self.vocabulary)
        return ids

    def slice(self, start: int, stop: int) -> list[int]:
        """Return the token ids from one position up to another."""
        return self._stream[start:stop].tolist()

    def _check_vocabulary(self, ids: np.ndarray, starts: np.ndarray, vocabulary: int) -> None:
        # As unsigned numbers negative ids are enormous: one maximum finds both kinds.
        if ids.size == 0 or ids.view(np.uint64).max() < vocabulary:
            return
        row, column = np.argwhere(ids.view(np.uint64) >= vocabulary)[0]
        raise RequestError(
            f"token id {ids[row, column]} at position {starts[row] + column} is outside the vocabulary of {vocabulary}",
            where=f"{self.prefix}.bin",
            fix="train a model with at least the vocabulary of the tokenizer that made these tokens",
        )


class TokenWriter:
    """Write documents into a new .bin/.idx pair; made by `open_writer`."""

    # A longer document becomes several items: the builder copies an item in memory before it writes it, and the index
    # holds sizes as int32 (indexed_dataset.py, `add_item_numpy`, `_Writer.write`).
    _ITEM_TOKENS = 2**24

    def __init__(self, builder: MMapIndexedDatasetBuilder) -> None:
        self._builder = builder
        self._hash = xxhash.xxh3_128()
        self.tokens = self.documents = 0

    def add_document(self, *parts: np.ndarray) -> None:
        """Append one document, whose tokens come in one or more parts."""
        for part in parts:
            for start in range(0, len(part), self._ITEM_TOKENS):
                item = part[start : start + self._ITEM_TOKENS]
                self._builder.add_item_numpy(item)
                assert item.dtype == self._builder._dtype, "what is hashed is what is written"
                self._hash.update(item.data)
            self.tokens += len(part)
        self._builder.end_document()
        self.documents += 1

    @property
    def xxh3(self) -> str:
        """The hash of all tokens so far, as they lie in the .bin."""
        return self._hash.hexdigest()


def _write_code(index: Path, code: int) -> None:
    """Overwrite the dtype code: DeepSpeed's builder writes uint16 as 6, which Megatron-LM reads as floats."""
    with index.open("r+b") as file:
        file.seek(megatron.HEADER.size - 17)  # the code, one byte, stands before two 64-bit counts
        file.write(bytes([code]))


@contextlib.contextmanager
def open_writer(prefix: Path, dtype: np.dtype) -> Iterator[TokenWriter]:
    """Open a pair for writing; the index appears when the block ends well."""
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    try:
        yield TokenWriter(builder)
        builder.finalize(f"{prefix}.idx")
        if dtype == np.uint16:
            _write_code(Path(f"{prefix}.idx"), _MEGATRON_UINT16)
    except BaseException:
        # The builder has no way to close without an index; a full disk makes even the closing fail.
        with contextlib.suppress(OSError):
            builder._data_file.close()
        raise
