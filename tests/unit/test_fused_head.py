"""The head and the loss in one: the loss and the gradients of the two apart, with an eighth of the logits."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.launcher.forecast.activations import activations
from halfstep.launcher.forecast.workload import Workload
from halfstep.models import shapes
from halfstep.models.fused_head import FusedHead, loss_of
from halfstep.models.loss import IGNORED
from halfstep.models.micro_batch import MicroBatch
from halfstep.models.network import build, skeleton
from halfstep.models.observe import observe
from halfstep.models.presets import PRESETS

ROWS, LENGTH, WIDTH, WORDS = 3, 11, 8, 50


class Model(nn.Module):
    """A head over hidden states that are given, as a model of transformers has one."""

    def __init__(self, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.states = nn.Parameter(torch.randn(ROWS, LENGTH, WIDTH).to(dtype))
        self.head = nn.Linear(WIDTH, WORDS, bias=bias).to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        return type("Output", (), {"logits": self.head(self.states)})()


def batch(*, ignored: int = 0, weighted: bool = False) -> MicroBatch:
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH + 1), generator=random)
    made = MicroBatch.of_windows(tokens)
    targets = made.targets.clone()
    targets.view(-1)[:ignored] = IGNORED
    weights = torch.rand(ROWS, LENGTH, generator=random) if weighted else None
    return MicroBatch(made.inputs, targets, weights=weights)


def trained(model: Model, given: MicroBatch, scale: float = 1.0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = loss_of(model)(given, model, **options)
    loss.mul(scale).backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given", [{}, {"ignored": 7}, {"weighted": True}, {"ignored": 4, "weighted": True}])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_and_every_gradient_are_those_of_head_and_loss_apart(
    bias: bool, given: dict[str, Any], reduction: str
) -> None:
    apart, fused = Model(torch.float64, bias), Model(torch.float64, bias)
    FusedHead(fused.head, WORDS)
    for rows in (None, 2):
        expected = trained(apart, batch(**given), rows=rows, reduction=reduction)
        torch.testing.assert_close(
            trained(fused, batch(**given), rows=rows, reduction=reduction), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_gradients_are_rounded_where_they_are_apart(dtype: torch.dtype) -> None:
    apart, fused = Model(dtype), Model(dtype)
    FusedHead(fused.head, WORDS)
    loss, (states, head) = trained(apart, batch(), scale=2.0**10)
    own_loss, (own_states, own_head) = trained(fused, batch(), scale=2.0**10)
    torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(own_states, states)
    largest = float(head.float().abs().max())
    torch.testing.assert_close(own_head.float(), head.float(), rtol=0, atol=2 * torch.finfo(dtype).eps * largest)


def test_small_gradients_survive_fp16_because_the_loss_scale_comes_before_rounding() -> None:
    model = Model(torch.float16)
    FusedHead(model.head, WORDS)
    _, (states, _) = trained(model, batch(), scale=2.0**-14 / (ROWS * LENGTH))
    lost = int((states == 0).sum())
    model.zero_grad()
    _, (states, _) = trained(model, batch(), scale=2.0**10)
    assert lost > 0
    assert int((states == 0).sum()) == 0


def test_without_targets_that_count_the_loss_and_the_gradients_are_zero() -> None:
    model = Model(torch.float32)
    FusedHead(model.head, WORDS)
    loss, gradients = trained(model, batch(ignored=ROWS * LENGTH))
    assert loss.item() == 0
    assert all(int(gradient.count_nonzero()) == 0 for gradient in gradients)
    assert loss_of(model)(batch(), model, rows=0, reduction="sum").item() == 0


def test_a_head_that_is_not_asked_for_a_loss_returns_logits() -> None:
    model = Model(torch.float32)
    logits = batch().logits(model)
    FusedHead(model.head, WORDS)
    assert torch.equal(batch().logits(model), logits)
    with pytest.raises(RuntimeError):
        loss_of(model)(batch(), _fail)
    assert torch.equal(batch().logits(model), logits), "what went wrong has not left it asking"


def _fail(**inputs: Any) -> None:
    raise RuntimeError


def test_autocast_is_the_same_in_both_passes() -> None:
    apart, fused = Model(torch.float32), Model(torch.float32)
    FusedHead(fused.head, WORDS)
    made = []
    for model in (apart, fused):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)(batch(), model)
        loss.backward()
        made.append((loss.detach(), model.states.grad))
    torch.testing.assert_close(made[1], made[0], rtol=1e-6, atol=1e-8)


def test_hooks_on_the_head_see_its_whole_gradient_once() -> None:
    """The watch on gradients and the search for the first that is not finite hang there."""
    model, seen = Model(torch.float32), []
    FusedHead(model.head, WORDS)
    model.head.weight.register_hook(seen.append)
    _, (_, head) = trained(model, batch())
    (whole,) = seen
    assert torch.equal(whole, head)
    assert isinstance(model.head.weight, nn.Parameter)


def test_a_frozen_head_passes_the_gradient_on() -> None:
    apart, fused = Model(torch.float32), Model(torch.float32)
    for model in (apart, fused):
        model.head.requires_grad_(requires_grad=False)
    FusedHead(fused.head, WORDS)
    torch.testing.assert_close(trained(fused, batch()), trained(apart, batch()), rtol=1e-6, atol=1e-8)


class Largest(TorchDispatchMode):
    """Find the largest tensor with a column for each token of the vocabulary."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, Tensor) and value.shape[-1:] == (WORDS,) and value.shape != (WIDTH, WORDS):
                self.elements = max(self.elements, value.numel())
        return made


