"""Draws the initial values of a model: a function of the seed alone, bitwise the same at every ZeRO stage and rank."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from halfstep.models.collective import gather_texts
from halfstep.models.hf_config import Unfit

Owned = tuple[nn.Module, PreTrainedModel]
"""A module and the (sub-)model whose `_init_weights` knows how to initialise it."""
Kind = tuple[type[nn.Module], str]
"""A class of modules and the name of one of its parameters."""
Constructed = Callable[[Kind, int], dict[str, Tensor]]
"""The values that a kind of parameter is given by its constructor, drawn from a seed, by the parameters' full names."""


def initialise(model: PreTrainedModel, seed: int, constructed: Constructed) -> None:
    """Draw every parameter in fp32 on the CPU, unit by unit, each unit from its own seed, and round it into the model.

    What a unit gets depends on the seed and its name alone, so any rank can draw any unit: at stage 3 the ranks draw
    one each at the same time, and no more than one is gathered at once. Parameters are tied before and drawn once. What
    `_init_weights` leaves alone keeps the value of its constructor. Raises Unfit on every rank where neither gives one.
    """
    units = list(units_of(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if partitioned else (0, 1)
    made = _Made(seed, constructed)
    drawn: set[int] = set()
    undrawn: list[str] = []
    for first in range(0, len(units), world_size):
        values = []
        for drawer, (name, modules) in enumerate(units[first : first + world_size]):
            values.append(_draw(name, modules, seed, skip=drawn, real=drawer == rank))
            drawn.update(id(parameter) for parameter, _ in values[-1])
        for drawer, pairs in enumerate(values):
            if drawer == rank:
                pairs = [(p, made.completed(names[id(p)], value, units[first + drawer][1])) for p, value in pairs]
            with torch.no_grad(), gathered([parameter for parameter, _ in pairs], modifier_rank=drawer):
                if drawer == rank:
                    for parameter, value in pairs:
                        parameter.copy_(value)
                    undrawn += [names[id(p)] for p, value in pairs if not value.isfinite().all()]
    if partitioned:  # a rank that stopped alone would leave the others waiting
        undrawn = [name for text in gather_texts("\n".join(undrawn)) for name in text.split()]
    if undrawn:
        raise Unfit(
            f"neither {type(model).__name__}._init_weights nor a constructor gives {undrawn[0]} a value"
            + (f", nor {len(undrawn) - 1} other parameters" if len(undrawn) > 1 else ""),
            "name a folder with trained weights of this model, which need no initial values",
        )


class _Made:
    """What constructors gave to parameters, asked for when it is needed: hardly any family has such."""

    def __init__(self, seed: int, constructed: Constructed) -> None:
        self._seed, self._constructed = seed, constructed
        self._known: dict[Kind, dict[str, Tensor]] = {}

    def completed(self, name: str, value: Tensor, modules: list[Owned]) -> Tensor:
        """Return a drawn value whose gaps are filled with what the constructor made."""
        gaps = value.isnan()
        if not gaps.any():
            return value
        leaf = name.rpartition(".")[2]
        for kind in {(type(module), leaf) for module, _ in modules if leaf in module._parameters}:
            if kind not in self._known:
                # Of its own seed: what one kind gets must not depend on which rank needs which others.
                self._known[kind] = self._constructed(kind, seed_of(f"{self._seed}:{kind[0].__qualname__}.{leaf}"))
            if name in self._known[kind]:
                return torch.where(gaps, self._known[kind][name].to(value.dtype), value)
        return value


def _draw(
    name: str, modules: list[Owned], seed: int, *, skip: set[int], real: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the unit's parameters that are not in `skip` and their values, on the meta device when not `real`.

    transformers' own `_init_weights` does the drawing, on stand-ins put in the parameters' place; what it forgets stays
    nan. Parameters in `skip` get stand-ins on the meta device, which cost nothing and forget what is written. Buffers
    (rotary frequencies) are set in place, and therefore on every rank.
    """
    stand_ins: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    places = [(module, key, p) for module, _ in modules for key, p in module._parameters.items() if p is not None]
    for _, _, parameter in places:
        device = "cpu" if real and id(parameter) not in skip else "meta"
        value = torch.full(shape_of(parameter), math.nan, dtype=torch.float32, device=device)
        stand_ins.setdefault(id(parameter), (parameter, nn.Parameter(value, requires_grad=False)))
    torch.random.default_generator.manual_seed(seed_of(f"{seed}:{name}"))  # pyright: ignore[reportPrivateImportUsage]
    try:
        for module, key, parameter in places:
            module._parameters[key] = stand_ins[id(parameter)][1]
        with torch.no_grad(), guard_torch_init_functions():
            for module, owner in modules:
                owner._init_weights(module)
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
    return [pair for identity, pair in stand_ins.items() if identity not in skip]


def seed_of(text: str) -> int:
    """Return the seed of what has a name."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def units_of(model: PreTrainedModel) -> Iterator[tuple[str, list[Owned]]]:
    """Yield (name, modules, children first) of the pieces that are gathered and initialised together.

    A unit is a transformer block (an entry of an outermost ModuleList), or a module above the blocks with its children
    that have no blocks: a parent's `_init_weights` may write its children's parameters, as GPT-2's blocks do.
    """

    def subtree(module: nn.Module, owner: PreTrainedModel) -> list[Owned]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        below = [pair for child in module.children() for pair in subtree(child, owner)]
        return [*below, (module, owner)]

    def walk(name: str, module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[str, list[Owned]]]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        rest: list[Owned] = []
        for key, child in module.named_children():
            path = f"{name}.{key}".lstrip(".")
            if isinstance(module, nn.ModuleList):
                yield path, subtree(child, owner)
            elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
                yield from walk(path, child, owner)
            else:
                rest += subtree(child, owner)
        yield name, [*rest, (module, owner)]

    yield from walk("", model, model)


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of a whole parameter: one that stage 3 has partitioned has the shape (0,) itself."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """Make partitioned parameters whole inside the block, and give all ranks what `modifier_rank` wrote there."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)
