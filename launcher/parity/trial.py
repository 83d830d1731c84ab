"""Run one case on DeepSpeed through the training loop itself, or on the reference, and keep what they are judged by."""

import contextlib
import functools
import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import torch_autocast
from deepspeed.utils import groups
from torch import Tensor, nn

from halfstep.launcher.config import optimizers, precisions
from halfstep.launcher.engine.build import build, set_matrix_precision
from halfstep.launcher.engine.loop import train
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.state import training_state
from halfstep.launcher.engine.training import Training
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import NumericsError
from halfstep.launcher.parity import reference
from halfstep.launcher.parity.cases import POISONED_STEP
from halfstep.launcher.parity.reference import MixedPrecisionTrainer, ParameterGroups, Scale
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.metric_rows import StepRecord
from halfstep.models import network as model_build
from halfstep.models.islands import keep_in_fp32
from halfstep.models.loss import IGNORED
from halfstep.models.micro_batch import MicroBatch
from halfstep.models.router import Objective, WithRouterLoss

_DOCUMENTS_A_TOKEN = 0.08
"""How likely a document begins with a token, where they are kept apart: two or three in a sequence of 32."""
_STEPS_WITH_NOTHING = 5
"""Steps between those whose first sequences have nothing to predict."""
_OPTIONS = ("betas", "eps", "momentum")
"""Of an optimizer, beside the learning rate and the weight decay: named alike by DeepSpeed, torch and the reference."""
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class Series:
    """What one run did, step by step; None where a value is not finite."""

    loss: list[float | None] = field(default_factory=list)
    grad_norm: list[float | None] = field(default_factory=list)
    loss_scale: list[float | None] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    first_update: Tensor | None = None
    """All masters after the first step minus all weights before it, flat, fp32, on the CPU."""
    optimizer_steps: float | None = None
    """Adam's step count after the first step; None for SGD."""
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank reads in one micro-step; all tensors are (micro, sequence + 1)."""

    rank: int
    tokens: Tensor
    starts: Tensor
    """Where a document begins that is kept apart from what is before it."""
    judged: Tensor
    """Which tokens are to be predicted."""

    def batch(self) -> MicroBatch:
        """Return it as the training loop has it: documents side by side in their rows."""
        whole = MicroBatch.of_documents(self.tokens, self.starts)
        return replace(whole, targets=whole.targets.masked_fill(~self.judged[:, 1:], IGNORED))

    def documents(self) -> list[MicroBatch]:
        """Return each document by itself, with nothing beside it that it could see; rows where there are none."""
        if not self.starts.any():
            return [self.batch()]
        alone = []
        for tokens, starts, judged in zip(self.tokens, self.starts, self.judged, strict=True):
            borders = sorted({0, len(tokens), *starts.nonzero().flatten().tolist()})
            for first, end in itertools.pairwise(borders):
                own, kept = tokens[None, first:end], judged[None, first + 1 : end]
                alone.append(MicroBatch(own[:, :-1], own[:, 1:].masked_fill(~kept, IGNORED)))
        return [document for document in alone if document.target_count] or [self.batch()]


class SyntheticFeed:
    """Sequences that can be learnt, from the step's number alone: a random walk with small positive strides."""

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        self._plan, self.rank, self._device = plan, rank, device

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step, dealt out as `engine.feed.Feed` does."""
        for share in self.shares(step):
            if share.rank == self.rank:
                yield share.batch().to(self._device)

    def target_count(self, step: int) -> float:
        """Return how many targets the global batch has."""
        return sum(share.batch().target_count for share in self.shares(step))

    def shares(self, step: int) -> list[Share]:
        """Return the global batch, micro-step by micro-step and rank by rank."""
        batch, shape = self._plan.batch, (self._plan.batch.global_, self._plan.sequence + 1)
        random = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(1, 4, shape, generator=random).cumsum(dim=1) % self._plan.model.vocabulary
        starts, judged = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
        if self._plan.documents == "masked":
            starts = torch.rand(shape, generator=random) < _DOCUMENTS_A_TOKEN
            # Rows differ in how much of them counts, and with them micro-batches and ranks; in one micro-batch of four,
            # now and then, nothing does.
            judged = torch.rand(shape, generator=random) < torch.rand((shape[0], 1), generator=random)
            judged[: shape[0] // 4] &= step % _STEPS_WITH_NOTHING > 0
        dealt = [part.reshape(-1, batch.micro, shape[1]) for part in (tokens, starts, judged)]
        return [
            Share(rank=number % batch.ranks, tokens=own, starts=begin, judged=counted)
            for number, (own, begin, counted) in enumerate(zip(*dealt, strict=True))
        ]

    def validation_batches(self, part: int) -> Iterator[tuple[MicroBatch, int]]:
        """Yield nothing: the gate looks at training."""
        return iter(())


def on_deepspeed(plan: Plan, rank: int) -> Series:
    """Train a plan with the loop that trains every run. A collective call."""
    engine, repairs = build(plan)
    series = Series(repairs=repairs.active)
    before = _weights(engine)

    def step(record: StepRecord) -> None:
        router = plan.router_loss * (record.router_loss or 0.0)
        series.loss.append(None if record.loss is None else record.loss + router)
        series.grad_norm.append(record.grad_norm)
        series.loss_scale.append(record.loss_scale)
        series.skipped.append(record.overflow)
        if record.step == 1:
            series.first_update = _masters(engine) - before
            series.optimizer_steps = _optimizer_steps(engine)

    try:
        guard = Guard(engine, plan, repairs, lambda kind, **details: None, rank)
        feed = SyntheticFeed(plan, rank, engine.device)
        train(Training(engine=engine, plan=plan, feed=feed, guard=guard, on_step=step))
    except NumericsError:  # on every rank; what it did not train counts as different
        missing = plan.steps - len(series.loss)
        series.loss += [None] * missing
        series.grad_norm += [None] * missing
        series.loss_scale += [None] * missing
        series.skipped += [True] * missing
    finally:
        engine.destroy()
        # What DeepSpeed keeps for the process: hpZ's group may be made once, and after one engine with autocast every
        # other reduces gradients in its type.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        gc.collect()
    return series


def _weights(engine: Engine) -> Tensor:
    """Return all trained weights as one flat fp32 tensor, in the model's order. A collective call."""
    parts = []
    for parameter in _trained(engine).values():
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if sharded else contextlib.nullcontext():
            parts.append(parameter.detach().float().cpu().flatten())
    return torch.cat(parts)


