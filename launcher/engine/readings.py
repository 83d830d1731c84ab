"""Read an engine the same way in every (stage, precision) cell: loss scale, gradient norm, skips, memory.

DeepSpeed has a different optimizer wrapper in nearly every cell, and each keeps these somewhere else or not at all.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from launcher.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What one optimizer step did, as rank 0 and all others agree."""

    loss: float
    """Mean over accumulation and ranks."""
    grad_norm: float
    """Unscaled, before clipping; inf where the step overflowed."""
    loss_scale: float | None
    """The scale the step was computed with."""
    overflow: bool
    skipped_steps: int
    data_seconds: float
    """The slowest rank's."""
    peak_memory_bytes: int
    """The largest rank's."""


class Readings:
    """One adapter over one engine."""

    def __init__(self, engine: DeepSpeedEngine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        self._scaled = plan.precision == "fp16"
        # fp32 without ZeRO has no wrapper: the engine's optimizer is torch's own, and nobody keeps a norm.
        self._bare = plan.zero == 0 and plan.precision == "fp32"
        self._scale_before: float | None = None
        self._bare_norm = 0.0

    def set_learning_rate(self, rate: float) -> None:
        """Write the learning rate that the next step will use."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def before_step(self) -> None:
        """Note what the step will overwrite; call after the last backward of an optimizer step."""
        self._scale_before = self.loss_scale()
        if self._bare:
            # Stage 0 has all-reduced the gradients by now (engine.py, backward epilogue), so every rank sees the norm.
            norms = [p.grad.float().norm() for p in self._engine.module.parameters() if p.grad is not None]
            self._bare_norm = float(torch.stack(norms).norm())

    def loss_scale(self) -> float | None:
        """Return the present loss scale, or None without loss scaling."""
        # The one reading of the scale that works with every wrapper (engine.py, _get_optimizer_loss_scale).
        return float(self._engine._get_optimizer_loss_scale()) if self._scaled else None

    def after_step(self, loss: torch.Tensor, data_seconds: float) -> StepReading:
        """Read the step that just ended; `loss` is this rank's mean over its micro-batches. A collective call."""
        own = [float(loss), data_seconds, float(peak_memory_bytes(self._plan.topology.accelerator))]
        everyone = _gather(own, loss.device)
        overflow = not self._engine.was_step_applied()
        return StepReading(
            loss=math.fsum(row[0] for row in everyone) / len(everyone),
            grad_norm=math.inf if overflow else self._grad_norm(),
            loss_scale=self._scale_before,
            overflow=overflow,
            skipped_steps=self._engine.skipped_steps,
            data_seconds=max(row[1] for row in everyone),
            peak_memory_bytes=int(max(row[2] for row in everyone)),
        )

    def _grad_norm(self) -> float:
        if self._bare:
            return self._bare_norm
        norm = float(self._engine.get_global_grad_norm())
        if self._scaled and self._plan.zero == 3 and self._scale_before:
            # Stage 3 divides by the scale after it grew: half the norm on a growth step (stage3.py:2897, T4).
            norm *= (self.loss_scale() or 1.0) / self._scale_before
        return norm


def peak_memory_bytes(accelerator: str) -> int:
    """Return this process's peak: most reserved by torch on a GPU, else the high-water mark of its resident size."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_reserved()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _gather(values: list[float], device: torch.device) -> list[list[float]]:
    """Return every rank's numbers on every rank, in float64: an fp32 sum would lose bytes and digits."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return [row.tolist() for row in rows]


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the sums over all ranks, in float64, the same to the last digit on each."""
    rows = _gather(values, device)
    return [math.fsum(column) for column in zip(*rows, strict=True)]
