"""The batch equation: global = micro x accumulation x ranks, solved exactly or explained."""

import math
from dataclasses import dataclass

from halfstep.launcher.errors import RequestError

_LARGEST_DEFAULT_MICRO = 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A solved batch equation; all counts in sequences, but for `accumulation` and `ranks`."""

    global_: int
    """Sequences per optimizer step."""
    micro: int
    """Sequences per rank and micro-step."""
    accumulation: int
    """Micro-steps per optimizer step."""
    ranks: int
    """Data-parallel ranks."""

    def equation(self) -> str:
        """Return the equation with its numbers, for a person."""
        numbers = f"{self.global_} = {self.micro} x {self.accumulation} x {self.ranks}"
        return f"{numbers}  (global = micro x accumulation x ranks)"


def solve(global_: int, micro: int | None, ranks: int, where: str = "batch.global") -> Batch:
    """Find the accumulation, and the micro-batch where it is free: the largest divisor up to 8, as CPU ranks take.

    Raises RequestError with the nearest batches that do work; nothing is rounded silently.
    """
    if global_ % ranks:
        raise RequestError(
            f"batch.global={global_} cannot be shared by {ranks} ranks: {global_} / {ranks} is not whole",
            where=where,
            fix=f"take batch.global={_near(global_, ranks)}, or start a number of ranks that divides {global_}",
        )
    per_rank = global_ // ranks
    if micro is None:
        micro = next(size for size in range(min(_LARGEST_DEFAULT_MICRO, per_rank), 0, -1) if per_rank % size == 0)
    if per_rank % micro:
        near = _listed(nearest_divisors(per_rank, micro))
        raise RequestError(
            f"batch.global={global_} is not batch.micro={micro} x a whole accumulation x {ranks} ranks",
            where=where,
            fix=f"take batch.global={_near(global_, micro * ranks)}, or batch.micro={near}",
        )
    return Batch(global_=global_, micro=micro, accumulation=per_rank // micro, ranks=ranks)


def micro_sizes(share: int, most: int) -> list[int]:
    """Return the micro-batches of up to `most` sequences, at least one, that divide a rank's share; ascending."""
    return [size for size in range(1, max(1, min(most, share)) + 1) if share % size == 0]


def _near(number: int, multiple: int) -> str:
    below, above = number // multiple * multiple, -(-number // multiple) * multiple
    return f"{below} or {above}" if below else str(above)


def nearest_divisors(number: int, wanted: int, count: int = 3) -> list[int]:
    """Return the divisors of a number nearest to another number, in ascending order, in the time of its square root."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    divisors = sorted({*small, *(number // size for size in small)})
    return sorted(sorted(divisors, key=lambda size: abs(size - wanted))[:count])


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
