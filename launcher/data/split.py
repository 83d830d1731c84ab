"""Which tokens are held back for validation: a share of the tokens, spread over the corpus, whole documents first."""

import numpy as np

from halfstep.launcher.data.order import permute

# A document is small, and goes to one side as a whole, up to this share of the validation split.
_SMALL_SHARE = 1 / 16
# Tells this use of the keyed permutation from the order of training.
_KEY = 0x76616C69646174


def validation_tokens(lengths: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return how many tokens at the end of each document are held back, int64, same shape as `lengths` (tokens).

    The target is fraction x all tokens. Small documents (up to a sixteenth of the target) give their share as whole
    documents; what is missing then comes from the tails of the larger ones, each giving a sixteenth of the target or
    its own share, whichever is more, and never more than half of itself. Documents take their turn in an order keyed by
    the seed, so that no folder or end of the corpus is preferred. `fraction` is above 0 and at most 0.3; the result is
    never above the target, and below it by a sixteenth at most (by nothing where large documents can make it up).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    total = int(lengths.sum())
    target = max(1, round(fraction * total))
    turn = permute(np.arange(len(lengths)), len(lengths), seed ^ _KEY)
    held = np.zeros(len(lengths), dtype=np.int64)

    small = lengths <= target * _SMALL_SHARE
    small_target = target if small.all() else round(fraction * int(lengths[small].sum()))
    small_turn = turn[small[turn]]
    taken = small_turn[np.cumsum(lengths[small_turn]) <= small_target]
    held[taken] = lengths[taken]

    large_turn = turn[~small[turn]]
    share = np.maximum(np.ceil(lengths[large_turn] * fraction), np.ceil(target * _SMALL_SHARE)).astype(np.int64)
    share = np.minimum(share, lengths[large_turn] // 2)
    missing = target - int(held.sum())
    before = np.cumsum(share) - share
    held[large_turn] = np.clip(missing - before, 0, share)
    return held


def validation_documents(lengths: np.ndarray, candidates: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return how many tokens of each document are held back where none is divided: all or none; int64, as `lengths`.

    `candidates`, bool, are those that may be: one of them at least is held back and one is not, where there are two.
    They take their turn in an order keyed by the seed until the share is full.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    held = np.zeros(len(lengths), dtype=np.int64)
    turn = permute(np.arange(len(lengths)), len(lengths), seed ^ _KEY)
    turn = turn[candidates[turn]][:-1]
    count = int(np.searchsorted(np.cumsum(lengths[turn]), max(1, round(fraction * int(lengths.sum()))), side="right"))
    taken = turn[: max(1, count)]
    held[taken] = lengths[taken]
    return held
