"""Read examples as sequences: whole examples beside each other, or one in each, and which of their tokens count."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from halfstep.launcher.corpus import corpus_manifest, megatron, packing
from halfstep.launcher.data.order import permute
from halfstep.launcher.data.tokens import TokenFile

# Tell these uses of the keyed permutation from the order of training.
_EXAMPLES, _SEQUENCES = 0x6578616D706C6573, 0x73657175656E6365


class Rows(NamedTuple):
    """Some sequences; all (rows, sequence + 1)."""

    ids: torch.Tensor
    """int64; 0 behind the last example."""
    starts: torch.Tensor
    """bool: where an example begins, or what stands behind the last one."""
    counted: torch.Tensor
    """bool: which tokens are targets."""


class PackedExamples:
    """A split of examples as sequences, which are numbered in an order keyed by the seed.

    Which examples share a sequence follows from their lengths, the sequence and the seed alone. What is kept of them in
    memory is 16 bytes an example.
    """

    def __init__(
        self, prefix: str, sequence: int, *, pack: bool, too_long: str, seed: int, vocabulary: int | None = None
    ) -> None:
        self._tokens, self._mask = (
            TokenFile(prefix, vocabulary=vocabulary),
            TokenFile(f"{prefix}{corpus_manifest.MASK}"),
        )
        self._sequence, self._seed = sequence, seed
        lengths = megatron.document_lengths(prefix)
        self._begins = np.cumsum(lengths) - lengths
        lengths = np.minimum(lengths, sequence) if too_long == "cut" else lengths
        turn = permute(np.arange(len(lengths)), len(lengths), seed ^ _EXAMPLES)
        turn = turn[(lengths[turn] > 0) & (lengths[turn] <= sequence)]
        self._by_length = turn[np.argsort(lengths[turn], kind="stable")]
        different, firsts, counts = np.unique(lengths[self._by_length], return_index=True, return_counts=True)
        read = tuple(zip(different.tolist(), counts.tolist(), strict=True))
        self._bins = packing.best_fit(read, sequence) if pack else packing.single(read)
        self._ends = np.cumsum([bins.repeats for bins in self._bins])
        # Of each kind of bin and each length in it: where its first example stands in the order of the lengths.
        free = dict(zip(different.tolist(), firsts.tolist(), strict=True))
        self._firsts: list[list[int]] = []
        for bins in self._bins:
            self._firsts.append([free[length] for length, _ in bins.contents])
            for length, number in bins.contents:
                free[length] += number * bins.repeats

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return int(self._ends[-1])

    def examples(self, windows: Sequence[int] | np.ndarray) -> list[list[tuple[int, int]]]:
        """Return the examples of each sequence: of each the place of its first token and how many of its are read."""
        numbers = permute(np.asarray(windows, dtype=np.int64), len(self), self._seed ^ _SEQUENCES)
        kinds = np.searchsorted(self._ends, numbers, side="right")
        return [self._inside(int(kind), int(number)) for kind, number in zip(kinds, numbers, strict=True)]

    def _inside(self, kind: int, number: int) -> list[tuple[int, int]]:
        bins = self._bins[kind]
        place = number - int(self._ends[kind]) + bins.repeats
        return [
            (begin, length)
            for (length, each), first in zip(bins.contents, self._firsts[kind], strict=True)
            for begin in self._begins[self._by_length[first + place * each : first + (place + 1) * each]].tolist()
        ]

    def rows(self, windows: Sequence[int] | np.ndarray) -> Rows:
        """Return sequences. Raises RequestError at a token id outside the vocabulary."""
        shape = (len(windows), self._sequence + 1)
        ids, starts, counted = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
        for row, spans in enumerate(self.examples(windows)):
            place = 0
            for begin, length in spans:
                own = slice(place, place + length)
                ids[row, own] = self._tokens.stretch(begin, begin + length)
                counted[row, own] = self._mask.stretch(begin, begin + length) == 1
                starts[row, place] = True
                place += length
            starts[row, place] = True  # no example is longer than the sequence: one token more is always left
        return Rows(*map(torch.from_numpy, (ids, starts, counted & ~starts)))

    def target_count(self, windows: Sequence[int] | np.ndarray) -> int:
        """Return how many targets sequences have."""
        spans = [span for spans in self.examples(windows) for span in spans]
        return sum(int(np.count_nonzero(self._mask.stretch(begin + 1, begin + length) == 1)) for begin, length in spans)
