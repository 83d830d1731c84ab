"""The loss on a GPU as two Triton kernels: logits are read once for the loss, and once more for their gradient.

Kernels that others have do not keep the contract of `next_token_loss`. liger-kernel 0.8.5 (ops/cross_entropy.py) stores
losses in the type of the logits, waits for the device (`.item()`), writes the gradient over the logits, and rounds it
to 16 bit before the loss scale is known.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingModuleSource]
import triton.language as tl  # pyright: ignore[reportMissingModuleSource]
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096
"""Logits that a program works on at a time: 16 a thread."""
WARPS = 8

_PRECISE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _forward(
    logits, targets, factors, log_sum_exps, losses, vocabulary, stride, precise: tl.constexpr, block: tl.constexpr
):
    """Write the log-sum-exp and the loss of one row: the running sum is rescaled where a block has a larger maximum."""
    row = tl.program_id(0).to(tl.int64)  # logits are more than 2^31 from 43,000 tokens of GPT-2 on
    factor = tl.load(factors + row)
    if factor == 0:
        tl.store(log_sum_exps + row, 0.0)
        tl.store(losses + row, 0.0)
        return
    largest = tl.full((), float("-inf"), precise)
    sums = tl.zeros((block,), precise)
    for start in range(0, vocabulary, block):
        columns = start + tl.arange(0, block)
        values = tl.load(logits + row * stride + columns, mask=columns < vocabulary, other=float("-inf")).to(precise)
        previous = largest
        largest = tl.maximum(largest, tl.max(values, axis=0))
        # As long as all logits are -inf (a vocabulary that is masked in part) there is nothing to subtract.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        sums = sums * tl.exp(previous - shift) + tl.exp(values - shift)
    log_sum_exp = largest + tl.log(tl.sum(sums, axis=0))
    # A target beyond the vocabulary would be read from another row: its loss and gradient are NaN.
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    log_sum_exp = tl.where(known, log_sum_exp, float("nan"))
    picked = tl.load(logits + row * stride + target, mask=known, other=0.0).to(precise)
    tl.store(log_sum_exps + row, log_sum_exp)
    tl.store(losses + row, (log_sum_exp - picked) * factor)


@triton.jit
def _backward(
    logits,
    targets,
    factors,
    log_sum_exps,
    upstream,
    gradient,
    vocabulary,
    stride,
    precise: tl.constexpr,
    block: tl.constexpr,
):
    """Write the gradient of one row; where the row does not count its logits are not read."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    counting = tl.where(factor != 0, vocabulary, 0)
    # Applied before the rounding to 16 bit: after it small probabilities would be 0 already, and what does not fit must
    # become inf to be seen.
    scale = tl.load(upstream) * factor
    log_sum_exp = tl.load(log_sum_exps + row)
    target = tl.load(targets + row)
    for start in range(0, vocabulary, block):
        columns = start + tl.arange(0, block)
        values = tl.load(logits + row * stride + columns, mask=columns < counting, other=0.0).to(precise)
        probabilities = tl.exp(values - log_sum_exp)
        slopes = tl.where(columns == target, probabilities - 1, probabilities) * scale
        slopes = tl.where(columns < counting, slopes, 0.0)  # an infinite scale times 0 is NaN
        slopes = slopes.to(gradient.dtype.element_ty)
        tl.store(gradient + row * vocabulary + columns, slopes, mask=columns < vocabulary)


class KernelCrossEntropy(torch.autograd.Function):
    """Compute the loss and its gradient by one program a row, without asking the device for any value."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, mean: bool
    ) -> Tensor:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        targets = targets.contiguous()
        precise = torch.promote_types(logits.dtype, torch.float32)
        counted = logits.new_ones((), dtype=precise) if weights is None else weights.to(precise)
        factors = torch.where(targets != ignore_index, counted, 0)
        log_sum_exp, losses = torch.empty_like(factors), torch.empty_like(factors)
        rows, vocabulary = logits.shape
        _forward[(rows,)](
            logits,
            targets,
            factors,
            log_sum_exp,
            losses,
            vocabulary,
            logits.stride(0),
            precise=_PRECISE[precise],
            block=_block(vocabulary),
            num_warps=WARPS,
        )
        total = factors.sum()
        count = torch.where(total == 0, 1, total) if mean else factors.new_ones(())
        ctx.save_for_backward(logits, targets, factors, log_sum_exp, count)
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits, targets, factors, log_sum_exp, count = ctx.saved_tensors
        rows, vocabulary = logits.shape
        gradient = logits.new_empty((rows, vocabulary))
        _backward[(rows,)](
            logits,
            targets,
            factors,
            log_sum_exp,
            upstream.to(factors.dtype) / count,
            gradient,
            vocabulary,
            logits.stride(0),
            precise=_PRECISE[factors.dtype],
            block=_block(vocabulary),
            num_warps=WARPS,
        )
        return gradient, None, None, None, None


def start() -> None:
    """Start Triton on the current device.

    Raises ImportError, OSError, RuntimeError or SubprocessError where the helper that it compiles for itself cannot be
    built or loaded.
    """
    triton.runtime.driver.active.get_current_target()


def _block(vocabulary: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocabulary))
