"""Hash files of any size: whole, or so much of them that a change hardly goes unnoticed and a start need not wait.

A sample is all of a file up to 64 MiB. Of a larger one it is 256 blocks of 64 KiB: the first, the last, and one at a
keyed place in each of 254 equal stretches between. So a file of other tokens is always noticed, and so is any
stretch longer than two of those (0.8 % of the file); a change of a share f of all blocks, scattered, is missed with a
chance of (1 - f) ** 254: 8 % for one block in a hundred.
"""

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import xxhash

# These decide hashes that stand in manifests and plans: changing one makes every large corpus look like another.
WHOLE_BYTES = 64 * 2**20
BLOCK_BYTES = 64 * 2**10
BLOCKS = 256
_CHUNK_BYTES = 2**20


def whole(file: Path) -> str:
    """Return the XXH3 hash (128 bits, hex) of all of a file."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def sampled(file: Path) -> str:
    """Return the XXH3 hash (128 bits, hex) of a sample of a file, which for a small file is all of it."""
    size = file.stat().st_size
    if size <= WHOLE_BYTES:
        return whole(file)
    hasher = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with file.open("rb", buffering=0) as content:
        for start in _starts(size):
            hasher.update(os.pread(content.fileno(), BLOCK_BYTES, start))
    return hasher.hexdigest()


def _starts(size: int) -> Iterator[int]:
    """Yield where the blocks of a sample begin, in bytes; the size is the key."""
    yield 0
    first, last = BLOCK_BYTES, size - 2 * BLOCK_BYTES
    for number in range(BLOCKS - 2):
        low = first + (last - first) * number // (BLOCKS - 2)
        high = first + (last - first) * (number + 1) // (BLOCKS - 2)
        draw = int.from_bytes(blake2b(f"{size}:{number}".encode(), digest_size=8).digest(), "big")
        yield low + draw % max(1, high - low)
    yield size - BLOCK_BYTES
