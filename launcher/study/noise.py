"""Noise between seeds: how large it is, pooled over the cells that share it, and what a difference has to exceed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t by degrees of freedom (Abramowitz and Stegun, table 26.10).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_LARGE = ((20, 2.086), (30, 2.042), (60, 2.000), (math.inf, 1.960))
_OUTLIER = 5.0
"""A cell that scatters so many times the median of its group has noise of its own, and lends it to nobody."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The standard deviation of one value between seeds."""

    deviation: float
    freedom: int
    """Degrees of freedom that it rests on."""
    own: bool
    """Whether the cell scatters by itself, far more than the others."""

    def interval(self, count: int) -> float:
        """Return half the 95 % confidence interval of a mean of `count` values."""
        return t95(self.freedom) * self.deviation / math.sqrt(count)


def t95(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t; between two rows of the table the more cautious one."""
    if freedom <= len(_T):
        return _T[max(freedom, 1) - 1]
    before = _T[-1]
    for degrees, value in _T_LARGE:
        if freedom < degrees:
            return before
        before = value
    return before


def between_seeds(values: Mapping[str, Sequence[float]]) -> dict[str, Noise]:
    """Return the noise of every cell of a group that has two values or more.

    With two seeds a cell's own deviation rests on one degree of freedom, which says next to nothing; so cells that
    behave alike are pooled.
    """
    own = {name: statistics.stdev(of_seeds) for name, of_seeds in values.items() if len(of_seeds) > 1}
    limit = _OUTLIER * statistics.median(own.values()) if own else 0.0
    pool = [name for name, deviation in own.items() if deviation <= limit]
    freedom = sum(len(values[name]) - 1 for name in pool)
    squares = sum(own[name] ** 2 * (len(values[name]) - 1) for name in pool)
    shared = Noise(deviation=math.sqrt(squares / freedom) if freedom else 0.0, freedom=max(freedom, 1), own=False)
    return {
        name: shared if deviation <= limit else Noise(deviation=deviation, freedom=len(values[name]) - 1, own=True)
        for name, deviation in own.items()
    }
