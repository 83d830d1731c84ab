"""The output head and the loss in one, over chunks of tokens: the logits of a micro-batch are never whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfstep.models.loss import IGNORED, next_token_loss
from halfstep.models.micro_batch import MicroBatch
from halfstep.models.shapes import head_tokens


class FusedHead:
    """An output head that returns, when it is asked to, the loss of its logits instead of them.

    It works inside of the module, and so within the hooks with which stage 3 gathers a module's weights: they are there
    in the forward pass and again in the backward pass, which makes the logits of each chunk once more. Making their
    gradient in the forward pass, as liger-kernel's fused linear cross-entropy does, would spare that product, but the
    loss scale comes with the backward pass: in fp16 small gradients would be 0 before they were scaled.
    """

    def __init__(self, head: nn.Linear, vocabulary: int) -> None:
        self.head, self._vocabulary = head, vocabulary
        self.logits: Callable[[Tensor], Tensor] = head.forward
        self._asked: tuple[Tensor, Tensor | None, str] | None = None
        head.forward = self._forward  # pyright: ignore[reportAttributeAccessIssue]

    def loss_by(self, batch: MicroBatch, model: Any, *, rows: int | None = None, reduction: str = "mean") -> Tensor:
        """Do what `MicroBatch.loss_by` does."""
        own = batch if rows is None else batch.rows(rows)
        self._asked = own.targets, own.weights, reduction
        try:
            return batch.logits(model)
        finally:
            self._asked = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._asked is None:
            return self.logits(hidden)
        targets, weights, reduction = self._asked
        states = hidden[: len(targets)].reshape(-1, hidden.shape[-1])
        size = head_tokens(len(states), self._vocabulary, on_cpu=hidden.device.type == "cpu")
        rest = targets.reshape(-1), None if weights is None else weights.reshape(-1)
        return _HeadLoss.apply(states, *rest, reduction == "mean", size, self, self.head.weight, self.head.bias)


def loss_of(model: Any) -> Callable[..., Tensor]:
    """Return what makes the loss of a model's batches: its fused head where it has one, else `MicroBatch.loss_by`."""
    get = getattr(model, "get_output_embeddings", None)
    owner = getattr(getattr(get() if get else None, "forward", None), "__self__", None)
    return owner.loss_by if isinstance(owner, FusedHead) else MicroBatch.loss_by


class _HeadLoss(torch.autograd.Function):
    """Compute the loss of a head's logits chunk by chunk, keeping the head's input alone for the backward pass.

    The gradient of the head's weights is added up over the chunks in fp32 and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        mean: bool,
        size: int,
        head: FusedHead,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in _chunks(len(hidden), size):
            counts = None if weights is None else weights[part]
            total += next_token_loss(head.logits(hidden[part]), targets[part], weights=counts, reduction="sum")
        counted = (targets != IGNORED).to(total.dtype)
        count = (counted if weights is None else counted * weights).sum() if mean else total.new_ones(())
        count = torch.where(count == 0, 1, count)
        ctx.save_for_backward(hidden, targets, weights, count)
        ctx.size, ctx.head = size, head
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, targets, weights, count = ctx.saved_tensors
        weight, bias = ctx.head.head.weight, ctx.head.head.bias  # gathered at stage 3: not what they were before
        full = torch.promote_types(hidden.dtype, torch.float32)
        gradient, scale = torch.empty_like(hidden), upstream / count
        weight_sum = torch.zeros_like(weight, dtype=full) if ctx.needs_input_grad[6] else None
        bias_sum = torch.zeros_like(bias, dtype=full) if ctx.needs_input_grad[7] else None
        for part in _chunks(len(hidden), ctx.size):
            states, counts = hidden[part], None if weights is None else weights[part]
            with torch.autocast(*ctx.autocast):
                logits = ctx.head.logits(states).requires_grad_()
                with torch.enable_grad():
                    loss = next_token_loss(logits, targets[part], weights=counts, reduction="sum")
                (slope,) = torch.autograd.grad(loss, logits, scale)
                gradient[part] = slope @ weight
            if weight_sum is not None:
                weight_sum += _product(slope.t(), states, full)
            if bias_sum is not None:
                bias_sum += slope.sum(dim=0, dtype=full)
        sums = [None if total is None else total.to(weight.dtype) for total in (weight_sum, bias_sum)]
        return gradient, None, None, None, None, None, *sums


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a product of matrices that is not rounded to 16 bits, as the sum of all chunks would not be."""
    if left.dtype == right.dtype == dtype:
        return left @ right
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, tokens, size))
