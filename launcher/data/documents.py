"""Where the documents of a token file begin, by binary search in its index: nothing else of it is read."""

import numpy as np

from halfstep.launcher.corpus import megatron


class Documents:
    """The beginnings of all documents of a Megatron .bin/.idx pair that `megatron.read_pair` has accepted.

    Empty documents begin where the next one does; what no document claims behind the last one is one of its own.
    """

    def __init__(self, prefix: str, pair: megatron.Pair) -> None:
        index = f"{prefix}.idx"
        with open(index, "rb") as file:
            _, _, _, self._sequences, count = megatron.HEADER.unpack(file.read(megatron.HEADER.size))
        self._tokens, self._width = pair.tokens, np.dtype(pair.dtype).itemsize
        # Lengths (int32), byte offsets, then the first sequence of each document (corpus/megatron.py).
        offsets = megatron.HEADER.size + 4 * self._sequences
        self._offsets = np.memmap(index, dtype="<i8", mode="r", offset=offsets, shape=(self._sequences,))
        after = offsets + 8 * self._sequences
        # A file of no bytes more cannot be mapped.
        self._firsts = (
            np.memmap(index, dtype="<i8", mode="r", offset=after, shape=(count,)) if count else np.empty(0, np.int64)
        )

    def begin(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Tell of each token of some stretches whether a document begins with it; bool, shape (len(firsts), length).

        `firsts` are the positions, int64, at which the stretches of `length` tokens begin. It takes O(log documents)
        reads for each, and one for each document that begins there.
        """
        low, high = self._count(firsts), self._count(firsts + length)
        many = high - low
        rows = np.repeat(np.arange(len(firsts)), many)
        # The documents low..high of each stretch, one stretch behind the other.
        numbers = np.arange(many.sum()) + np.repeat(low - (np.cumsum(many) - many), many)
        begun = np.zeros((len(firsts), length), dtype=bool)
        begun[rows, self._start(numbers) - firsts[rows]] = True
        return begun

    def _start(self, numbers: np.ndarray) -> np.ndarray:
        """Return the position of the first token of documents."""
        sequences = np.asarray(self._firsts[numbers])
        offsets = self._offsets[np.minimum(sequences, self._sequences - 1)]
        return np.where(sequences < self._sequences, offsets // self._width, self._tokens)

    def _count(self, positions: np.ndarray) -> np.ndarray:
        """Return how many documents begin before each position; all are searched for at once."""
        low = np.zeros(len(positions), dtype=np.int64)
        high = np.full(len(positions), len(self._firsts), dtype=np.int64)
        for _ in range(len(self._firsts).bit_length()):
            middle = (low + high) // 2
            open_ = low < high  # a search that is over may stand behind the last document
            before = np.zeros(len(positions), dtype=bool)
            before[open_] = self._start(middle[open_]) < positions[open_]
            low, high = np.where(before, middle + 1, low), np.where(open_ & ~before, middle, high)
        return low
