"""Read an engine the same way in every (stage, precision) cell: loss, gradient norm, memory.

DeepSpeed has a different optimizer wrapper in nearly every cell, and each keeps the norm somewhere else or not at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system import machine
from halfstep.models.router import Objective


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What one optimizer step did, as rank 0 and all others agree."""

    loss: float
    """The language-model loss, mean over accumulation and ranks."""
    router_loss: float | None
    """The routers' auxiliary loss without its coefficient, the same mean; None where none is computed."""
    own_loss: float
    """This rank's mean over accumulation of what is differentiated."""
    grad_norm: float
    """Unscaled, before clipping; inf where the step overflowed."""
    data_seconds: float
    """The slowest rank's."""
    peak_memory_bytes: int
    """The largest rank's."""
    compute_seconds: list[float]
    """Every rank's own, without waiting for others."""
    stop: bool
    """Whether any rank was asked to stop."""


class LossSums:
    """The losses of this rank's micro-batches in a step, added up where they are."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), device=device)
        self._apart: tuple[Tensor, Tensor] | None = None

    def add(self, total: Tensor, objective: Objective) -> None:
        """Add a micro-batch's losses; `total` is the objective's as it was differentiated."""
        self._total += total
        if objective.router is not None:
            language, router = self._apart or (torch.zeros_like(self._total), torch.zeros_like(self._total))
            broken = total - objective.total.detach()  # 0, but for a fault that was set
            self._apart = language + objective.language.detach() + broken, router + objective.router.detach()

    def means(self, micro_steps: int) -> list[Tensor]:
        """Return the means of what is differentiated and, where it has two parts, of the two."""
        return [loss / micro_steps for loss in (self._total, *(self._apart or ()))]


class Readings:
    """One adapter over one engine."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        self._own_norm: float | None = None

    def set_learning_rate(self, rate: float) -> None:
        """Write the learning rate that the next step will use; a group keeps its ratio to the plan's peak."""
        peak = self._plan.schedule.peak
        for group in self._engine.optimizer.param_groups:
            built = group.setdefault("initial_lr", group["lr"])
            group["lr"] = rate * (built / peak if peak else 1.0)

    def before_step(self, gradient_scale: float) -> float | None:
        """Work out the unscaled gradient norm where DeepSpeed has none to be believed, at stage 0; else return None.

        Call after the last backward of a step: stage 0 has all-reduced the gradients by then (engine.py, backward
        epilogue), so every rank sees the same norm. In fp32 nobody keeps one; of the half-precision wrappers one
        reports it scaled and one does not (T1).
        """
        if self._plan.zero == 0:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norms = torch._foreach_norm(gradients, 2, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
            self._own_norm = float(torch.stack(norms).norm()) / gradient_scale
        return self._own_norm

    def after_step(
        self, losses: list[Tensor], data_seconds: float, compute_seconds: float, *, skipped: bool, stop: bool
    ) -> StepReading:
        """Read the step that just ended; `losses` are this rank's, of `LossSums.means`. A collective call.

        Whatever the device knows comes in one transfer, the only one of a step but the norm that stage 0 steps by.
        """
        peak = float(peak_memory_bytes(self._plan.topology.accelerator))
        norm = math.inf if skipped else self._grad_norm()
        own = [*losses, norm, data_seconds, peak, compute_seconds, float(stop)]
        everyone = _gather(own, self._engine.device)
        columns = list(zip(*everyone, strict=True))
        means = [math.fsum(column) / len(column) for column in columns[: len(losses)]]
        norms, waited, peaks, computed, stops = columns[len(losses) :]
        return StepReading(
            loss=means[0] if len(means) == 1 else means[1],
            router_loss=None if len(means) == 1 else means[2],
            own_loss=columns[0][dist.get_rank()],
            grad_norm=norms[dist.get_rank()],
            data_seconds=max(waited),
            peak_memory_bytes=int(max(peaks)),
            compute_seconds=list(computed),
            stop=any(stops),
        )

    def _grad_norm(self) -> float | Tensor:
        """Return the norm of the step, which most of DeepSpeed's wrappers leave on the device."""
        return self._engine.get_global_grad_norm() if self._own_norm is None else self._own_norm


def peak_memory_bytes(accelerator: str) -> int:
    """Return this process's peak: most reserved by torch on a GPU, else the high-water mark of its resident size."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_reserved()
    return host_peak_bytes()


def capacity_bytes(plan: Plan) -> int | None:
    """Return the memory that a rank has here: its GPU's, or its share of the host's."""
    if plan.topology.accelerator == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    memory = machine.node_memory_bytes()
    return memory // plan.topology.ranks_per_node if memory else None


def host_peak_bytes() -> int:
    """Return the high-water mark of this process's resident size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _gather(values: Sequence[float | Tensor], device: torch.device) -> list[list[float]]:
    """Return every rank's numbers on every rank, in float64: an fp32 sum would lose bytes and digits.

    Those that are on the device come first. The host waits for it once.
    """
    there = [value.detach() for value in values if isinstance(value, Tensor)]
    here = torch.tensor([value for value in values if not isinstance(value, Tensor)], dtype=torch.float64)
    own = torch.cat([part.to(device, torch.float64, non_blocking=True).reshape(-1) for part in (*there, here)])
    rows = own.new_empty((dist.get_world_size(), len(values)))
    dist.all_gather(list(rows.unbind()), own)
    return rows.tolist()


def sum_over_ranks(values: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """Return the sums over all ranks, in float64, the same to the last digit on each; tensors come first."""
    rows = _gather(values, device)
    return [math.fsum(column) for column in zip(*rows, strict=True)]
