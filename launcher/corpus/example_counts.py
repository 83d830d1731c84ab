"""What is counted of a prepared corpus of examples: how long they are, and where in them something is learnt."""

from collections import Counter
from pathlib import Path

import numpy as np

from halfstep.launcher.corpus import megatron
from halfstep.launcher.corpus.corpus_manifest import Split
from halfstep.launcher.corpus.packing import Lengths

_MASK_PART = 1 << 24
"""Tokens whose marks are read at a time."""


def lengths(folder: Path, split: Split) -> Lengths | None:
    """Return how many examples of a split there are of each length, in tokens; None for text."""
    if split.mask is None:
        return None
    different, counts = np.unique(megatron.document_lengths(folder / split.prefix), return_counts=True)
    return tuple(zip(different.tolist(), counts.tolist(), strict=True))


def first_targets(folder: Path, split: Split) -> Lengths | None:
    """Return how many examples have their first target behind so many tokens, of those that have one; None for text.

    The mask is read some examples at a time: it is as long as the tokens are many.
    """
    if split.mask is None:
        return None
    sizes = megatron.document_lengths(folder / split.prefix)
    ends = np.cumsum(sizes, dtype=np.int64)
    mask = np.memmap(folder / f"{split.mask.prefix}.bin", dtype=np.uint8, mode="r")
    firsts_of, begin = Counter[int](), 0
    while begin < len(sizes):
        start = int(ends[begin] - sizes[begin])
        end = max(begin + 1, int(np.searchsorted(ends, start + _MASK_PART, side="right")))
        firsts = ends[begin:end] - sizes[begin:end] - start
        marked = np.flatnonzero(mask[start : int(ends[end - 1])] == 1)
        # The first token of an example never is a target.
        places = np.append(marked, np.iinfo(np.int64).max)[np.searchsorted(marked, firsts + 1)]
        inside = places < firsts + sizes[begin:end]
        firsts_of.update((places - firsts)[inside].tolist())
        begin = end
    return tuple(sorted(firsts_of.items()))
