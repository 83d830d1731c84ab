"""Repair what DeepSpeed gets wrong at ZeRO stage 0 in half precision, where a canary shows that it does.

In DeepSpeed 0.19.8 `engine.backward` scales the loss for ZeRO optimizers only, while stage 0's fp16 wrapper still
divides the gradients by the scale; and the wrapper takes one optimizer step on zero gradients when it is made, so that
Adam's first real step is its second. It also adds up micro-batches in 16 bits there and refuses anything else, where
stages 1 to 3 add in fp32. What is repaired is decided by what DeepSpeed is seen to do and not by its version: the day
it is right, nothing is repaired twice. See docs/deepspeed.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.launcher.config import precisions
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.plan.plan import Plan
from halfstep.models.micro_batch import MicroBatch

FALSE_STEP = "false-optimizer-step"
UNSCALED_LOSS = "unscaled-loss"
HALF_ACCUMULATION = "half-precision-accumulation"
_PROBE_TOKENS = 16
_PROBE_PARAMETERS = 8
_PROBE_SCALE = 256.0


class Fp32Sums:
    """Stage 0's 16-bit gradients added up in fp32, all of a micro-batch at once.

    Their memory is there from the first micro-batch of a step to its end, as that of ordinary gradients is; the views
    of it stay, so that nothing is done for each parameter.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        self._sums = [part.view_as(parameter) for part, parameter in zip(flat.split(sizes), parameters, strict=True)]
        self._storage, self._bytes = flat.untyped_storage(), flat.nbytes
        self._begun = self._given = False
        self._storage.resize_(0)

    def collect(self) -> None:
        """Add the gradients of a micro-batch, and take them off their parameters. Once given, there is none to add."""
        if self._given:
            return
        if not self._begun:
            self._storage.resize_(self._bytes)
        pairs = list(zip(self._sums, (parameter.grad for parameter in self._parameters), strict=True))
        made = [(total, gradient) for total, gradient in pairs if gradient is not None]
        missing = [total for total, gradient in pairs if gradient is None]  # not used in this batch
        if missing and not self._begun:
            torch._foreach_zero_(missing)  # pyright: ignore[reportPrivateImportUsage]
        if made:
            totals, gradients = [total for total, _ in made], [gradient for _, gradient in made]
            if self._begun:
                torch._foreach_add_(totals, gradients)  # pyright: ignore[reportPrivateImportUsage]
            else:
                torch._foreach_copy_(totals, gradients)  # pyright: ignore[reportPrivateImportUsage]
        self._begun = True
        for parameter in self._parameters:
            parameter.grad = None

    def give(self) -> list[Tensor]:
        """Make the sums, the last micro-batch's gradients among them, those of the parameters, and return them."""
        self.collect()
        self._given = True
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total
        return list(self._sums)

    def end(self) -> None:
        """Give the memory back when the optimizer has stepped or left the step out; nobody may read them any more."""
        for parameter in self._parameters:
            parameter.grad = None
        self._begun = self._given = False
        self._storage.resize_(0)


@dataclass(frozen=True, kw_only=True)
class Repairs:
    """What was found wrong with an engine, and what of it is repaired."""

    faults: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    sums: Fp32Sums | None = None
    """Where stage 0 accumulates in fp32: to be told of the end of every backward pass and of every step."""

    @property
    def scale_loss(self) -> bool:
        """Whether the loss has to be multiplied by the scale before `engine.backward`."""
        return UNSCALED_LOSS in self.active

    @property
    def fp32_gradients(self) -> bool:
        """Whether stage 0 accumulates in fp32, and Halfstep unscales and clips what it has accumulated."""
        return HALF_ACCUMULATION in self.active

    @property
    def gradients_carry_scale(self) -> bool:
        """Whether fp16 gradients come out of the backward pass multiplied by the scale."""
        return UNSCALED_LOSS not in self.faults or self.scale_loss


def repair(engine: Engine, plan: Plan) -> Repairs:
    """Look for both faults and, unless the plan leaves them, repair them; call between `initialize` and the first step.

    Every rank must call. Raises RefusedError where stage 0 does neither what it should nor what it is known to do.
    """
    if plan.zero != 0 or not precisions.of(plan.precision).half_weights:
        return Repairs()
    faults = []
    if took_false_step(engine):
        faults.append(FALSE_STEP)
        if plan.numerics.repairs:
            undo_false_step(engine)
    if plan.precision == "fp16" and leaves_loss_unscaled(engine, plan.model.vocabulary):
        faults.append(UNSCALED_LOSS)
    fixed, sums = list(faults), None
    if accumulates_in_half(engine):
        faults.append(HALF_ACCUMULATION)
        # A gradient of another type than its parameter's is new in torch; without it, this one stays.
        if plan.numerics.repairs and hasattr(Tensor, "grad_dtype"):
            fixed.append(HALF_ACCUMULATION)
            sums = accumulate_in_fp32(engine)
    return Repairs(faults=tuple(faults), active=tuple(fixed) if plan.numerics.repairs else (), sums=sums)


