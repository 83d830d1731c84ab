"""Corpora that are made by hand, without torch."""

import struct
from pathlib import Path


def write_pair(prefix: Path, tokens: int) -> None:
    """Write a Megatron pair of one document whose token ids are 0, 1, 2, ... below 100, without torch."""
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack("<H", n % 100) for n in range(tokens)))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 1, 2)
    prefix.with_suffix(".idx").write_bytes(header + struct.pack("<iqqq", tokens, 0, 0, 1))
