"""What only kernels can get wrong: blocks, strides, offsets, rows that are not to be read (for test_loss_kernel.py)."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.models import loss as loss_module
from halfstep.models import loss_kernels
from halfstep.models.loss import next_token_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def several_blocks_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_kernels, "BLOCK", 32)


def drawn(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def by_chunks(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, *arguments, scale: float = 1.0, **others):
    """Return loss and gradient of the function that a CPU has."""
    logits = logits.detach().clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(loss_module, "implementation", lambda device: "chunks")
        value = next_token_loss(logits, *arguments, **others)
        (value * scale).backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 31), (3, 32), (2, 33), (5, 257), (2, 1000)])
def test_the_kernels_give_what_the_chunks_give(rows: int, vocabulary: int, dtype: torch.dtype, monkeypatch) -> None:
    logits, targets = drawn(rows, vocabulary, dtype)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
    targets[2:3] = -100
    for others in ({}, {"weights": weights, "reduction": "sum"}):
        logits.grad = None
        loss = next_token_loss(logits, targets, **others)
        (loss * 2.0**12).backward()
        expected, gradient = by_chunks(monkeypatch, logits, targets, scale=2.0**12, **others)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits.grad, gradient, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-5)


def test_blocks_as_large_as_a_gpus_take_a_vocabulary_of_50257(monkeypatch) -> None:
    monkeypatch.setattr(loss_kernels, "BLOCK", 4096)
    logits, targets = drawn(2, 50257, torch.float16)
    loss = next_token_loss(logits, targets)
    (loss * 2.0**16).backward()
    expected, gradient = by_chunks(monkeypatch, logits, targets, scale=2.0**16)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, gradient, rtol=2e-3, atol=1e-6)


def test_rows_that_do_not_count_are_not_read() -> None:
    logits, targets = drawn(3, 70)
    logits.data[1:] = math.nan
    targets[1] = -100
    weights = torch.tensor([1.0, 1.0, 0.0])
    alone = next_token_loss(logits[:1], targets[:1]).item()
    loss = next_token_loss(logits, targets, weights=weights)
    loss.backward()
    assert loss.item() == alone
    assert (logits.grad[1:] == 0).all()
    assert logits.grad[0].isfinite().all()


def test_a_whole_block_of_logits_may_be_minus_infinity(monkeypatch) -> None:
    logits, targets = drawn(2, 100)
    logits.data[0, :40] = -math.inf
    logits.data[1, 40:] = -math.inf
    targets = torch.tensor([50, 3])
    loss = next_token_loss(logits, targets)
    loss.backward()
    expected, gradient = by_chunks(monkeypatch, logits, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, gradient)
    assert (logits.grad[0, :40] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_the_loss_nan(value: float) -> None:
    logits, targets = drawn(2, 70)
    logits.data[1, 65] = value
    loss = next_token_loss(logits, targets)
    loss.backward()
    assert loss.isnan()
    assert logits.grad[1].isnan().all()
    assert logits.grad[0].isfinite().all()


@pytest.mark.parametrize("target", [-1, 70, 2**40])
def test_a_target_beyond_the_vocabulary_reads_no_other_row_and_makes_the_loss_nan(target: int) -> None:
    logits, targets = drawn(2, 70)
    targets[0] = target
    loss = next_token_loss(logits, targets)
    loss.backward()
    assert loss.isnan()
    assert logits.grad[0].isnan().all()
    assert logits.grad[1].isfinite().all()


def test_logits_cut_from_a_padded_vocabulary_are_read_where_they_are(monkeypatch) -> None:
    padded = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[1, 2, 3], [4, 5, 69]])
    loss = next_token_loss(padded[..., :70], targets)
    loss.backward()
    expected, gradient = by_chunks(monkeypatch, padded[..., :70], targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(padded.grad[..., :70], gradient)
    assert (padded.grad[..., 70:] == 0).all()


def test_rows_targets_and_weights_may_lie_in_any_order(monkeypatch) -> None:
    logits = torch.randn(70, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    table = torch.arange(8).reshape(4, 2)
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(1))
    loss = next_token_loss(logits.T, table[:, 1], weights=weights[:, 1])
    loss.backward()
    expected, gradient = by_chunks(monkeypatch, logits.T, table[:, 1], weights=weights[:, 1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, gradient.T)


def test_a_row_may_begin_beyond_two_to_the_31_elements(monkeypatch) -> None:
    # Untouched pages of this take no memory.
    stride = 2**30 + 7
    logits = torch.empty(2 * stride + 40, dtype=torch.float16).as_strided((3, 40), (stride, 1))
    logits.copy_(drawn(3, 40)[0].detach())
    targets = torch.tensor([0, 7, 39])
    loss = next_token_loss(logits, targets)
    expected, _ = by_chunks(monkeypatch, logits.contiguous(), targets)
    torch.testing.assert_close(loss, expected)


def test_no_value_is_asked_of_the_device_and_the_operators_do_not_grow_with_the_rows() -> None:
    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.names.append(operator.name())
            return operator(*args, **(kwargs or {}))

    def operators(rows: int) -> list[str]:
        logits, targets = drawn(rows, 40, torch.float16)
        weights = torch.ones(rows)
        with Counted() as counted:
            next_token_loss(logits, targets, weights=weights).backward()
        return counted.names

    names = operators(2)
    assert operators(64) == names
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"} & set(names)
