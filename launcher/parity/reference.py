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
    `group_of` (parameter -> the group's options), and returns any torch optimizer; an option `rate` multiplies the
    learning rate of its group. `clip` is the largest gradient norm, 0 for none. `scale` is for fp16; None multiplies
    the loss by 1. `master_dtype` is what masters and the gradients that change them are rounded to, `state_dtype` what
    the optimizer's states are.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[ParameterGroups], Optimizer],
        *,
        clip: float = 0.0,
        scale: Scale | None = None,
        group_of: Callable[[Tensor], dict[str, Any]] = lambda parameter: {},
        master_dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.clip, self.scale = model, clip, scale
        self.master_dtype, self.state_dtype = master_dtype, state_dtype
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
            master.grad = gradients[name].to(self.master_dtype).float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        self.optimizer.step()  # in fp32, on the masters
        self._round_what_is_kept()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.masters[name])  # rounds to the model's precision
        if self.scale:
            self.scale.grow()
        return done

    @torch.no_grad()
    def _round_what_is_kept(self) -> None:
        for master in self.masters.values():
            master.copy_(master.to(self.master_dtype))
            for state in self.optimizer.state[master].values():
                if torch.is_tensor(state) and state.shape == master.shape:
                    state.copy_(state.to(self.state_dtype))


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


class Muon(Optimizer):
    """Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", AdamW where `use_muon` is not set.

    https://kellerjordan.github.io/posts/muon/. As DeepSpeed has it, momentum is a running mean of the gradients, and
    the update of a matrix with more rows than columns is longer by the root of their ratio.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "use_muon": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move matrices along their orthogonalized momentum, and everything else as AdamW does."""
        for group in self.param_groups:
            for parameter in group["params"]:
                direction = self._direction(parameter, group) if group["use_muon"] else self._adam(parameter, group)
                parameter *= 1 - group["lr"] * group["weight_decay"]
                parameter -= group["lr"] * direction

    def _direction(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        gradient, momentum = self._gradient(matrix), group["momentum"]
        mean = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        mean.copy_(momentum * mean + (1 - momentum) * gradient)
        ahead = momentum * mean + (1 - momentum) * gradient  # Nesterov's
        rows, columns = matrix.shape
        return orthogonalized(ahead) * max(1.0, rows / columns) ** 0.5

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        gradient, state, (first, second) = self._gradient(parameter), self.state[parameter], group["betas"]
        mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
        square = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        step = state["step"] = state.get("step", 0) + 1
        mean.copy_(first * mean + (1 - first) * gradient)
        square.copy_(second * square + (1 - second) * gradient.square())
        return mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + group["eps"])

    @staticmethod
    def _gradient(parameter: Tensor) -> Tensor:
        assert parameter.grad is not None, "every master gets a gradient before a step"
        return parameter.grad


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values brought near 1, by five steps of a Newton-Schulz iteration.

    The coefficients are Jordan's: values end between 0.7 and 1.2, and small ones grow by 3.4 a step.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
