"""Next-token cross-entropy: fp32 where it matters, and nothing in fp32 that is as large as the logits."""

import functools
import importlib.util
import warnings
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK_ELEMENTS = 1 << 18
"""Logits in work at a time on a CPU: 1 MiB in fp32, which stays in a core's second-level cache."""
CHUNK_ELEMENTS = 1 << 24
"""The same elsewhere: 64 MiB in fp32."""


IGNORED = -100
"""The target where none is to be predicted, as torch and transformers have it."""


def next_token_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy in nats of `logits` (batch, sequence, vocabulary) against `targets` (batch, sequence).

    `targets[b, t]` is the token that follows position t: nothing is shifted here. Rows whose target is `ignore_index`
    add nothing and get a gradient of exactly 0; `mean` is over the other rows, and 0 when there are none. Where targets
    have `weights`, each loss is multiplied with its own, and `mean` divides by their sum. The result is a scalar in
    fp32 (fp64 for fp64 logits).

    Log-sum-exp, softmax, the sum and the product with the upstream gradient are fp32, made chunk by chunk or within a
    kernel (`implementation`); kept for the backward pass are the logits as they are and a few numbers a row. With
    16-bit logits the peak is 4 bytes a logit (the logits and their gradient) where transformers' ForCausalLMLoss holds
    14. Raises ValueError for shapes that do not belong together and for a reduction other than `mean` and `sum`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"the loss is reduced by mean or sum, not {reduction!r}")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, not {tuple(targets.shape)}"
        )
    rows, row_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    row_weights = None if weights is None else weights.reshape(-1)
    return _function(logits.device).apply(rows, row_targets, row_weights, ignore_index, reduction == "mean")


@functools.cache
def implementation(device: torch.device) -> str:
    """Return what computes the loss on a device: `triton` (models/loss_kernels.py) or `chunks`, by torch's operators.

    On a GPU it is Triton, which torch's CUDA builds bring along. Where it is missing or does not start, `torch.compile`
    would not help: Inductor writes its kernels for GPUs in Triton, too.
    """
    # What Triton compiles for: the tensor cores of Volta and later (torch.utils._triton.has_triton asks the same).
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return "chunks"
    if importlib.util.find_spec("triton") is None:
        warnings.warn(f"{_SLOW}: Triton is not installed", RuntimeWarning, stacklevel=2)
        return "chunks"
    try:
        from halfstep.models import loss_kernels

        loss_kernels.start()
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        # It compiles a helper at its first start, with the host's C compiler and Python's headers (runtime/build.py).
        warnings.warn(f"{_SLOW}: Triton does not start here: {error}", RuntimeWarning, stacklevel=2)
        return "chunks"
    return "triton"


_SLOW = "the loss is computed by many small kernels, which takes a third of a small model's step"


def _function(device: torch.device) -> type[torch.autograd.Function]:
    if implementation(device) == "chunks":
        return _ChunkedCrossEntropy
    from halfstep.models.loss_kernels import KernelCrossEntropy

    return KernelCrossEntropy


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute the loss and its gradient over chunks of rows, by torch's operators.

    The gradient gets its own storage. Writing it over the logits would save another 2 bytes a logit, but the logits may
    be what an earlier operation saved for its own backward pass (a soft cap's tanh saves its output), and the caller
    still holds them: what either reads after this would be a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, mean: bool
    ) -> Tensor:
        valid = targets != ignore_index
        if weights is not None:
            valid = valid & (weights != 0)
        picked = torch.where(valid, targets, 0)[:, None]
        buffer = _buffer(logits)
        log_sum_exp = buffer.new_empty(len(logits))
        for start in range(0, len(logits), len(buffer)):
            part = slice(start, start + len(buffer))
            exponentials = buffer[: len(log_sum_exp[part])]
            values = _precise(logits[part], exponentials)
            largest = values.amax(dim=-1, keepdim=True)
            torch.sub(values, largest, out=exponentials).exp_()
            torch.log(exponentials.sum(dim=-1), out=log_sum_exp[part]).add_(largest[:, 0])
        losses = (log_sum_exp - logits.gather(1, picked)[:, 0]).masked_fill_(~valid, 0)
        if weights is not None:
            weights = weights.to(losses.dtype)
            losses *= weights
        total = valid.sum() if weights is None else weights.masked_fill(~valid, 0).sum()
        count = torch.where(total == 0, 1, total) if mean else log_sum_exp.new_ones(())
        ctx.save_for_backward(logits, picked, valid, weights, log_sum_exp, count)
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits, picked, valid, weights, log_sum_exp, count = ctx.saved_tensors
        gradient, buffer = torch.empty_like(logits), _buffer(logits)
        exact = gradient.dtype == buffer.dtype
        # Under loss scaling the upstream gradient is 2^16 and more. It is applied here, before the rounding to 16 bit:
        # after it small probabilities would be 0 already, and a gradient that does not fit must become inf to be seen.
        scale = torch.where(valid, upstream.to(log_sum_exp.dtype) / count, 0)
        scale = (scale if weights is None else scale * weights)[:, None]
        for start in range(0, len(logits), len(buffer)):
            part = slice(start, start + len(buffer))
            probabilities = gradient[part] if exact else buffer[: len(log_sum_exp[part])]
            torch.sub(_precise(logits[part], probabilities), log_sum_exp[part, None], out=probabilities).exp_()
            probabilities.scatter_(1, picked[part], probabilities.gather(1, picked[part]) - 1)
            probabilities.mul_(scale[part])
            if not exact:
                gradient[part] = probabilities
        return gradient, None, None, None, None


def _precise(logits: Tensor, buffer: Tensor) -> Tensor:
    return logits if logits.dtype == buffer.dtype else buffer.copy_(logits)


def _buffer(logits: Tensor) -> Tensor:
    elements = CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS
    rows = max(1, min(len(logits), elements // logits.shape[-1]))
    return logits.new_empty((rows, logits.shape[-1]), dtype=torch.promote_types(logits.dtype, torch.float32))
