"""Look at gradients while a backward pass makes them: which were not finite first, and what fp16 would lose of them.

DeepSpeed takes a gradient away as soon as it is made (stages 1 to 3), so it is seen by a hook on its parameter, before
any reduction: what is found belongs to one rank, one micro-step and one parameter. A step has no such hooks: one that
overflowed is done again with them, from the same weights, because it changed none.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.launcher.engine.untyped import Engine

FP16_UNDERFLOW = 2.0**-25
"""A magnitude up to this one rounds to zero in fp16: half the smallest subnormal number, 2^-24."""
_NAMED = 5
"""Parameters named in an event."""


def layer_of(parameter: str) -> str:
    """Return the layer a parameter belongs to: its block, or the module that holds it where it is in none.

    `transformer.h.3.mlp.c_fc.weight` is in `transformer.h.3`, `transformer.wte.weight` in `transformer.wte`.
    """
    parts = parameter.split(".")
    block = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: block + 1] if block is not None else parts[:-1])


@contextlib.contextmanager
def hooked(module: nn.Module, see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with the name of every parameter and the gradient that a backward pass within made for it.

    What it returns takes the gradient's place.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(partial(see, name)) for name, parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_bad_gradients(module: nn.Module, losses: Iterator[Tensor]) -> list[dict[str, Any]]:
    """Run the backward pass of each loss; return whose gradient was not finite, in the order they came, each once.

    The module's gradients, and whatever DeepSpeed hangs on them, stay as they are: `torch.autograd.grad` runs the hooks
    on a parameter, but not its accumulation and what is registered there (torch/csrc/autograd/engine.cpp,
    evaluate_function, captures), nor the hooks that `engine.forward` puts on its output.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sums: list[tuple[int, str, Tensor]] = []
    done: list[None] = []

    def see(name: str, gradient: Tensor) -> Tensor:
        # A sum is not finite if any element is not, costs one pass, and stays on the device until the end.
        sums.append((len(done) + 1, name, gradient.sum(dtype=torch.float32)))
        return gradient.new_zeros(()).expand_as(gradient)  # no memory: at stage 3 no rank could hold them all

    with hooked(module, see):
        for loss in losses:
            torch.autograd.grad(loss, parameters, allow_unused=True)
            done.append(None)
    finite = torch.stack([total for *_, total in sums]).isfinite().tolist() if sums else []
    first_seen: dict[str, int] = {}
    for (micro_step, name, _), good in zip(sums, finite, strict=True):
        if not good:
            first_seen.setdefault(name, micro_step)
    return [
        {"parameter": name, "layer": layer_of(name), "micro_step": micro_step}
        for name, micro_step in first_seen.items()
    ]


@contextlib.contextmanager
def leaves_unreduced(engine: Engine) -> Iterator[None]:
    """Keep a backward pass within from reducing gradients of stage 3's leaf modules.

    These alone are reduced by a hook on the module instead of one on the accumulation (zero/stage3.py,
    create_reduce_and_remove_grad_hooks), zeros where there is none.
    """
    handles = getattr(engine.optimizer, "_leaf_module_hooks", [])
    hooks = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
    taken = [where.pop(number) for where, number in hooks]
    try:
        yield
    finally:
        for (where, number), hook in zip(hooks, taken, strict=True):
            where[number] = hook


class Statistics:
    """What fp16 would lose of each layer's gradients, counted by hooks on every parameter for one step."""

    def __init__(self, module: nn.Module, *, in_fp16: bool, scale: float, carried: float) -> None:
        """Begin to count, for a loss scale of which the gradients carry `carried` already."""
        self._in_fp16, self._scale, self._carried = in_fp16, scale, carried
        self._order = dict.fromkeys(layer_of(name) for name, _ in module.named_parameters())
        self._layers: dict[str, Tensor] = {}
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(hooked(module, self._see))

    def _see(self, name: str, gradient: Tensor) -> None:
        layer, measured = layer_of(name), self._measure(gradient)
        known = self._layers.get(layer)
        if known is not None:
            measured = torch.cat([measured[:-1] + known[:-1], torch.maximum(measured[-1:], known[-1:])])
        self._layers[layer] = measured

    def _measure(self, gradient: Tensor) -> Tensor:
        """Return elements, zeros, losses without and with scaling, and the largest magnitude, in fp64."""
        magnitude = gradient.detach().float().abs() / self._carried
        zero = magnitude == 0
        lost_unscaled = ~zero & (magnitude <= FP16_UNDERFLOW)
        if self._in_fp16:
            # Already gone: what is zero although its row is not. A row without any gradient was not touched at all.
            touched = (~zero).any(dim=-1, keepdim=True)
            lost_scaled = zero & touched
            lost_unscaled |= lost_scaled  # what the scale did not save would not be there without it
        else:
            lost_scaled = ~zero & (magnitude * self._scale <= FP16_UNDERFLOW)
        counts = [zero.sum(), lost_unscaled.sum(), lost_scaled.sum(), magnitude.max()]
        return torch.stack([torch.tensor(float(zero.numel())), *(count.double().cpu() for count in counts)]).double()

    def end(self) -> dict[str, list[float]]:
        """Take the hooks away and return this rank's counts by layer, as `_measure` has them, in the model's order."""
        self._hooks.close()
        return {layer: self._layers[layer].tolist() for layer in self._order if layer in self._layers}


def first_of(ranks: list[list[dict[str, Any]]]) -> tuple[int, list[dict[str, Any]]]:
    """Merge what every rank found: how many parameters in all, and the first of them with their ranks."""
    findings = [{**finding, "rank": rank} for rank, part in enumerate(ranks) for finding in part]
    places = [place for part in ranks for place in range(len(part))]
    ordered = [finding for _, finding in sorted(zip(places, findings, strict=True), key=lambda pair: pair[0])]
    ordered.sort(key=lambda finding: finding["micro_step"])
    return len({finding["parameter"] for finding in findings}), ordered[:_NAMED]


def merged_statistics(ranks: list[dict[str, list[float]]]) -> dict[str, dict[str, float | int | None]]:
    """Add up what every rank counted, as `Statistics.end` orders it, as fractions of the elements seen."""
    merged = {}
    for layer in dict.fromkeys(layer for part in ranks for layer in part):  # a rank may not have used one
        parts = torch.tensor([part[layer] for part in ranks if layer in part], dtype=torch.float64)
        elements, zero, unscaled, scaled = parts[:, :-1].sum(0).tolist()
        largest = float(parts[:, -1].max())
        merged[layer] = {
            "elements": int(elements),
            "grad_max": largest if math.isfinite(largest) else None,
            "zero": zero / elements,
            "underflow_unscaled": unscaled / elements,
            "underflow_scaled": scaled / elements,
        }
    return merged


@torch.no_grad()
def first_bad_activation(module: nn.Module, losses: Iterator[Tensor]) -> str | None:
    """Run the forward pass of each loss; return the first module on this rank whose output is not finite, or None.

    Every rank must call, with as many losses: stage 3 gathers weights on the way.
    """
    bad: list[str] = []

    def look(name: str, part: nn.Module, inputs: Any, output: Any) -> None:
        tensors = (
            [output] if isinstance(output, Tensor) else [tensor for tensor in output if isinstance(tensor, Tensor)]
        )
        if not bad and any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
            bad.append(name)

    leaves = [(name, part) for name, part in module.named_modules() if not any(part.children())]
    hooks = [part.register_forward_hook(partial(look, name)) for name, part in leaves]
    try:
        for _ in losses:
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
