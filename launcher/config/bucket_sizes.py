"""How large DeepSpeed's buckets are for a model: what the composition writes and the forecast varies."""

from dataclasses import dataclass

_SMALLEST_USEFUL_BUCKET = 2**26
_LARGEST_BUCKET = 500_000_000
_ALIGNMENT = 2
"""Elements that a bucket of stages 1 and 2 is a multiple of (stage_1_and_2.py, nccl_start_alignment_factor)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What bucket sizes depend on, in elements."""

    parameters: int
    largest_tensor: int
    width: int


def bucket(sizes: Sizes, zero: int) -> int:
    """Return the elements of a bucket: of use, no smaller than any tensor, no larger than the model, and aligned."""
    elements = min(_LARGEST_BUCKET, sizes.parameters, max(sizes.largest_tensor, _SMALLEST_USEFUL_BUCKET))
    return -(-elements // _ALIGNMENT) * _ALIGNMENT if zero in (1, 2) else elements
