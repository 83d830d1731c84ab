"""What the loop works with: the engine and what stands around it, as one argument."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halfstep.launcher import fault_injection
from halfstep.launcher.engine.feed import Batches
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.readings import sum_over_ranks
from halfstep.launcher.engine.state.saving import Saver
from halfstep.launcher.engine.task_evaluation import Judges
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.models import fused_head
from halfstep.models.micro_batch import MicroBatch
from halfstep.models.router import Objective, WithRouterLoss

_FAULT_POINTS = {"data": "data", "forward": "fwd", "backward": "bwd", "step": "step", "evaluate": "eval"}
_JOINT = ("step", "evaluate")
"""Phases at whose beginning the ranks wait for each other."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One rank's share of a training; every rank calls the same functions, rank 0's write."""

    engine: Engine
    plan: Plan
    feed: Batches
    guard: Guard
    saver: Saver | None = None
    done: int = 0
    """Steps that are done already."""
    judges: Judges | None = None
    """What the model is judged by at evaluations, beside its loss."""
    evaluated: bool = False
    """Whether the evaluation that is due after `done` has been made."""
    on_step: Callable[[StepRecord], None]
    on_evaluation: Callable[[EvaluationRecord], None] = lambda record: None
    on_event: Callable[..., None] = lambda kind, **details: None
    on_traffic: Callable[[int, int], None] = lambda sent, collectives: None
    """Called with the bytes and the collectives of one optimizer step."""
    mark: Callable[[str, int], None] = lambda phase, step: None
    """Called with the phase and the step whenever something has moved."""
    stop_reason: Callable[[], str | None] = lambda: None
    """Why this rank was asked to stop, if it was."""

    @functools.cached_property
    def loss_of(self) -> Callable[..., Tensor]:
        """What makes the loss of a batch: `MicroBatch.loss_by`, or what stands for it where the head is fused."""
        return fused_head.loss_of(self.engine.module)

    def objective(self, batch: MicroBatch, model: Any, mean_count: float) -> Objective:
        """Return what a micro-batch is trained by; `model` is the engine, or whatever runs its module.

        DeepSpeed averages over micro-batches and ranks: one with fewer targets than the mean of them counts less. The
        routers' loss is of what they were given, and its average is the plain one.
        """
        share = batch.target_count / mean_count
        if not self.plan.router_loss:
            return Objective.of(self.loss_of(batch, model) * share, None, 0.0)
        asked = WithRouterLoss(model)
        language = self.loss_of(batch, asked) * share
        return Objective.of(language, asked.router_loss, self.plan.router_loss)

    def phase(self, name: str, step: int) -> None:
        """Mark that a phase begins, and let happen what is set for it."""
        self.mark(name, step)
        fault_injection.hit(_FAULT_POINTS[name], rank=self.feed.rank, step=step)
        if name in _JOINT:
            self.mark(name, step)  # whoever hangs before is a mark behind those that wait for it

    def stopping_anywhere(self) -> bool:
        """Tell whether any rank was asked to stop. A collective call."""
        return sum_over_ranks([float(self.stop_reason() is not None)], self.engine.device)[0] > 0
