"""What only a GPU can show of the loss: its compiled kernels keep the contract, and nothing waits for the device."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from halfstep.launcher.system import machine
from halfstep.models import loss as loss_module
from halfstep.models.loss import implementation, next_token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.gpu_count() == 0, reason="no GPU on this machine: nothing was measured"),
]
VOCABULARY = 50257


def drawn(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 4 * torch.randn(rows, VOCABULARY, generator=generator, device="cuda", dtype=dtype)
    return logits.requires_grad_(), torch.randint(0, VOCABULARY, (rows,), generator=generator, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_kernels_give_the_loss_and_gradient_of_fp64_and_never_wait(dtype: torch.dtype) -> None:
    assert implementation(torch.device("cuda", 0)) == "triton"
    logits, targets = drawn(512, dtype)
    targets[::3] = -100
    exact = logits.detach().double().requires_grad_()
    value = cross_entropy(exact, targets)
    (value * 2.0**16).backward()
    next_token_loss(logits, targets).backward()  # compiled
    logits.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = next_token_loss(logits, targets)
        (loss * 2.0**16).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-7)


def test_rows_beyond_two_to_the_31_logits_get_their_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = drawn(2**31 // VOCABULARY + 64, torch.bfloat16)
    next_token_loss(logits, targets, reduction="sum").backward()
    last = logits.detach()[-32:].clone().requires_grad_()
    monkeypatch.setattr(loss_module, "implementation", lambda device: "chunks")
    next_token_loss(last, targets[-32:], reduction="sum").backward()
    torch.testing.assert_close(logits.grad[-32:], last.grad, rtol=1e-2, atol=1e-7)
