"""The files of a checkpoint: safetensors written in one pass with their hash, read in slices by name.

Every rank writes `rank-00000.safetensors`, fp32 pieces of flattened parameters and optimizer states by the name
`<parameter>/<state>`, and `rank-00000.json`: where each piece begins, and what else only this rank knows. What no
optimizer moves (buffers, frozen parameters) is whole, as `<name>/buffer`, in rank 0's file, and in another rank's
where it has another value there.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from halfstep.launcher.checkpoint import rank_files
from halfstep.launcher.checkpoint.manifest import Damaged, File, Manifest, rank_name
from halfstep.launcher.checkpoint.rank_files import AVERAGE, BUFFER, MASTER, PROBE, PROBE_TOKENS
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import reason as refusal

__all__ = (
    "AVERAGE",
    "BUFFER",
    "MASTER",
    "PROBE",
    "Piece",
    "Shards",
    "damaged",
    "probe_tokens",
    "rank_name",
    "sync",
    "write",
)
_CHUNK = 1 << 22
_TYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "|b1"}
"""safetensors' names of the types that are written, and numpy's."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of elements of one flattened tensor, to be written; `array` is called when its turn comes."""

    key: str
    length: int
    array: Callable[[], np.ndarray]
    dtype: str = "F32"
    """`F32`; for buffers also `F64`, `I64` or `BOOL`."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.length * np.dtype(_TYPES[self.dtype]).itemsize


def write(file: Path, pieces: Iterable[Piece], beat: Callable[[], None]) -> File:
    """Write pieces as safetensors, hashing what is written as it is written; not yet synced.

    The library's own writer wants every tensor in memory at once, and a second pass for the hash.
    """
    table, order, offset = {}, list(pieces), 0
    for piece in order:
        end = offset + piece.bytes
        table[piece.key] = {"dtype": piece.dtype, "shape": [piece.length], "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format wants the data aligned
    with HashingFile(file) as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for piece in order:
            array = np.ascontiguousarray(piece.array(), dtype=_TYPES[piece.dtype])
            assert array.size == piece.length, f"{piece.key} has {array.size} elements, not {piece.length}"
            out.write(array.data.cast("B"))
            beat()
    return out.file


def write_json(file: Path, value: Any) -> File:
    """Write JSON with its hash."""
    with HashingFile(file) as out:
        out.write(json.dumps(value, allow_nan=False).encode())
    return out.file


class HashingFile:
    """A new file that knows the hash of what went into it."""

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._bytes = path, xxhash.xxh3_128(), 0
        self._out = path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, chunk by chunk: what is in the processor's cache is hashed and written at once."""
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._hash.update(chunk)
            while chunk:
                chunk = chunk[self._out.write(chunk) :]
        self._bytes += len(view)

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    @property
    def file(self) -> File:
        """Its entry in the manifest."""
        return File(name=self._path.name, bytes=self._bytes, xxh3=self._hash.hexdigest())


