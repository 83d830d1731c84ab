"""Which windows a step reads, of a corpus or a mixture: a pure function of seed and step, in constant memory."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Values below decide the order of every run ever made: changing one breaks every resume (golden values in the tests).
_HALF_ROUNDS = 12
_SMALLEST_DOMAIN_BITS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def windows_of_step(seed: int, step: int, global_batch: int, num_windows: int) -> np.ndarray:
    """Return the windows of one optimizer step, int64, shape (global_batch,).

    Steps count from 1. Sequence j of step s is number g = (s - 1) * global_batch + j of the whole run; it belongs to
    epoch g // num_windows, in which every window comes up exactly once, in an order of that epoch's own. A step may
    lie across the border of two epochs. World size plays no part: ranks deal this one list among themselves.
    """
    assert step >= 1, f"steps count from 1, not {step}"
    assert global_batch >= 1, f"a global batch has sequences, not {global_batch}"
    assert num_windows >= 1, f"a corpus has windows, not {num_windows}"
    first = (step - 1) * global_batch
    epoch, position = divmod(first + np.arange(global_batch, dtype=np.int64), num_windows)
    return permute(position, num_windows, seed, epoch)


def draws_of_step(
    seed: int, step: int, global_batch: int, weights: Sequence[float], num_windows: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of a mixture that a step reads of, and the window of each; two int64 arrays (global_batch,).

    `weights` and `num_windows` have an entry for each part. Sequence g of the whole run, as in `windows_of_step`, is
    draw k of one part, by the weights alone (`_draw`); that part is walked through as a corpus by itself would be:
    draw k belongs to its epoch k // num_windows, in an order of that part's and that epoch's own.
    """
    assert step >= 1, f"steps count from 1, not {step}"
    assert global_batch >= 1, f"a global batch has sequences, not {global_batch}"
    assert min(num_windows) >= 1, "every part has windows"
    tree, first = _tree(tuple(weights)), (step - 1) * global_batch
    draws = np.array([_draw(tree, first + place) for place in range(global_batch)], dtype=np.int64)
    windows = np.empty(global_batch, dtype=np.int64)
    for part, size in enumerate(num_windows):
        own = draws[:, 0] == part
        epoch, position = divmod(draws[own, 1], size)
        windows[own] = permute(position, size, seed + (part + 1) * _GOLDEN, epoch)
    return draws[:, 0], windows


@dataclass(frozen=True, kw_only=True)
class _Node:
    """Parts of a mixture that draw together: one, or two lots of them."""

    weight: int
    part: int
    """The first of its parts, and the only one of a leaf."""
    lots: tuple["_Node", "_Node"] | None


@functools.cache
def _tree(weights: tuple[float, ...]) -> _Node:
    """Return Huffman's tree over the parts: the two lightest are joined until all are.

    So no count is ever off by 1.7. Each split is off by 1/2 at most, and what it deals on is a share of that: a part
    of weight w is off by at most 1/2 of the sum of w / v over the nodes of weight v from its leaf to below the root.
    What is joined is the lightest there is, so that these nodes, in units of w, weigh at least 1, 1, 2, 3, 5, 8, ...:
    the sum is below that of the inverse Fibonacci numbers, 3.36. Of two parts it is 1, of three below 2.
    """
    shares = [Fraction(str(weight)) for weight in weights]  # 0.7 is meant as 7/10
    scale = math.lcm(*(share.denominator for share in shares))
    nodes = [_Node(weight=int(share * scale), part=part, lots=None) for part, share in enumerate(shares)]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: (node.weight, node.part))
        light, other = nodes[:2]
        joined = _Node(weight=light.weight + other.weight, part=min(light.part, other.part), lots=(light, other))
        nodes = [*nodes[2:], joined]
    return nodes[0]


def _draw(tree: _Node, number: int) -> tuple[int, int]:
    """Return the part that sequence `number` of a run is of, and how many of that part came before it.

    Of the first n sequences that come to a node its first lot gets n * share, rounded, which is one more than of n - 1
    or the same; so every lot, and in the end every part, counts its own sequences from 0 without a gap.
    """
    node = tree
    while node.lots is not None:
        first, other = node.lots
        before = (2 * number * first.weight + node.weight) // (2 * node.weight)
        after = (2 * (number + 1) * first.weight + node.weight) // (2 * node.weight)
        node, number = (first, before) if after > before else (other, number - before)
    return node.part, number


def permute(position: np.ndarray, size: int, seed: int, epoch: np.ndarray | int = 0) -> np.ndarray:
    """Return where a permutation of range(size), keyed by (seed, epoch), sends each position; int64, same shape.

    An unbalanced Feistel network over the smallest power of two that holds `size`, walked until it lands inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). One position costs constant time and
    memory, so nothing is shuffled and nothing is stored.
    """
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), position.shape).astype(np.uint64)
    key = _mix(_mix(np.full(position.shape, seed & _MASK64, dtype=np.uint64)) + (epochs + np.uint64(1)) * _u(_GOLDEN))
    bits = max(_SMALLEST_DOMAIN_BITS, (size - 1).bit_length())
    image = _feistel(position.astype(np.uint64), key, bits)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _feistel(image[outside], key[outside], bits)
        outside = outside[image[outside] >= size]
    return image.astype(np.int64)


def _feistel(value: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """Return a keyed permutation of range(2**bits): each half is xored in turn with a hash of the other."""
    low_bits = bits // 2
    low_mask, high_mask = _u(2**low_bits - 1), _u(2 ** (bits - low_bits) - 1)
    low, high = value & low_mask, value >> _u(low_bits)
    for half_round in range(0, _HALF_ROUNDS, 2):
        high = high ^ (_mix(key + _round_constant(half_round) + low) & high_mask)
        low = low ^ (_mix(key + _round_constant(half_round + 1) + high) & low_mask)
    return (high << _u(low_bits)) | low


def _round_constant(half_round: int) -> np.uint64:
    """Return what tells one half round's hash from another's."""
    return _u((half_round + 1) * _GOLDEN & _MASK64)


def _mix(value: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each element: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ (value >> _u(30))) * _u(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _u(27))) * _u(0x94D049BB133111EB)
    return value ^ (value >> _u(31))


def _u(value: int) -> np.uint64:
    return np.uint64(value)
