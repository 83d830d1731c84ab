"""Activations: the planner's coefficients against the tensors that autograd saves, and numbers worked out by hand."""

import dataclasses

import pytest
import torch

from halfstep.launcher.forecast.activations import activations
from halfstep.launcher.forecast.workload import Workload
from halfstep.models import shapes
from halfstep.models.network import build
from halfstep.models.presets import PRESETS
from halfstep.models.shapes import Shape


def make(shape: Shape, **more: object) -> Workload:
    base = {
        "zero": 0,
        "precision": "bf16",
        "ranks": 1,
        "ranks_per_node": 1,
        "micro": 2,
        "accumulation": 1,
        "sequence": 64,
        "accelerator": "cpu",
    }
    return Workload(shape=shape, parameters=shapes.parameters(shape), **{**base, **more})  # type: ignore[arg-type]


def saved(shape: Shape, workload: Workload) -> int:
    """Return the bytes that a forward pass saves, parameters and the logits not counted."""
    dtype = torch.float32 if workload.precision == "fp32" else torch.bfloat16
    autocast = torch.autocast("cpu", torch.bfloat16, workload.autocast)
    model = build(
        shapes.hf_config(shape), seed=1, dtype=dtype, activation_checkpointing=workload.activation_checkpointing
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    tokens = torch.arange(workload.micro * workload.sequence).reshape(workload.micro, -1) % shape.vocabulary
    places = torch.arange(workload.sequence).remainder(workload.sequence // 2).expand(workload.micro, -1)
    documents = {"position_ids": places} if workload.documents_apart else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        logits = model(input_ids=tokens, **documents).logits
    assert logits.shape[-1] == shape.vocabulary
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32", "bf16-autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano"])
def test_a_block_keeps_what_the_planner_says(preset: str, dropout: float, precision: str) -> None:
    sizes = []
    for layers in (2, 4):
        shape = shapes.shape_of(PRESETS[preset], layers=layers, vocabulary=96, dropout=dropout)
        weights, _, autocast = precision.partition("-")
        kind = {"precision": "fp32", "products": weights} if autocast else {"precision": weights}
        workload = make(shape, **kind)
        sizes.append((saved(shape, workload), activations(workload)))
    (two, predicted), (four, more) = sizes
    assert (four - two) / 2 == pytest.approx((more.kept - predicted.kept) / 2, rel=0.03)
    assert four == pytest.approx(more.kept + more.ends, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano"])
def test_every_attention_keeps_a_mask_of_documents_and_what_it_cannot_do_with_one(preset: str, precision: str) -> None:
    shape = shapes.shape_of(PRESETS[preset], layers=3, vocabulary=96, dropout=0.0)
    plain = make(shape, precision=precision)
    masked = dataclasses.replace(plain, documents_apart=True)
    pairs, element = 2 * 64 * 64, 4 if precision == "fp32" else 2
    copied = 2 * (shape.heads - shape.kv_heads) * shape.head_dim * 2 * 64  # keys and values, for every head
    assert (copied > 0) == (preset == "llama-nano")
    assert activations(masked).kept - activations(plain).kept == 3 * element * (pairs + copied)
    assert activations(masked).ends - activations(plain).ends == pairs  # one boolean for each, for all layers
    angles = 2 * element * (2 * 64 - 64) * shape.head_dim if preset == "llama-nano" else 0  # of every row's positions
    assert saved(shape, masked) - saved(shape, plain) == 3 * element * (pairs + copied) + angles


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano"])
def test_with_checkpointing_only_the_inputs_of_the_blocks_stay(preset: str) -> None:
    shape = shapes.shape_of(PRESETS[preset], layers=6, vocabulary=96)
    workload = make(shape, activation_checkpointing=True)
    predicted = activations(workload)
    assert predicted.kept == 6 * 2 * 64 * 128 * 2
    assert saved(shape, workload) >= predicted.ends


def test_gpt2_124m_at_1024_tokens_by_hand() -> None:
    shape = shapes.shape_of(PRESETS["gpt2-124m"])
    kept = activations(make(shape, micro=4, sequence=1024, accelerator="cuda"))
    tokens = 4 * 1024
    assert kept.block == tokens * (32 * 768 + 4 * 12)
    assert kept.kept == 12 * kept.block
    assert kept.logits == tokens * 50304 * 2
    assert kept.loss == kept.logits + 20 * tokens
    hf = activations(make(shape, micro=4, sequence=1024, accelerator="cuda", fused_loss=False))
    assert hf.logits + hf.loss == 14 * tokens * 50304
    again = activations(dataclasses.replace(make(shape, micro=4, sequence=1024), activation_checkpointing=True))
    assert again.kept == 12 * tokens * 768 * 2
