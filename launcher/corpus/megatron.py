"""Read the index of a Megatron .bin/.idx pair, without torch, and check that it describes its .bin."""

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from halfstep.launcher.errors import RequestError

# Magic, version, dtype code, number of sequences, number of document boundaries; then each sequence's length (int32)
# and byte offset (int64), then the boundaries (int64). Little-endian throughout.
HEADER = struct.Struct("<9sQBQQ")
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
_AGAIN = "copy the pair again, or prepare the data again"
_CHUNK = 2**20
"""Sequences read at a time; an index may be larger than the memory."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What an index says of its tokens."""

    tokens: int
    documents: int
    dtype: type[np.integer]


def read_pair(prefix: str | Path) -> Pair:
    """Return what the pair `prefix`.bin/.idx holds; every sequence is accounted for.

    Raises RequestError when a file is missing, is no regular file or is cut short, and when sequences do not lie one
    behind the other: all tokens are read as one stream, so others than those meant would be trained on.
    """
    idx, bin_file = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with open(idx, "rb", opener=_without_waiting) as file:
            index_bytes = _size(file, idx)
            code, sequences, boundaries = _read_header(file, idx, index_bytes)
            # Before the .bin is looked at: without a plausible index there is nothing to say of it.
            tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in _lengths(file, sequences, idx))
            try:
                with open(bin_file, "rb", opener=_without_waiting) as other:
                    dtype = _settle_dtype(code, tokens, _size(other, bin_file), bin_file)
            except OSError as error:
                raise RequestError(
                    f"the tokens cannot be read: {error.strerror}",
                    where=str(bin_file),
                    fix="the .bin belongs beside its .idx",
                ) from None
            _check_offsets(file, sequences, np.dtype(dtype).itemsize, idx)
            _check_boundaries(file, sequences, boundaries, idx)
    except OSError as error:
        raise RequestError(
            f"the token index cannot be read: {error.strerror}",
            where=str(idx),
            fix="give the path without .bin or .idx",
        ) from None
    return Pair(tokens=tokens, documents=max(0, boundaries - 1), dtype=dtype)


def document_lengths(prefix: str | Path) -> np.ndarray:
    """Return how many tokens each document of a pair has that `read_pair` has accepted; int64."""
    with open(f"{prefix}.idx", "rb") as file:
        *_, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
        file.seek(HEADER.size + 12 * sequences)
        firsts = np.fromfile(file, dtype="<i8", count=boundaries)
    if boundaries < 2:
        return np.empty(0, dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.diff(ends[firsts])


def _without_waiting(path: str, flags: int) -> int:
    """Open without waiting for whoever may never write to a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def _size(file: BinaryIO, path: Path) -> int:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise RequestError(f"{path.name} is no regular file", where=str(path), fix=_AGAIN)
    return status.st_size


def _read_header(file: BinaryIO, path: Path, file_bytes: int) -> tuple[int, int, int]:
    header = file.read(HEADER.size)
    fields = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
    magic, version, code, sequences, boundaries = fields
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise RequestError(f"{path.name} is not a Megatron index of version 1", where=str(path), fix=_AGAIN)
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if file_bytes < expected:
        raise RequestError(
            f"{path.name} has {file_bytes} bytes where its header promises {expected}: it is half-written",
            where=str(path),
            fix=_AGAIN,
        )
    # Multimodal pairs of Megatron-LM end with one more byte a sequence, its mode.
    if file_bytes not in (expected, expected + sequences):
        raise RequestError(
            f"{path.name} has {file_bytes} bytes where its header promises {expected}: its counts are wrong",
            where=str(path),
            fix=_AGAIN,
        )
    return code, sequences, boundaries


def _chunks(file: BinaryIO, start: int, count: int, dtype: str) -> Iterator[np.ndarray]:
    """Yield `count` numbers that begin at byte `start`, some at a time."""
    width = np.dtype(dtype).itemsize
    for first in range(0, count, _CHUNK):
        file.seek(start + first * width)
        wanted = min(_CHUNK, count - first)
        content = file.read(wanted * width)
        if len(content) < wanted * width:
            raise OSError(0, "it became shorter while it was read")
        yield np.frombuffer(content, dtype=dtype)


def _lengths(file: BinaryIO, sequences: int, path: Path) -> Iterator[np.ndarray]:
    for number, lengths in enumerate(_chunks(file, HEADER.size, sequences, "<i4")):
        if lengths.min() < 0:
            at = number * _CHUNK + int(lengths.argmin())
            raise RequestError(
                f"{path.name} gives sequence {at} a length of {lengths.min()} tokens", where=str(path), fix=_AGAIN
            )
        yield lengths


def _settle_dtype(code: int, tokens: int, file_bytes: int, path: Path) -> type[np.integer]:
    for item_bytes, dtype in _DTYPES[code].items():
        if file_bytes == tokens * item_bytes:
            return dtype
    wanted = " or ".join(str(tokens * item_bytes) for item_bytes in _DTYPES[code])
    raise RequestError(
        f"{path.name} has {file_bytes} bytes, its index speaks of {tokens} tokens, which take {wanted}",
        where=str(path),
        fix=_AGAIN,
    )


def _check_offsets(file: BinaryIO, sequences: int, width: int, path: Path) -> None:
    """Check that every sequence begins where the one before it ends."""
    end = 0
    starts = _chunks(file, HEADER.size + 4 * sequences, sequences, "<i8")
    for number, offsets in enumerate(starts):
        file.seek(HEADER.size + 4 * number * _CHUNK)
        lengths = np.frombuffer(file.read(4 * len(offsets)), dtype="<i4").astype(np.int64)
        stops = end + np.cumsum(lengths) * width
        wrong = np.flatnonzero(offsets != np.concatenate([[end], stops[:-1]]))
        if wrong.size:
            at = int(wrong[0])
            raise RequestError(
                f"{path.name} puts sequence {number * _CHUNK + at} at byte {offsets[at]} of the .bin, and the one "
                f"before it ends at byte {end if at == 0 else stops[at - 1]}: sequences have to lie one behind the "
                "other",
                where=str(path),
                fix="write the pair again in the order of its sequences, or tokenise the corpus again",
            )
        end = int(stops[-1])


def _check_boundaries(file: BinaryIO, sequences: int, boundaries: int, path: Path) -> None:
    before = 0
    for ends in _chunks(file, HEADER.size + 12 * sequences, boundaries, "<i8"):
        if ends[0] < before or (np.diff(ends) < 0).any() or ends[-1] > sequences:
            raise RequestError(
                f"{path.name} has document boundaries that are not in order or lie beyond its {sequences} sequences",
                where=str(path),
                fix=_AGAIN,
            )
        before = int(ends[-1])
