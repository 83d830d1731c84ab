"""Gradients watched in the backward pass: what was not finite first, and what fp16 would lose of each layer."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from halfstep.launcher.engine.numerics.forensics import (
    Statistics,
    first_bad_gradients,
    first_of,
    layer_of,
    leaves_unreduced,
    merged_statistics,
)
from halfstep.launcher.engine.state import rng


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("transformer.h.3.mlp.c_fc.weight", "transformer.h.3"),
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11"),
        ("transformer.wte.weight", "transformer.wte"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_parameter_belongs_to_its_block_or_else_its_module(parameter: str, layer: str) -> None:
    assert layer_of(parameter) == layer


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def test_the_first_bad_gradient_is_the_first_one_behind_the_poison() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))

    def losses() -> Iterator[torch.Tensor]:
        yield model(torch.ones(1, 2)).sum()
        yield model[2](_Poison.apply(model[1](model[0](torch.ones(1, 2))))).sum()

    seen = first_bad_gradients(model, losses())
    # The last layer comes before the poison; its weights and biases stay finite.
    assert {gradient["layer"] for gradient in seen[:2]} == {"1"}
    assert {gradient["layer"] for gradient in seen[2:]} == {"0"}
    assert all(gradient["micro_step"] == 2 for gradient in seen)
    assert first_bad_gradients(model, iter([model(torch.ones(1, 2)).sum()])) == [], "no hook of the last call is left"


def test_looking_for_bad_gradients_touches_no_gradient_and_wakes_nothing_that_waits_for_one() -> None:
    model, woken = nn.Linear(2, 2), []
    model(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(woken.append)  # as DeepSpeed does (utils/torch.py)
    bad = first_bad_gradients(model, iter([model(torch.full((1, 2), math.inf)).sum()]))
    assert [gradient["parameter"] for gradient in bad] == ["weight"]
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert woken == []


def test_a_weight_used_twice_is_seen_once_as_the_sum_of_both() -> None:
    model = nn.Embedding(2, 2, dtype=torch.float16)
    largest = torch.finfo(torch.float16).max
    both = (model.weight * largest).sum() + (model.weight * largest).sum()
    assert [gradient["parameter"] for gradient in first_bad_gradients(model, iter([both]))] == ["weight"]
    assert first_bad_gradients(model, iter([(model.weight * largest).mean()])) == []


def test_dropout_draws_again_what_it_drew_and_then_goes_on() -> None:
    torch.manual_seed(1)
    before = rng.drawn()
    first, second = torch.rand(3), torch.rand(3)
    torch.manual_seed(1)
    torch.rand(3)
    with rng.as_drawn(before):
        again = torch.rand(3)
    assert torch.equal(again, first)
    assert torch.equal(torch.rand(3), second)


def test_a_leaf_module_is_reduced_again_only_after_the_look() -> None:
    model, reduced = nn.Sequential(nn.Linear(2, 2)), []
    handle = model[0].register_full_backward_hook(lambda *_: reduced.append(None))
    engine = SimpleNamespace(optimizer=SimpleNamespace(_leaf_module_hooks=[handle]))
    with leaves_unreduced(engine):
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert reduced == []
    model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert reduced == [None]
    with leaves_unreduced(SimpleNamespace(optimizer=None)):
        pass


def test_ranks_are_merged_in_the_order_of_micro_steps_and_of_the_backward_pass() -> None:
    late = {"parameter": "a", "layer": "", "micro_step": 2}
    early, next_ = ({"parameter": name, "layer": "", "micro_step": 1} for name in ("b", "c"))
    count, first = first_of([[late], [early, next_]])
    assert count == 3
    assert [(gradient["parameter"], gradient["rank"]) for gradient in first] == [("b", 1), ("c", 1), ("a", 0)]
    assert first_of([[], []]) == (0, [])
    many = [{"parameter": str(n), "layer": "", "micro_step": 1} for n in range(9)]
    count, first = first_of([many, many])
    assert count == 9
    assert [(gradient["parameter"], gradient["rank"]) for gradient in first] == [
        ("0", 0),
        ("0", 1),
        ("1", 0),
        ("1", 1),
        ("2", 0),
    ]


def weigh(dtype: torch.dtype, gradients: list[list[float]], *, scale: float, carried: float) -> dict:
    """Return the statistics of one 2-D parameter whose gradient, as computed, is `gradients`."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(len(gradients), len(gradients[0]), dtype=dtype))
    counting = Statistics(model, in_fp16=dtype == torch.float16, scale=scale, carried=carried)
    (model.weight * torch.tensor(gradients, dtype=dtype)).sum().backward()
    counted = counting.end()
    (model.weight * torch.tensor(gradients, dtype=dtype)).sum().backward()
    assert str(counting.end()) == str(counted), "nothing is counted after the end"
    return merged_statistics([counted, counted])[""]


def test_underflow_in_fp32_is_counted_at_the_threshold_with_and_without_a_scale() -> None:
    below, at, above = 2.0**-26, 2.0**-25, 2.0**-25 * 1.01
    seen = weigh(
        torch.float32, [[0.0, below, at, above], [1.0, 2.0**-42, -(2.0**-30), -0.5]], scale=2.0**16, carried=1.0
    )
    assert seen == {
        "elements": 16,
        "grad_max": 1.0,
        "zero": 1 / 8,
        "underflow_unscaled": 4 / 8,
        "underflow_scaled": 1 / 8,
    }


def test_in_fp16_what_is_zero_in_a_touched_row_was_lost_at_the_scale() -> None:
    scale = 2.0**10
    # As stored, times the scale: 2^-20 is 2^-30 in truth, which fp16 could not hold without scaling.
    seen = weigh(torch.float16, [[0.0, 2.0**-20, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]], scale=scale, carried=scale)
    assert seen["grad_max"] == 2.0 / scale
    assert seen["zero"] == 5 / 8
    assert seen["underflow_scaled"] == 1 / 8, "the second row was not touched at all"
    assert seen["underflow_unscaled"] == 2 / 8, "without the scale, that one would be lost as well"


def test_a_gradient_that_is_not_finite_has_no_maximum() -> None:
    assert weigh(torch.float32, [[math.inf, 1.0]], scale=1.0, carried=1.0)["grad_max"] is None
    assert weigh(torch.float32, [[math.nan, 1.0]], scale=1.0, carried=1.0)["grad_max"] is None
