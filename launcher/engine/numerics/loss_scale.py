"""The loss scale as one rule for every ZeRO stage: DeepSpeed has three, and they differ (T2, T4)."""

from dataclasses import dataclass, field
from typing import Any

from halfstep.launcher.checkpoint.manifest import Scale


@dataclass(kw_only=True)
class LossScale:
    """Grow after a clean window, shrink on overflow, as DeepSpeed's `DynamicLossScaler` counts (stages 1 to 3).

    At stage 0 DeepSpeed ignores hysteresis and stays at the minimum for ever; at every stage it doubles the scale
    before the gradients of that same step are divided by it. Here the scale of a step is the one its loss was
    multiplied with, and it moves between steps.
    """

    value: float
    """What the next loss is multiplied with."""
    dynamic: bool
    """False: it never moves."""
    window: int = 1000
    """The step that follows this many clean ones doubles the scale."""
    hysteresis: int = 2
    """Overflows until the first one that halves it."""
    minimum: float = 1.0
    """It never falls below."""
    consecutive_hysteresis: bool = False
    """Whether a clean step restores the hysteresis; else growing does."""
    _clean: int = 0
    _patience: int = field(default=0)

    def __post_init__(self) -> None:
        self._patience = self._patience or self.hysteresis

    @classmethod
    def of(cls, fp16: dict[str, Any]) -> "LossScale":
        """Read the `fp16` section of a DeepSpeed config."""
        if static := float(fp16["loss_scale"]):
            return cls(value=static, dynamic=False)
        return cls(
            value=2.0 ** fp16["initial_scale_power"],
            dynamic=True,
            window=fp16["loss_scale_window"],
            hysteresis=fp16["hysteresis"],
            minimum=float(fp16["min_loss_scale"]),
            consecutive_hysteresis=fp16.get("consecutive_hysteresis", False),
        )

    def state(self) -> Scale:
        """Return what moves."""
        return {"value": self.value, "clean": self._clean, "patience": self._patience}

    def restore(self, state: Scale) -> None:
        """Resume from what `state` returned."""
        self.value, self._clean, self._patience = state["value"], int(state["clean"]), int(state["patience"])

    def update(self, overflow: bool) -> bool:
        """Move the scale after a step; return False for an overflow that no smaller scale can cure."""
        if not overflow:
            self._after_clean_step()
            return True
        self._clean = 0
        if not self.dynamic:
            return False
        if self._patience > 1:
            self._patience -= 1
            return True
        if self.value <= self.minimum:
            return False
        self.value = max(self.value / 2, self.minimum)
        return True

    def _after_clean_step(self) -> None:
        if self.consecutive_hysteresis:
            self._patience = self.hysteresis
        if self.dynamic and self._clean and self._clean % self.window == 0:
            self._patience = self.hysteresis
            self.value *= 2
        self._clean += 1