def took_false_step(engine: Engine) -> bool:
    """Tell whether the optimizer has stepped before training: it has counted a step, or decayed the masters."""
    states = engine.optimizer.optimizer.state.values()
    counted = any(float(state["step"]) > 0 for state in states if "step" in state)
    return counted or any(not torch.equal(master, half.to(master.dtype)) for master, half in _weights(engine))


def undo_false_step(engine: Engine) -> None:
    """Forget the optimizer's states and take the masters from the half-precision weights again."""
    engine.optimizer.optimizer.state.clear()
    engine.optimizer.refresh_fp32_params()


def leaves_loss_unscaled(engine: Engine, vocabulary: int) -> bool:
    """Tell whether `engine.backward` forgets the loss scale: compare a small gradient with that of the raw loss.

    Every rank probes with the same tokens, so that averaging over ranks changes nothing, and without dropout. The
    gradients are dropped afterwards.
    """
    scaling = engine.optimizer.loss_scale_config
    own, scaling.cur_scale = scaling.cur_scale, _PROBE_SCALE  # a run may begin at 1, where nothing can be told
    batch = MicroBatch.of_windows(torch.arange(_PROBE_TOKENS + 1)[None] % vocabulary).to(engine.device)
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    small = sorted(trained, key=Tensor.numel)[:_PROBE_PARAMETERS]
    engine.eval()
    raw = batch.loss(batch.logits(engine.module))
    references = torch.autograd.grad(raw, small, allow_unused=True)
    norms = [0.0 if reference is None else float(reference.float().norm()) for reference in references]
    chosen = max(range(len(small)), key=lambda place: norms[place] if math.isfinite(norms[place]) else 0.0)
    loss = batch.loss(batch.logits(engine))
    engine.backward(loss, scale_wrt_gas=False)
    gradient = small[chosen].grad
    seen = 0.0 if gradient is None else float(gradient.float().norm())
    engine.optimizer.zero_grad()
    engine.train()
    scaling.cur_scale = own
    return is_unscaled(seen, norms[chosen], _PROBE_SCALE)


def is_unscaled(seen: float, reference: float, scale: float) -> bool:
    """Decide from the norms of the engine's gradient and of the raw loss's whether the scale is missing.

    A gradient that is not finite was scaled beyond fp16. Raises RefusedError for a ratio that is neither 1 nor the
    scale, and where there is no gradient to compare.
    """
    ratio = seen / reference if reference and math.isfinite(reference) else 0.0
    if abs(ratio - 1) < 0.1:
        return True
    if ratio and (not math.isfinite(ratio) or abs(ratio / scale - 1) < 0.1):
        return False
    raise RefusedError(
        f"DeepSpeed's gradients at stage 0 are {ratio:g} times those of the loss, which is neither 1 nor the scale",
        where=f"the canary of launcher/engine/numerics/repair.py at scale {scale:g}",
        fix="take zero=1, which is the same mathematics, or the tested versions (constraints.txt)",
    )


def accumulates_in_half(engine: Engine) -> bool:
    """Tell whether gradients are added up, and averaged over ranks, in 16 bits."""
    _, accumulation_dtype = engine.get_data_types()
    return accumulation_dtype != torch.float32


def accumulate_in_fp32(engine: Engine) -> Fp32Sums:
    """Let the engine reduce and step with fp32 sums of each micro-batch's 16-bit gradients, as stages 1 to 3 do.

    Whoever runs the backward passes calls `collect` after each, and `end` after a step. The wrapper copies what it
    finds to fp32 before it steps. But it takes the norm, for clipping and for what it calls an overflow, from the
    gradients in 16 bits (moe/utils.py): `unscale_and_clip` has to come before.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad_dtype = None  # a gradient may have another type than its parameter
    sums = Fp32Sums(parameters)
    # The engine's one door for gradients other than the parameters' own (engine.py, buffered_allreduce_fallback), which
    # it opens at the end of a step's last backward pass.
    engine.optimizer.get_grads_for_reduction = lambda: (sums.give(), {})
    engine.optimizer.clip_grad = 0.0
    return sums


def unscale_and_clip(engine: Engine, *, norm: float, scale: float, clip: float) -> None:
    """Divide fp32 gradients by the loss scale and clip them, so that the wrapper finds neither left to do.

    `norm` is the unscaled one. A gradient that is not finite is left for the wrapper to find.
    """
    factor = 1 / scale / max(1.0, (norm + 1e-6) / clip if clip else 1.0)
    if math.isfinite(norm) and factor != 1:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]


def _weights(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (fp32 master, half-precision weight) of both wrappers: flat for a fused Adam, one by one for the others."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups_flat"):
        yield from zip(wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True)
        return
    for masters, halves in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        yield from zip(masters, halves, strict=True)
