"""The reference: mixed-precision training in plain PyTorch, written so that the algorithm can be read off it.

Micikevicius et al. 2018, "Mixed Precision Training", with dynamic loss scaling. Nothing here is DeepSpeed's or shared
with the engine, so that agreement means something. `halfstep verify` compares every cell with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ParameterGroups = list[dict[str, Any]]


@dataclass(kw_only=True)
class Scale:
    """The loss scale and its rule; `window=0` keeps it where it is."""

    value: float = 2.0**16
    window: int = 1000
    hysteresis: int = 1
    minimum: float = 1.0
    clean_steps: int = 0
    overflows_left: int | None = None

    def shrink(self) -> None:
        """After an overflow: halve, unless hysteresis forgives it."""
        self.clean_steps = 0
        if not self.window:
            return
        left = self.hysteresis if self.overflows_left is None else self.overflows_left
        if left > 1:
            self.overflows_left = left - 1
        else:
            self.overflows_left = 1
            self.value = max(self.value / 2, self.minimum)

    def grow(self) -> None:
        """After a clean step: double if a whole window was clean before it."""
        if self.window and self.clean_steps and self.clean_steps % self.window == 0:
            self.value *= 2
            self.overflows_left = self.hysteresis
        self.clean_steps += 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did."""

    loss: float
    """Mean over the micro-batches, unscaled."""
    grad_norm: float
    """Unscaled, before clipping; inf or NaN where the step was skipped."""
    scale: float
    """The scale it was computed with."""
    skipped: bool


class MixedPrecisionTrainer:
    """Train a model that computes in fp32, fp16 or bf16 on fp32 master weights.

    `model` has the precision of its parameters. `make_optimizer` gets parameter groups of the masters, split by
    `group_of` (parameter -> the group's options), and returns any torch optimizer. `clip` is the largest gradient norm,
    0 for none. `scale` is for fp16; None multiplies the loss by 1.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[ParameterGroups], Optimizer],
        *,
        clip: float = 0.0,
        scale: Scale | None = None,
        group_of: Callable[[Tensor], dict[str, Any]] = lambda parameter: {},
    ) -> None:
        self.model, self.clip, self.scale = model, clip, scale
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        # fp32 master weights: what the optimizer moves. The model's own are a rounded copy of them.
        self.masters = {name: weight.detach().clone().float() for name, weight in self.weights.items()}
        self.optimizer = make_optimizer(
            [{"params": [self.masters[name]], **group_of(weight)} for name, weight in self.weights.items()]
        )

    def step(self, micro_batches: Sequence[Any], loss_of: Callable[[nn.Module, Any], Tensor], lr: float) -> Step:
        """Take one optimizer step over the mean loss of some micro-batches."""
        scale = self.scale.value if self.scale else 1.0
        gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        total = 0.0
        for batch in micro_batches:
            # Forward and backward in the model's precision; the loss itself is fp32.
            loss = loss_of(self.model, batch)
            total += float(loss.detach())
            # Scaling shifts the gradients into fp16's range: 2^-25 and smaller would round to zero.
            (loss * scale / len(micro_batches)).backward()
            for name, weight in self.weights.items():
                # To fp32 first, then unscale: the other way round they would underflow after all.
                if weight.grad is not None:
                    gradients[name] += weight.grad.float() / scale
                weight.grad = None
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        done = Step(loss=total / len(micro_batches), grad_norm=norm, scale=scale, skipped=not math.isfinite(norm))
        if done.skipped:
            # An inf or NaN anywhere: masters, moments and Adam's step count stay as they are.
            if self.scale:
                self.scale.shrink()
            return done
        if self.clip and norm > self.clip:
            for gradient in gradients.values():
                gradient *= self.clip / norm
        for name, master in self.masters.items():
            master.grad = gradients[name]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()  # in fp32, on the masters
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.masters[name])  # rounds to the model's precision
        if self.scale:
            self.scale.grow()
        return done


class Lion(Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2; torch has none."""

    def __init__(self, groups: ParameterGroups, lr: float, betas: tuple[float, float], weight_decay: float = 0) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter by the learning rate, in the direction of its gradient's sign."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                direction = (first * momentum + (1 - first) * parameter.grad).sign()
                parameter -= group["lr"] * (direction + group["weight_decay"] * parameter)
                momentum.copy_(second * momentum + (1 - second) * parameter.grad)
