"""The learning rate: a pure function of the optimizer step, and its default peak by model size."""

import math
from collections.abc import Callable, Mapping
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
BY_SIZE = "default by model size"
"""Where a peak comes from that nobody asked for."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning-rate curve over a run."""

    kind: str
    """A name in `SHAPES`."""
    peak: float
    """Highest learning rate."""
    warmup: int
    """Steps of linear warm-up; step `warmup` is the first at the peak."""
    steps: int
    """Length of the run."""
    min_ratio: float
    """Final learning rate / peak."""
    decay: int = 0
    """Steps at the end in which `wsd` falls; 0 for the others."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 1."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        return self.peak * (1.0 if self.steps <= self.warmup else SHAPES[self.kind](self, step))


def _constant(curve: Schedule, step: int) -> float:
    return 1.0


def _cosine(curve: Schedule, step: int) -> float:
    return _fallen(curve, (1 + math.cos(math.pi * _progress(curve, step, curve.warmup))) / 2)


def _linear(curve: Schedule, step: int) -> float:
    return _fallen(curve, 1 - _progress(curve, step, curve.warmup))


def _wsd(curve: Schedule, step: int) -> float:
    start = max(curve.warmup, curve.steps - curve.decay)
    return 1.0 if step <= start else _fallen(curve, 1 - _progress(curve, step, start))


def _progress(curve: Schedule, step: int, start: int) -> float:
    """Return how much of the way from step `start`, the last at the peak, to the end of the run is done."""
    start = max(start, 1)
    return min(1.0, (step - start) / max(1, curve.steps - start))


def _fallen(curve: Schedule, height: float) -> float:
    return curve.min_ratio + (1 - curve.min_ratio) * height


SHAPES: Mapping[str, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    # Warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4.
    "wsd": _wsd,
    "constant": _constant,
}
"""Each kind of schedule: the learning rate of a step after the warm-up, as a fraction of the peak."""


def default_peak(parameters: int) -> float:
    """Return the published peak learning rate of the GPT-3 model nearest in size from above."""
    return next((rate for limit, rate in _PEAK_BY_SIZE if parameters <= limit), _PEAK_OF_THE_LARGEST)


def default_warmup(steps: int) -> int:
    """Return a tenth of the run, at most 2000 steps."""
    return min(2000, steps // 10)
