"""Low-rank adapters (Hu et al. 2021, "LoRA"): which matrices have one, and the arithmetic of what that adds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from halfstep.models.shapes import Shape


class Linear(NamedTuple):
    """A layer that multiplies with a matrix."""

    name: str
    """Of the module, in the model."""
    inputs: int
    """Columns of what it multiplies, in elements."""
    outputs: int
    """Columns of what it makes, in elements."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters of a run: y = W x + alpha / rank * B A x, where A and B are trained and W is not."""

    rank: int
    """Rows of A and columns of B."""
    alpha: float
    """The product of A and B is scaled by alpha / rank."""
    dropout: float
    """Probability with which an element of x is left out before A."""
    targets: tuple[str, ...]
    """Names of the layers that have adapters, or ends of their names after a dot."""
    layers: int
    """How many those are."""
    parameters: int
    """Elements of all A and B."""


def linear_layers(shape: Shape) -> tuple[Linear, ...]:
    """Return the linear layers of a known family, in the model's order, the head last."""
    h, f, query, kv = shape.width, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.family == "gpt2":
        blocks = "transformer.h"
        block = (("attn.c_attn", h, 3 * h), ("attn.c_proj", h, h), ("mlp.c_fc", h, f), ("mlp.c_proj", f, h))
    else:
        blocks = "model.layers"
        attention = (("q_proj", h, query), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", query, h))
        feed = (("gate_proj", h, f), ("up_proj", h, f), ("down_proj", f, h))
        block = (*((f"self_attn.{name}", *size) for name, *size in attention),
                 *((f"mlp.{name}", *size) for name, *size in feed))  # fmt: skip
    every = [
        Linear(f"{blocks}.{number}.{name}", inputs, outputs)
        for number in range(shape.layers)
        for name, inputs, outputs in block
    ]
    return (*every, Linear("lm_head", h, shape.vocabulary))


def is_named(name: str, targets: Iterable[str]) -> bool:
    """Tell whether a target is a module's name, or the end of it after a dot: what peft's `target_modules` mean."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def shortest_names(layers: Sequence[Linear], others: Iterable[str]) -> tuple[str, ...]:
    """Return the fewest ends of names that mean these layers and none of some other modules, in the model's order."""
    others, short = list(others), dict[str, None]()
    for layer in layers:
        parts = layer.name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
        plain = (end for end in ends if not end[0].isdigit() and not any(is_named(other, [end]) for other in others))
        short[next(plain, layer.name)] = None
    return tuple(short)


def matrices(layers: Iterable[Linear], rank: int) -> tuple[int, ...]:
    """Return the elements of A and of B of every layer, in the model's order."""
    return tuple(rank * size for layer in layers for size in (layer.inputs, layer.outputs))


def flops_per_token(multiplied: int, parameters: int, attention: float) -> float:
    """Return the FLOPs of a token, forward and backward, with frozen matrices of `multiplied` elements.

    They have no gradient of their own: 4 for each element and not 6. `parameters` are the adapters'; `attention` is
    L h s, as in `shapes.flops_per_token`.
    """
    return 4.0 * multiplied + 6.0 * parameters + 6.0 * attention