def test_no_more_than_an_eighth_of_the_logits_is_there_at_a_time() -> None:
    model = Model(torch.float32)
    with Largest() as apart:
        trained(model, batch())
    FusedHead(model.head, WORDS)
    with Largest() as fused:
        trained(model, batch())
    assert apart.elements == ROWS * LENGTH * WORDS
    assert fused.elements == 5 * WORDS, "33 tokens, five at a time"


@pytest.mark.parametrize(
    ("family", "plain"),
    [("gpt2", True), ("llama", True), ("qwen3", True), ("gemma2", False), ("granite", False), ("cohere", False)],
)
def test_logits_that_are_changed_after_the_head_are_seen(family: str, plain: bool) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
             "vocab_size": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
             "num_hidden_layers": 1, "head_dim": 8}  # fmt: skip
    small |= {"n_embd": 32, "n_head": 4, "n_layer": 1} if family == "gpt2" else {}
    small |= {"logits_scaling": 2.0} if family == "granite" else {}
    assert observe(skeleton({"model_type": family, **small})).plain_head is plain


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano"])
def test_a_whole_model_has_the_same_gradients(preset: str) -> None:
    shape = shapes.shape_of(PRESETS[preset], layers=2, vocabulary=64)
    tokens = torch.arange(66).reshape(2, 33) % 64
    made = []
    for is_fused in (False, True):
        model = build(shapes.hf_config(shape), seed=1)
        if is_fused:
            FusedHead(model.get_output_embeddings(), 64)
        loss = loss_of(model)(MicroBatch.of_windows(tokens), model)
        loss.backward()
        made.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-7)


def test_the_planner_knows_an_eighth_of_the_logits_and_the_sums_of_the_head() -> None:
    shape = shapes.shape_of(PRESETS["gpt2-124m"])
    base: dict[str, Any] = {"zero": 1, "precision": "bf16", "ranks": 1, "ranks_per_node": 1, "accumulation": 1}
    work = Workload(
        shape=shape,
        parameters=shapes.parameters(shape),
        micro=32,
        sequence=1024,
        accelerator="cuda",
        fused_head=True,
        **base,
    )
    kept, apart = activations(work), activations(dataclasses.replace(work, fused_head=False))
    chunk = (1 << 27) // 50304
    assert chunk < 32 * 1024 / 8
    hidden, head = 2 * 768 * 32 * 1024, 50304 * 768
    assert kept.logits == 0
    assert kept.made == 2 * 50304 * chunk
    assert kept.loss == 2 * kept.made + 20 * chunk + hidden + 8 * head
    assert apart.logits == apart.made == 2 * 50304 * 32 * 1024
    assert apart.loss == apart.logits + 20 * 32 * 1024
    assert shapes.head_tokens(8192, 50304, on_cpu=True) == 333
