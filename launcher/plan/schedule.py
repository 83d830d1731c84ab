"""The learning rate: a pure function of the optimizer step, and its default peak by model size."""

import math
from dataclasses import dataclass

# (parameters up to, peak learning rate), Brown et al. 2020, table 2.1; the first row is ours, for models that
# train in a minute on a CPU (curves of the ZeRO cells still agree at 1e-3 and part beyond it).
_PEAK_BY_SIZE = (
    (20e6, 1e-3),
    (200e6, 6e-4),
    (500e6, 3e-4),
    (1.0e9, 2.5e-4),
    (2.0e9, 2e-4),
    (4.5e9, 1.6e-4),
    (10e9, 1.2e-4),
    (100e9, 1e-4),
)
_PEAK_OF_THE_LARGEST = 0.6e-4


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning-rate curve over a run."""

    kind: str
    """`cosine`, `linear` or `constant`."""
    peak: float
    """Highest learning rate."""
    warmup: int
    """Steps of linear warm-up; step `warmup` is the first at the peak."""
    steps: int
    """Length of the run."""
    min_ratio: float
    """Final learning rate / peak."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 1."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        if self.kind == "constant" or self.steps <= self.warmup:
            return self.peak
        start = max(self.warmup, 1)
        progress = min(1.0, (step - start) / max(1, self.steps - start))
        falling = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * falling)


def default_peak(parameters: int) -> float:
    """Return the published peak learning rate of the GPT-3 model nearest in size from above."""
    return next((rate for limit, rate in _PEAK_BY_SIZE if parameters <= limit), _PEAK_OF_THE_LARGEST)


def default_warmup(steps: int) -> int:
    """Return a tenth of the run, at most 2000 steps."""
    return min(2000, steps // 10)
