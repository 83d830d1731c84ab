"""Which windows of the corpus a step reads: a pure function of the seed and the step, in constant memory."""

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
