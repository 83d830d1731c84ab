"""The loss against fp64 cross-entropy: its value, its gradient, its behaviour under loss scaling and its memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from halfstep.models import loss as loss_module
from halfstep.models.loss import next_token_loss

HALF = [torch.bfloat16, torch.float16]


def batch(
    dtype: torch.dtype, *, rows: int = 6, vocabulary: int = 50, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(2, rows, vocabulary, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (2, rows), generator=generator)
    targets[0, ::3] = -100
    return logits, targets


def reference(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> tuple[float, torch.Tensor]:
    exact = logits.detach().double().requires_grad_()
    value = cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction=reduction)
    value.backward()
    return value.item(), exact.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_value_and_gradient_are_those_of_fp64_rounded_once(dtype: torch.dtype, reduction: str):
    logits, targets = batch(dtype)
    value, gradient = reference(logits, targets, reduction)
    loss = next_token_loss(logits, targets, reduction=reduction)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad.dtype == dtype
    # One rounding to the type of the logits, and an fp32 computation before it.
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-7)


@given(rows=st.integers(1, 9), vocabulary=st.integers(1, 40), chunk=st.integers(1, 400), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_any_chunk_size_gives_the_same_result(rows: int, vocabulary: int, chunk: int, seed: int):
    logits, targets = batch(torch.float64, rows=rows, vocabulary=vocabulary, seed=seed)
    kept, loss_module.CPU_CHUNK_ELEMENTS = loss_module.CPU_CHUNK_ELEMENTS, chunk
    try:
        loss = next_token_loss(logits, targets)
        loss.backward()
    finally:
        loss_module.CPU_CHUNK_ELEMENTS = kept
    value, gradient = reference(logits, targets, "sum")
    count = max(1, int((targets != -100).sum()))
    assert loss.item() == pytest.approx(value / count, abs=1e-12)
    torch.testing.assert_close(logits.grad, gradient / count, rtol=1e-12, atol=1e-14)


def test_the_gradient_passes_gradcheck_also_through_strided_logits():
    logits, targets = batch(torch.float64, rows=3, vocabulary=7)
    assert torch.autograd.gradcheck(lambda x: next_token_loss(x, targets), (logits,))
    shifted, kept = logits[:, :-1], targets[:, 1:]
    assert torch.autograd.gradcheck(lambda x: next_token_loss(x[:, :-1], kept), (logits,))
    assert not shifted.is_contiguous()


def test_ignored_rows_get_exactly_zero_even_under_an_infinite_upstream_gradient():
    logits, targets = batch(torch.float16)
    next_token_loss(logits, targets).mul(math.inf).backward()
    ignored = targets == -100
    assert (logits.grad[ignored] == 0).all()
    assert not logits.grad[~ignored].isfinite().all()


def test_weights_multiply_each_loss_and_its_gradient():
    logits, targets = batch(torch.float64, rows=3, vocabulary=7)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[1, 0] = 0
    assert torch.autograd.gradcheck(lambda x: next_token_loss(x, targets, weights=weights), (logits,))
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    total = (each * weights.flatten()).sum().item()
    assert next_token_loss(logits, targets, weights=weights, reduction="sum").item() == pytest.approx(total)
    counted = weights[targets != -100].sum().item()
    assert next_token_loss(logits, targets, weights=weights).item() == pytest.approx(total / counted)


def test_another_ignore_index_is_honoured():
    logits, targets = batch(torch.float32)
    targets = torch.where(targets == -100, 7, targets)
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=7)
    assert next_token_loss(logits, targets, ignore_index=7).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_ignored_rows_has_loss_zero_and_gradient_zero(reduction: str):
    logits, targets = batch(torch.bfloat16)
    loss = next_token_loss(logits, torch.full_like(targets, -100), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("power", [16, 24])
def test_loss_scaling_is_applied_before_the_rounding_to_fp16(power: int):
    logits, targets = batch(torch.float16, rows=64, vocabulary=500)
    value, gradient = reference(logits, targets)
    loss = next_token_loss(logits, targets)
    (loss * 2.0**power).backward()
    expected = (gradient * 2.0**power).half()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    if power == 16:
        # Unscaled, most of these probabilities are less than fp16's smallest number.
        assert (gradient.half() == 0).sum() > (expected == 0).sum()
        assert logits.grad.isfinite().all()
    else:
        assert logits.grad.isinf().any()
    assert not logits.grad.isnan().any()
    torch.testing.assert_close(logits.grad, expected, rtol=2e-3, atol=1e-6)


def test_a_gradient_beyond_fp16_is_inf_and_never_nan():
    logits, targets = batch(torch.float16)
    (next_token_loss(logits, targets) * 2.0**32).backward()
    valid = logits.grad[targets != -100]
    assert valid.isinf().any()
    assert not valid.isnan().any()


def test_logits_far_apart_do_not_overflow():
    logits = torch.tensor([[[6e4, -6e4, 0.0]]], dtype=torch.float16, requires_grad=True)
    loss = next_token_loss(logits, torch.tensor([[1]]))
    loss.backward()
    # fp16 holds 6e4 as 60000 exactly.
    assert loss.item() == 120000.0
    assert logits.grad.flatten().tolist() == [1.0, -1.0, 0.0]


def test_the_logits_are_left_as_they_were():
    logits, targets = batch(torch.bfloat16)
    before = logits.detach().clone()
    next_token_loss(logits, targets).backward()
    assert torch.equal(before, logits.detach())


def test_no_graph_is_kept_without_gradients():
    logits, targets = batch(torch.float32)
    with torch.no_grad():
        assert next_token_loss(logits, targets).grad_fn is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "mean or sum, not 'none'"),
        ({"targets": torch.zeros(2, 5, dtype=torch.long)}, r"need targets \(2, 6\), not \(2, 5\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict, message: str):
    logits, targets = batch(torch.float32)
    with pytest.raises(ValueError, match=message):
        next_token_loss(logits, **{"targets": targets, **change})


def peak_bytes(step) -> int:
    """Return the most bytes alive at once, by the CPU allocator's own record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def test_sixteen_bit_logits_cost_under_six_bytes_each_where_transformers_takes_fourteen():
    batch_size, sequence, vocabulary = 4, 256, 8192
    targets = torch.randint(0, vocabulary, (batch_size, sequence))
    hidden = torch.randn(batch_size, sequence, 8, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(8, vocabulary, dtype=torch.bfloat16)
    elements = batch_size * sequence * vocabulary

    def step(loss) -> None:
        logits = hidden @ head  # held until the end, as a model's output is
        loss(logits).backward()

    ours = peak_bytes(lambda: step(lambda logits: next_token_loss(logits, targets)))
    theirs = peak_bytes(lambda: step(lambda logits: ForCausalLMLoss(logits, None, vocabulary, shift_labels=targets)))
    assert 4 * elements <= ours < 4.5 * elements
    assert 14 * elements <= theirs < 14.5 * elements