def _trained(engine: Engine) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _masters(engine: Engine) -> Tensor:
    """Return all fp32 masters likewise. A collective call."""
    wholes: dict[str, Tensor] = {}
    for name, parameter in _trained(engine).items():
        wholes[name] = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=engine.device)
    for piece in training_state.fragments(engine):
        held = training_state.tensors(engine, piece)[training_state.MASTER]
        wholes[piece.name].narrow(0, piece.start, piece.length).copy_(held)
    flat = torch.cat(list(wholes.values()))
    if engine.zero_optimization():  # each element is held by one rank, at stage 0 by all
        torch.distributed.all_reduce(flat)
    return flat.cpu()


def _optimizer_steps(engine: Engine) -> float | None:
    counts = [training_state.step_count(engine, piece) for piece in training_state.fragments(engine)]
    return max((count for count in counts if count is not None), default=None)


def _hidden_matrices(model: nn.Module) -> set[Tensor]:
    """Return the weights that are neither vectors, nor rows for tokens and places, nor the head."""
    tables = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
    head = {weight for name, weight in model.named_parameters() if name.startswith("lm_head")}
    return {weight for weight in model.parameters() if weight.dim() >= 2 and weight not in tables | head}


def on_the_reference(plan: Plan) -> Series:
    """Train a plan with `oracle.MixedPrecisionTrainer`, the global batch in this one process."""
    precision = precisions.of(plan.precision)
    set_matrix_precision(plan)
    model = model_build.build(plan.model.config, seed=plan.seed, dtype=_DTYPES[precision.weights], lora=plan.lora)
    if plan.keep_fp32:
        keep_in_fp32(model, plan.keep_fp32, plan.topology.accelerator)
    if plan.topology.accelerator == "cuda":
        nn.Module.to(model, "cuda")
    fp16 = plan.deepspeed["fp16"]
    scale = Scale(
        value=2.0 ** fp16["initial_scale_power"], window=fp16["loss_scale_window"], hysteresis=fp16["hysteresis"]
    ) if precision.scaled else None  # fmt: skip
    row, settings = optimizers.of(plan.deepspeed["optimizer"]["type"]), plan.deepspeed["optimizer"]["params"]
    decay = settings["weight_decay"]

    hidden = _hidden_matrices(model)

    def group_of(weight: Tensor) -> dict[str, Any]:
        group: dict[str, Any] = {"weight_decay": decay if weight.dim() >= 2 else 0.0}
        if row.type == "Muon":
            rate = settings.get("muon_lr" if weight in hidden else "adam_lr", settings["lr"])
            group |= {"use_muon": weight in hidden, "rate": rate / settings["lr"]}
        return group

    def make_optimizer(groups: ParameterGroups) -> torch.optim.Optimizer:
        assert row.reference, f"the gate knows no reference for {row.type}"
        made = getattr(reference, row.reference, None) or getattr(torch.optim, row.reference)  # torch has a Muon, too
        return made(groups, lr=settings["lr"], **{name: settings[name] for name in _OPTIONS if name in settings})

    kept = plan.deepspeed["bf16"]
    trainer = MixedPrecisionTrainer(
        model,
        make_optimizer,
        clip=plan.clip,
        scale=scale,
        group_of=group_of,
        master_dtype=torch.bfloat16 if kept.get("bf16_master_weights_and_grads") else torch.float32,
        state_dtype=torch.bfloat16 if kept.get("bf16_optimizer_states") else torch.float32,
    )
    device = next(model.parameters()).device
    autocast = functools.partial(torch.autocast, device.type, _DTYPES.get(precision.products), precision.autocast)
    feed = SyntheticFeed(plan, 0, device)
    before = torch.cat([master.flatten() for master in trainer.masters.values()]).cpu()
    series = Series()
    for step in range(1, plan.steps + 1):
        # (accumulation, rank) share by share, and the poison where the fault puts it: on rank 0.
        shares = feed.shares(step)
        mean_count = feed.target_count(step) / len(shares)

        def loss_of(model: nn.Module, share: Share, step: int = step, mean_count: float = mean_count) -> Tensor:
            asked = WithRouterLoss(model) if plan.router_loss else model
            language = torch.zeros((), device=device)
            # Routers are judged by rows, as they see them.
            for document in [share.batch()] if plan.router_loss else share.documents():
                part = document.to(device)
                with autocast():
                    language = language + part.loss(part.logits(asked), reduction="sum") / mean_count
            router = asked.router_loss if isinstance(asked, WithRouterLoss) else None
            loss = Objective.of(language, router, plan.router_loss).total
            return loss * math.nan if step == POISONED_STEP and share.rank == 0 else loss

        done = trainer.step(shares, loss_of, plan.schedule.learning_rate(step))
        series.loss.append(done.loss if math.isfinite(done.loss) else None)
        series.grad_norm.append(None if done.skipped else done.grad_norm)
        series.loss_scale.append(done.scale if scale else None)
        series.skipped.append(done.skipped)
        if step == 1:
            series.first_update = torch.cat([master.flatten() for master in trainer.masters.values()]).cpu() - before
            counts = [float(state["step"]) for state in trainer.optimizer.state.values() if "step" in state]
            series.optimizer_steps = max(counts) if counts else None
    return series