def sync(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(folder: Path, manifest: Manifest, beat: Callable[[], None], part: int = 0, parts: int = 1) -> str | None:
    """Read every file (or one of `parts` shares of them), several at once, and return what is wrong with it.

    That is a hash that does not fit, or, whatever its hash, what no rank could have written.
    """
    # By size, so that all shares are alike: the tensors of one rank are a thousand times its sidecar.
    own = sorted(manifest.files, key=lambda file: (-file.bytes, file.name))[part::parts]
    workers = max(1, min(len(own), len(os.sched_getaffinity(0)) if parts == 1 else 2))
    with ThreadPoolExecutor(workers) as pool:
        for reason in pool.map(lambda file: _damage(folder, file, beat), own):
            if reason:
                return reason
    names = {file.name for file in own}
    try:
        for rank in range(manifest.world_size):
            if f"{rank_name(rank)}.json" in names:
                rank_files.check(folder, manifest, rank)
        if part == 0:
            rank_files.check_whole(folder, manifest)
    except Damaged as damage:
        return str(damage)
    return None


def _damage(folder: Path, file: File, beat: Callable[[], None]) -> str | None:
    digest, left = xxhash.xxh3_128(), file.bytes
    try:
        with foreign.open_regular(folder / file.name) as content:
            while chunk := content.read(min(_CHUNK, left + 1)):
                digest.update(chunk)
                left -= len(chunk)
                if left < 0:
                    return f"{file.name} is longer than what was written"
                beat()
    except OSError as error:
        return f"{file.name} cannot be read: {refusal(error)}"
    return None if digest.hexdigest() == file.xxh3 else f"{file.name} is not what was written: its hash differs"


class Shards:
    """The tensors of a checkpoint, whichever ranks wrote which parts of them.

    Raises Damaged where a file does not hold what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.ranks = [rank_name(rank) for rank in range(manifest.world_size)]
        self._files = {name: rank_files.tensors(folder, name) for name in self.ranks}

    def sidecar(self, rank: int) -> dict[str, Any]:
        """Return what one rank wrote beside its tensors."""
        return rank_files.sidecar(self.folder, self.manifest, rank)

    @cached_property
    def _places(self) -> dict[str, list[tuple[str, int, int]]]:
        """For each parameter: (file, first element, length) of its pieces, in order."""
        places: dict[str, list[tuple[str, int, int]]] = {}
        for rank, name in enumerate(self.ranks):
            for parameter, (start, length) in self.sidecar(rank)["pieces"].items():
                places.setdefault(parameter, []).append((name, start, length))
        return {parameter: sorted(pieces, key=lambda piece: piece[1]) for parameter, pieces in places.items()}

    @cached_property
    def _keys(self) -> dict[str, set[str]]:
        return {name: set(file.keys()) for name, file in self._files.items()}

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""
        return tuple(self.manifest.model["parameters"][parameter])

    def read(self, parameter: str, state: str, start: int = 0, length: int | None = None) -> np.ndarray | None:
        """Return elements of a flattened parameter or of one of its optimizer states, in fp32.

        None where no rank has this state: it was never stepped. Raises Damaged where only a part is there.
        """
        whole = int(np.prod(self.shape(parameter), dtype=np.int64))
        length = whole - start if length is None else length
        out, key, filled = np.empty(length, dtype=np.float32), f"{parameter}/{state}", start
        for name, first, count in self._places.get(parameter, []):
            low, high = max(filled, first), min(start + length, first + count)
            if low != filled or high <= low or key not in self._keys[name]:
                continue
            out[low - start : high - start] = self._files[name].get_slice(key)[low - first : high - first]
            filled = high
        if filled == start and length > 0 and state != MASTER:
            return None
        if filled < start + length:
            raise Damaged(f"{key} is there up to element {filled} of {start + length}")
        return out

    def buffers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return `shape` and `dtype` (torch's name) of every buffer and frozen parameter that was saved."""
        return self.manifest.model.get("buffers", {})

    def buffer(self, name: str, rank: int = 0) -> np.ndarray:
        """Return a whole buffer as a rank had it, flat; raises Damaged where it is missing."""
        key = f"{name}/{BUFFER}"
        file = self.ranks[rank if self.has_own_buffer(name, rank) else 0]
        if key not in self._keys[file]:
            raise Damaged(f"{key} is missing")
        return self._files[file].get_tensor(key)

    def has_own_buffer(self, name: str, rank: int) -> bool:
        """Tell whether a rank wrote a buffer itself: all but rank 0 only where theirs has another value."""
        return f"{name}/{BUFFER}" in self._keys[self.ranks[rank]]

    def probe(self) -> np.ndarray | None:
        """Return the training engine's logits for `probe_tokens`, (tokens, vocabulary) in fp32, as they were saved."""
        file = self._files[self.ranks[0]]
        if PROBE not in self._keys[self.ranks[0]]:
            return None
        return file.get_tensor(PROBE).reshape(min(PROBE_TOKENS, self.manifest.sequence), -1)

    def parameters(self) -> Iterator[str]:
        """Yield the names of the parameters, in the model's order."""
        yield from self.manifest.model["parameters"]


class Averaged(Shards):
    """The tensors of a checkpoint that holds a moving average of the masters, which stands in their place."""

    def read(self, parameter: str, state: str, start: int = 0, length: int | None = None) -> np.ndarray | None:
        """Return elements of the average instead of the master's."""
        return super().read(parameter, AVERAGE if state == MASTER else state, start, length)


def has_average(manifest: Manifest) -> bool:
    """Tell whether a checkpoint holds a moving average of the masters."""
    return AVERAGE in manifest.optimizer["states"]


def stored_type(array: np.ndarray) -> str:
    """Return safetensors' name of an array's type; a KeyError is a type that no checkpoint holds."""
    return {numpy_type[1:]: name for name, numpy_type in _TYPES.items()}[array.dtype.str[1:]]


def probe_tokens(sequence: int, vocabulary: int) -> list[int]:
    """Return the token ids whose logits are saved with a checkpoint, to compare with whatever is made of it."""
    return [(1 + 37 * place) % vocabulary for place in range(min(PROBE_TOKENS, sequence))]
