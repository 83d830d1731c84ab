"""Tokens on disk: Megatron .bin/.idx pairs, written and read through DeepSpeed's own indexed dataset."""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import (
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
)

from launcher.errors import RequestError

# Magic, version, dtype code, number of items, number of document boundaries; then sizes, byte offsets, boundaries.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"

# What a dtype code means by how many bytes a token takes. Codes above 5 depend on who wrote the file: 6 is uint16 in
# DeepSpeed (indexed_dataset.py, `dtypes`) and a float in Megatron-LM and GPT-NeoX, 8 is uint64 in DeepSpeed and uint16
# there. No corpus holds floats, so the size of a token on disk settles it; it never leaves two readings.
_DTYPES: dict[int, dict[int, type[np.integer]]] = {
    1: {1: np.uint8},
    2: {1: np.int8},
    3: {2: np.int16},
    4: {4: np.int32},
    5: {8: np.int64},
    6: {2: np.uint16},
    7: {4: np.uint32},
    8: {2: np.uint16, 8: np.uint64},
}


_MEGATRON_UINT16 = 8


class TokenFile:
    """All tokens of a .bin/.idx pair as one stream, mapped into memory and cut into windows.

    Raises RequestError when the pair is missing, cut short or not a Megatron pair.
    """

    def __init__(self, prefix: str | Path, *, vocabulary: int | None = None) -> None:
        self.prefix = str(prefix)
        self.vocabulary = vocabulary
        sizes = _read_sizes(Path(f"{prefix}.idx"))
        self.documents = sizes.documents
        self.tokens = sizes.tokens
        self.dtype = _settle_dtype(sizes, Path(f"{prefix}.bin"))
        self._stream = np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r", shape=(self.tokens,))

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


class _Sizes:
    """What an index says."""

    def __init__(self, code: int, tokens: int, documents: int) -> None:
        self.code, self.tokens, self.documents = code, tokens, documents


def _read_sizes(path: Path) -> _Sizes:
    # The header is checked first: DeepSpeed's reader asserts, and its __del__ fails again when it could not open.
    again = "copy the pair again, or prepare the data again"
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        file_bytes = path.stat().st_size
    except OSError as error:
        raise RequestError(
            f"the token index cannot be read: {error.strerror}",
            where=str(path),
            fix="give the path without .bin or .idx",
        ) from None
    fields = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
    magic, version, code, items, boundaries = fields
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise RequestError(f"{path.name} is not a Megatron index of version 1", where=str(path), fix=again)
    expected = _HEADER.size + 12 * items + 8 * boundaries
    if file_bytes < expected:
        raise RequestError(
            f"{path.name} has {file_bytes} bytes where its header promises {expected}: it is half-written",
            where=str(path),
            fix=again,
        )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        index = MMapIndexedDataset.Index(str(path), skip_warmup=True)
    tokens = int(index.sizes.sum(dtype=np.int64))
    # Its __del__ closes the map, which Python refuses while views of it live.
    index._sizes = index._pointers = index._doc_idx = index._bin_buffer = None
    return _Sizes(code, tokens, max(0, boundaries - 1))


def _settle_dtype(sizes: _Sizes, path: Path) -> type[np.integer]:
    try:
        file_bytes = path.stat().st_size
    except OSError as error:
        raise RequestError(
            f"the tokens cannot be read: {error.strerror}", where=str(path), fix="the .bin belongs beside its .idx"
        ) from None
    if sizes.tokens == 0:
        raise RequestError("there are no tokens in it", where=str(path), fix="name a corpus that holds text")
    for item_bytes, dtype in _DTYPES[sizes.code].items():
        if file_bytes == sizes.tokens * item_bytes:
            return dtype
    wanted = " or ".join(str(sizes.tokens * item_bytes) for item_bytes in _DTYPES[sizes.code])
    raise RequestError(
        f"{path.name} has {file_bytes} bytes, its index speaks of {sizes.tokens} tokens, which take {wanted}",
        where=str(path),
        fix="copy the pair again, or prepare the data again",
    )


class TokenWriter:
    """Write documents into a new .bin/.idx pair; made by `open_writer`."""

    # A longer document becomes several items: the builder copies an item in memory before it writes it, and the index
    # holds sizes as int32 (indexed_dataset.py, `add_item_numpy`, `_Writer.write`).
    _ITEM_TOKENS = 2**24

    def __init__(self, builder: MMapIndexedDatasetBuilder) -> None:
        self._builder = builder
        self.tokens = self.documents = 0

    def add_document(self, *parts: np.ndarray) -> None:
        """Append one document, whose tokens come in one or more parts."""
        for part in parts:
            for start in range(0, len(part), self._ITEM_TOKENS):
                self._builder.add_item_numpy(part[start : start + self._ITEM_TOKENS])
            self.tokens += len(part)
        self._builder.end_document()
        self.documents += 1


def _write_code(index: Path, code: int) -> None:
    """Overwrite the dtype code: DeepSpeed's builder writes uint16 as 6, which Megatron-LM reads as floats."""
    with index.open("r+b") as file:
        file.seek(_HEADER.size - 17)  # the code, one byte, stands before two 64-bit counts
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
