"""One policy for every cell: which loss scale a step has, when a step is skipped, and when the run has to stop."""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor

from halfstep.launcher import fault_injection
from halfstep.launcher.checkpoint import manifest
from halfstep.launcher.config import precisions
from halfstep.launcher.engine.numerics import forensics
from halfstep.launcher.engine.numerics.loss_scale import LossScale
from halfstep.launcher.engine.numerics.repair import Repairs, unscale_and_clip
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.state import rng
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import NumericsError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.metric_rows import StepRecord

Losses: TypeAlias = Callable[[Any], Iterator[Tensor]]
"""The losses of this rank's micro-batches of a step, one after another, as a model makes them anew."""

_SCALE_IN_OTHER_PRECISIONS = 2.0**16
"""For which loss scale underflow in fp16 is reported where there is none: the default that fp16 starts from."""


class Guard:
    """Stands between the loop and one engine; every rank has one, and all decide alike."""

    def __init__(self, engine: Engine, plan: Plan, repairs: Repairs, event: Callable[..., None], rank: int) -> None:
        self._engine, self._plan, self._repairs, self._event, self._rank = engine, plan, repairs, event, rank
        precision = precisions.of(plan.precision)
        self._scale = LossScale.of(plan.deepspeed["fp16"]) if precision.scaled else None
        self._products = precision.products
        self._statistics: forensics.Statistics | None = None
        self._skipped_in_a_row, self._bad_losses_in_a_row = 0, 0
        self._last_good_step, self.skipped_steps = 0, 0
        self._dropped = False
        self._first: str | None = None
        self._unguarded = plan.zero == 0 and not precision.half_weights
        # fp32 without ZeRO has no wrapper that would scale, either.
        self._scale_loss = repairs.scale_loss or (self._unguarded and precision.scaled)
        if self._unguarded:
            self._guard_bare_optimizer()
        if self._scale is not None:
            self._take_over(self._scale.value)

    @property
    def loss_scale(self) -> float | None:
        """The scale of the step at hand; None without loss scaling."""
        return self._scale.value if self._scale else None

    def state(self) -> manifest.Guard:
        """Return everything that the next decision depends on, JSON-able."""
        return {
            "loss_scale": self._scale.state() if self._scale else None,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "bad_losses_in_a_row": self._bad_losses_in_a_row,
            "last_good_step": self._last_good_step,
            "first": self._first,
        }

    def restore(self, state: manifest.Guard) -> None:
        """Resume from what `state` returned; a run that changed to fp16 begins with a fresh loss scale."""
        if self._scale and state["loss_scale"]:
            self._scale.restore(state["loss_scale"])
            self._write_scale(self._scale.value)
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row, self._bad_losses_in_a_row = state["skipped_in_a_row"], state["bad_losses_in_a_row"]
        self._last_good_step, self._first = state["last_good_step"], state["first"]

    def _take_over(self, scale: float) -> None:
        """Keep DeepSpeed's own rule from moving the scale: there are three, and none leaves a growing step alone.

        Under autocast it has torch's GradScaler, which unscales when the gradients have been clipped already.
        """
        optimizer = self._engine.optimizer
        if self._unguarded:
            self._engine.torch_autocast_z0_gradscaler = None
        elif self._plan.zero == 0:
            optimizer.loss_scale_config.dynamic_loss_scale = False
        else:
            optimizer.torch_autocast_gradscaler = None
            # DeepSpeed's fixed one, which only logs an overflow; its annotation says int and means a number.
            optimizer.loss_scaler = LossScaler(scale)  # pyright: ignore[reportArgumentType]
        self._write_scale(scale)

    def _write_scale(self, scale: float) -> None:
        optimizer = self._engine.optimizer
        if self._plan.zero == 0 and not self._unguarded:
            optimizer.loss_scale_config.cur_scale = scale
        elif self._plan.zero:
            optimizer.loss_scaler.cur_scale = scale

    def start_step(self, step: int) -> None:
        """Begin an optimizer step."""
        self._step, self._dropped = step, False
        self._drawn = rng.drawn()  # should the step have to be done again
        self._carried = self.gradient_scale  # the scale moves before the step is judged
        # In fp16 the scale that the gradients carry, which without repairs is none at stage 0.
        self._measured_scale = self.gradient_scale if self._scale else _SCALE_IN_OTHER_PRECISIONS
        if self._plan.numerics.every and step % self._plan.numerics.every == 0:
            self._statistics = forensics.Statistics(
                self._engine.module,
                in_fp16=self._scale is not None,
                scale=self._measured_scale,
                carried=self.gradient_scale,
            )

    @property
    def gradient_scale(self) -> float:
        """What the gradients of this step are multiplied with when the backward pass has made them."""
        return self._scale.value if self._scale and self._repairs.gradients_carry_scale else 1.0

    def backward(self, loss: Tensor) -> Tensor:
        """Run the backward pass of a micro-batch, scaling the loss where DeepSpeed forgets to; return the raw loss."""
        loss = self._broken(loss)
        self._engine.backward(loss * self.gradient_scale if self._scale_loss else loss)
        if self._repairs.sums:
            self._repairs.sums.collect()
        return loss.detach()

    def _broken(self, loss: Tensor) -> Tensor:
        """Return the loss with the faults that are set for this step."""
        if action := fault_injection.armed("fwd", rank=self._rank, step=self._step):
            loss = loss * float(action)
        if action := fault_injection.armed("bwd", rank=self._rank, step=self._step):
            loss.register_hook(lambda gradient: gradient * float(action))
        return loss

    def _guard_bare_optimizer(self) -> None:
        """Let torch's own optimizer step over a step with a NaN: fp32 without ZeRO has no wrapper that would look.

        The engine would work out the norm that is known here once more, to clip by it (engine.py, _take_model_step).
        """
        step, self._engine.gradient_clipping = self._engine.optimizer.step, lambda: 0.0

        def step_unless_dropped(*arguments: Any, **options: Any) -> Any:
            return None if self._dropped else step(*arguments, **options)

        self._engine.optimizer.step = step_unless_dropped

    def before_step(self, own_norm: float | None) -> None:
        """Do at stage 0 what DeepSpeed does not, or does in 16 bits; `own_norm` is the norm worked out here."""
        if own_norm is None:
            return
        self._dropped = self._unguarded and not math.isfinite(own_norm)
        if self._repairs.fp32_gradients or self._unguarded:
            unscale_and_clip(self._engine, norm=own_norm, scale=self.gradient_scale, clip=self._plan.clip)
        if self._repairs.fp32_gradients:
            self._engine.optimizer.loss_scale_config.cur_scale = 1.0

    def after_step(self) -> bool:
        """Move the loss scale and return whether the step was skipped; the same on every rank."""
        if self._repairs.sums:
            self._repairs.sums.end()
        skipped = self._dropped or not self._engine.was_step_applied()
        if skipped and self._plan.zero in (1, 2) and getattr(self._engine.optimizer, "cpu_offload", False):
            # DeepSpeed resets its host buffers only, and adds the next gradients to these (stage_1_and_2.py, step).
            for group in self._engine.optimizer.averaged_gradients:
                self._engine.optimizer.averaged_gradients[group] = None
        self._curable = self._scale.update(skipped) if self._scale else not skipped
        if self._scale:
            self._write_scale(self._scale.value)
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        return skipped

    def judge(self, record: StepRecord, loss: float, losses: Losses) -> None:
        """Write down what went wrong in a step; raise NumericsError on every rank where the run has to stop.

        `loss` is this rank's own mean of what is differentiated; `losses` does its micro-batches of the step again, to
        look where it came from.
        """
        self._report_statistics(record)
        if record.overflow:
            self._report_overflow(record, loss, losses)
        self._bad_losses_in_a_row = self._bad_losses_in_a_row + 1 if record.loss is None else 0
        if record.loss is None:
            self._report_loss(record, loss, losses)
        if not record.overflow and record.loss is not None:
            self._last_good_step, self._first = record.step, None
        if reason := self._reason_to_stop(record):
            what, fix = reason
            raise NumericsError(
                what,
                where=f"first in {self._first or 'no single gradient'}; last good step {self._last_good_step}",
                fix=fix,
            )

    def _reason_to_stop(self, record: StepRecord) -> tuple[str, str] | None:
        limit = self._plan.numerics.max_skips
        if self._bad_losses_in_a_row >= limit:
            return (
                f"the loss was not finite {limit} steps in a row, up to step {record.step}",
                "look at the data of these steps; take a smaller optimizer.lr or a longer schedule.warmup"
                + {"fp16": ", or precision=bf16", "bf16": ", or precision=fp32"}.get(self._products, ""),
            )
        if not record.overflow:
            return None
        if self._scale and self._scale.dynamic and not self._curable:
            return (
                f"gradients overflow fp16 at the smallest loss scale, {self._scale.minimum:g}, in step {record.step}",
                "take a smaller optimizer.lr, a smaller fp16.min_scale, or precision=bf16",
            )
        if self._skipped_in_a_row >= limit and not (self._scale and self._curable):
            static = f" (the scale is fixed at {self._scale.value:g})" if self._scale else ""
            return (
                f"gradients were not finite {limit} steps in a row, up to step {record.step}{static}",
                "take fp16.scale=0, a smaller fp16.scale or a smaller optimizer.lr"
                if self._scale
                else "look at the data of these steps, or take a smaller optimizer.lr",
            )
        return None

    def _report_overflow(self, record: StepRecord, loss: float, losses: Losses) -> None:
        bad, loss_again = self._do_again(losses)
        # To the bit, and not a number again where it was none: else it was another step that was looked at.
        repeated = loss_again == loss or (math.isnan(loss_again) and math.isnan(loss))
        count, first = forensics.first_of(distributed.gather_objects(bad))
        self._event(
            "overflow",
            step=record.step,
            loss_scale=record.loss_scale,
            skipped_steps=record.skipped_steps,
            non_finite=count,
            first=first,
            repeated=all(distributed.gather_objects(repeated)),
        )
        if first and self._first is None:
            self._first = f"{first[0]['parameter']} on rank {first[0]['rank']} at step {record.step}"

    def _do_again(self, losses: Losses) -> tuple[list[dict[str, Any]], float]:
        """Do the skipped step of this rank again, and return its gradients that were not finite and its mean loss.

        A collective call at stage 3. A step that was skipped has changed no weight, and this changes nothing either: it
        goes around the engine to the module inside, whose hooks gather weights at stage 3 as ever. What dropout draws
        is what it drew, and what it draws next is what it would have been.
        """
        engine, accumulation, scale_loss = self._engine, self._plan.batch.accumulation, self._scale_loss
        loss_sum = torch.zeros((), device=engine.device)

        def forward(**inputs: Tensor) -> Any:
            with autocast_if_enabled(engine):  # engine.py, forward
                return engine.module(**inputs)

        def scaled() -> Iterator[Tensor]:
            for loss in losses(forward):
                loss = self._broken(loss)
                loss_sum.add_(loss.detach())
                # In the order of `backward` here and in DeepSpeed's engine.
                yield loss * self._carried / accumulation if scale_loss else loss / accumulation * self._carried

        with rng.as_drawn(self._drawn), forensics.leaves_unreduced(engine):
            bad = forensics.first_bad_gradients(engine.module, scaled())
        if self._plan.zero == 3:
            engine.optimizer.parameter_offload.release_backward_leftovers()  # stage3.py, backward_epilogue
        return bad, float(loss_sum / accumulation)

    def _report_loss(self, record: StepRecord, loss: float, losses: Losses) -> None:
        """Say which ranks' loss is not finite and, once in a row of them, which module's output was first."""
        first: dict[str, Any] | None = None
        everyone = distributed.gather_objects(math.isfinite(loss))
        ranks = [rank for rank, finite in enumerate(everyone) if not finite]
        if self._bad_losses_in_a_row == 1:
            module = forensics.first_bad_activation(self._engine.module, losses(self._engine))
            modules = distributed.gather_objects(module)
            first = next(({"module": module, "rank": rank} for rank, module in enumerate(modules) if module), None)
            self._first = f"the loss of rank {ranks[0]} at step {record.step}" if ranks else self._first
            if first:
                self._first = f"the output of {first['module']} on rank {first['rank']} at step {record.step}"
        self._event("loss_not_finite", step=record.step, ranks=ranks, first_activation=first)

    def _report_statistics(self, record: StepRecord) -> None:
        if self._statistics is None:
            return
        layers = forensics.merged_statistics(distributed.gather_objects(self._statistics.end()))
        self._statistics = None
        self._event("numerics", step=record.step, scale=self._measured_scale, layers=layers)
