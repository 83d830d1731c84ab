"""What one forward pass reads and is judged by: token ids, and the token that is to be predicted after each."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from halfstep.models.loss import IGNORED, next_token_loss


@dataclass(eq=False)
class MicroBatch:
    """Rows of token ids and their targets; all tensors are (rows, sequence)."""

    inputs: Tensor
    targets: Tensor
    """The token that follows each position, IGNORED where none is to be predicted."""
    positions: Tensor | None = None
    """Where each token stands in its own document; None: rows are counted from 0."""
    weights: Tensor | None = None
    """How much each target counts; None: all alike."""

    def __post_init__(self) -> None:
        counted = self.targets != IGNORED
        self.target_count: float = int(counted.sum()) if self.weights is None else float(self.weights[counted].sum())
        """Targets that count, or the sum of their weights: what the mean loss over them weighs beside others."""

    @classmethod
    def of_windows(cls, tokens: Tensor) -> Self:
        """Return what consecutive tokens, (rows, sequence + 1), ask for: after each token the next one."""
        return cls(tokens[:, :-1], tokens[:, 1:])

    @classmethod
    def of_documents(cls, tokens: Tensor, starts: Tensor, counted: Tensor | None = None) -> Self:
        """Return what consecutive tokens ask for whose documents know nothing of each other.

        `starts`, bool and of the tokens' shape (rows, sequence + 1), tells where a document begins. Positions are
        counted from there, or from where the row begins; attention stays within what they count (models/observe.py).
        The first token of a document is no target: nothing that may be seen says which document comes next. Where
        `counted`, bool and of the same shape, is given, the tokens that it marks are targets alone.
        """
        ignored = starts[:, 1:] if counted is None else starts[:, 1:] | ~counted[:, 1:]
        batch = cls(tokens[:, :-1], tokens[:, 1:].masked_fill(ignored, IGNORED))
        inside = starts[:, :-1].clone()
        inside[:, 0] = True
        if inside[:, 1:].any():  # otherwise rows are windows: without positions they need no mask
            places = torch.arange(inside.shape[1]).expand(inside.shape)
            batch.positions = places - torch.where(inside, places, 0).cummax(dim=1).values
        return batch

    def to(self, device: torch.device) -> Self:
        """Return it on a device; its targets are counted already, so that nobody waits for that device.

        From pinned memory the host does not wait for the copy either: the device's stream has it in its order.
        """
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """Return it in page-locked memory of this host, from which a GPU reads by itself."""
        return self._each(lambda part: part.contiguous().pin_memory())

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keep its memory, which another stream filled, until this stream is done with what it has by now."""
        for part in (self.inputs, self.targets, self.positions, self.weights):
            if part is not None:
                part.record_stream(stream)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Self:
        """Return it with each tensor moved; its targets stay counted."""
        moved = copy.copy(self)
        moved.inputs, moved.targets = move(self.inputs), move(self.targets)
        moved.positions, moved.weights = (
            part if part is None else move(part) for part in (self.positions, self.weights)
        )
        return moved

    def rows(self, count: int) -> Self:
        """Return the first `count` rows."""
        if count == len(self.inputs):
            return self  # whose targets are counted already: to count them on a device is to wait for it
        positions, weights = (part if part is None else part[:count] for part in (self.positions, self.weights))
        return type(self)(self.inputs[:count], self.targets[:count], positions, weights)

    def logits(self, model: Any) -> Tensor:
        """Run a model, or the engine around it, and return its logits (rows, sequence, vocabulary)."""
        positions = {} if self.positions is None else {"position_ids": self.positions}
        return model(input_ids=self.inputs, **positions).logits

    def loss_by(self, model: Any, *, rows: int | None = None, reduction: str = "mean") -> Tensor:
        """Run a model, or the engine around it, and return its loss, a scalar: of the first `rows` rows or of all.

        A model that makes no logits has another way to say the same (models/fused_head.py, loss_of).
        """
        logits = self.logits(model)
        if rows == 0:
            return logits.new_zeros((), dtype=torch.float32)
        if rows is None or rows == len(self.inputs):
            return self.loss(logits, reduction=reduction)  # a slice of all rows would copy the logits' gradient
        return self.rows(rows).loss(logits[:rows], reduction=reduction)

    def loss(self, logits: Tensor, *, reduction: str = "mean") -> Tensor:
        """Return the cross-entropy of logits for the same rows, a scalar: the mean over the targets or their sum."""
        return next_token_loss(logits, self.targets, weights=self.weights, reduction=reduction)
