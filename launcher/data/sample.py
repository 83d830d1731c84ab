"""Keep a bounded sample of a stream of text, from all over it: the same every time, in one pass."""

from collections.abc import Iterator
from hashlib import blake2b


class Sample:
    """Blocks of the texts that were added, together at most `limit` characters: all of them, as long as they are few.

    Each block draws a hash from the seed and its number; when the sample grows beyond the limit, the half with the
    larger hashes goes and so does that half of all that comes after. One pass, bounded memory, no chance involved.
    """

    def __init__(self, seed: int, limit: int, block: int) -> None:
        self._seed, self._limit, self._block = seed, limit, block
        self._kept: list[tuple[int, str]] = []
        self._ceiling, self._number = 2**64, 0
        self.characters = 0

    def add(self, text: str) -> None:
        """Offer a text, which is cut into blocks after line breaks where there are some."""
        for block in _blocks(text, self._block):
            draw = int.from_bytes(blake2b(f"{self._seed}:{self._number}".encode(), digest_size=8).digest(), "big")
            self._number += 1
            if draw >= self._ceiling:
                continue
            self._kept.append((draw, block))
            self.characters += len(block)
            while self.characters > self._limit:
                self._ceiling //= 2
                self._kept = [(drawn, kept) for drawn, kept in self._kept if drawn < self._ceiling]
                self.characters = sum(len(kept) for _, kept in self._kept)

    @property
    def blocks(self) -> list[str]:
        """What was kept, in the order of the stream."""
        return [block for _, block in self._kept]


def _blocks(text: str, size: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
