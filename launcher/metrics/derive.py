"""Quantities computed from what was measured, one function each."""

import math
import statistics
from collections.abc import Sequence


def finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, or None for inf and NaN."""
    return value if value is not None and math.isfinite(value) else None


def perplexity(loss: float) -> float | None:
    """Return exp(loss), or None where that is no finite number."""
    return finite(math.exp(loss)) if loss < 700 else None


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Return the throughput of `tokens` in `seconds`."""
    return tokens / seconds


def mfu(
    tokens_per_second: float, flops_per_token: float | None, peak_flops: float | None, devices: int
) -> float | None:
    """Return model FLOPs utilisation (Chowdhery et al. 2022, appendix B) over all devices, 0 to 1."""
    if flops_per_token is None or peak_flops is None:
        return None
    return tokens_per_second * flops_per_token / (peak_flops * devices)


def median_of_steady(values: Sequence[float], warmup: int = 5) -> float | None:
    """Return the median without the first `warmup` values, or of all where there are no more than those."""
    steady = values[warmup:] or values
    return statistics.median(steady) if steady else None
