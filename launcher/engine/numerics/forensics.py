"""Look at gradients while the backward pass makes them: which were not finite first, and what fp16 would lose of them.

DeepSpeed takes a gradient away as soon as it is made (stages 1 to 3), so it is seen by a hook on its parameter, before
any reduction: what is found belongs to one rank, one micro-step and one parameter.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.launcher.engine.untyped import Engine
from halfstep.models.micro_batch import MicroBatch

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


class GradientWatch:
    """Hooks on every parameter of a model; read after the backward passes of a step."""

    def __init__(self, module: nn.Module, *, in_fp16: bool) -> None:
        self._in_fp16 = in_fp16
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._sums: list[tuple[int, int, Tensor]] = []
        self._statistics: dict[str, Tensor] | None = None
        self._micro_step, self._scale, self._carried = 1, 1.0, 1.0
        parameters = (parameter for parameter in module.parameters() if parameter.requires_grad)
        for number, parameter in enumerate(parameters):
            parameter.register_hook(partial(self._see, number))

    def start_step(self) -> None:
        """Forget the last step."""
        self._sums, self._statistics, self._micro_step = [], None, 1

    def measure(self, *, scale: float, carried: float) -> None:
        """Take statistics too in this step, for a loss scale of which the gradients carry `carried` already."""
        self._statistics, self._scale, self._carried = {}, scale, carried

    def next_micro_step(self) -> None:
        """Tell that a backward pass has ended."""
        self._micro_step += 1

    def _see(self, number: int, gradient: Tensor) -> None:
        # A sum is not finite if any element is not, costs one pass, and stays on the device until somebody asks.
        self._sums.append((self._micro_step, number, gradient.sum(dtype=torch.float32)))
        if self._statistics is not None:
            layer = layer_of(self._names[number])
            measured = self._measure(gradient)
            known = self._statistics.get(layer)
            if known is not None:
                measured = torch.cat([measured[:-1] + known[:-1], torch.maximum(measured[-1:], known[-1:])])
            self._statistics[layer] = measured

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

    def non_finite(self) -> list[dict[str, Any]]:
        """Return the parameters whose gradient was not finite on this rank, in the order they came, each once."""
        if not self._sums:
            return []
        finite = torch.stack([total for _, _, total in self._sums]).isfinite().tolist()
        first_seen: dict[int, int] = {}
        for (micro_step, number, _), good in zip(self._sums, finite, strict=True):
            if not good:
                first_seen.setdefault(number, micro_step)
        return [
            {"parameter": self._names[number], "layer": layer_of(self._names[number]), "micro_step": micro_step}
            for number, micro_step in first_seen.items()
        ]

    def statistics(self) -> dict[str, list[float]]:
        """Return this rank's counts by layer, as `_measure` orders them, in the model's order."""
        layers = self._statistics or {}
        order = dict.fromkeys(layer_of(name) for name in self._names)
        return {layer: layers[layer].tolist() for layer in order if layer in layers}


def first_of(ranks: list[list[dict[str, Any]]]) -> tuple[int, list[dict[str, Any]]]:
    """Merge what every rank found: how many parameters in all, and the first of them with their ranks."""
    findings = [{**finding, "rank": rank} for rank, part in enumerate(ranks) for finding in part]
    places = [place for part in ranks for place in range(len(part))]
    ordered = [finding for _, finding in sorted(zip(places, findings, strict=True), key=lambda pair: pair[0])]
    ordered.sort(key=lambda finding: finding["micro_step"])
    return len({finding["parameter"] for finding in findings}), ordered[:_NAMED]


def merged_statistics(ranks: list[dict[str, list[float]]]) -> dict[str, dict[str, float | int | None]]:
    """Add up what every rank counted, as `GradientWatch.statistics` orders it, as fractions of the elements seen."""
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
def first_bad_activation(engine: Engine, batches: Iterator[MicroBatch]) -> str | None:
    """Run the forward pass again and return the first module on this rank whose output is not finite, or None.

    Every rank must call, with as many batches: stage 3 gathers weights on the way.
    """
    bad: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = (
            [output] if isinstance(output, Tensor) else [tensor for tensor in output if isinstance(tensor, Tensor)]
        )
        if not bad and any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
            bad.append(name)

    leaves = [(name, module) for name, module in engine.module.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in leaves]
    try:
        for batch in batches:
            batch.logits(engine)
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
