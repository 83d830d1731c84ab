"""Give a rank its share of every batch: the same global batch for any world size."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from halfstep.launcher.data.order import windows_of_step
from halfstep.launcher.data.tokens import TokenFile
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Rank
from halfstep.models.micro_batch import MicroBatch


class Batches(Protocol):
    """What the loop asks of whatever feeds it."""

    rank: int

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step."""
        ...

    def target_count(self, step: int) -> float:
        """Return the sum of `target_count` over all micro-batches of a step, of all ranks."""
        ...

    def validation_batches(self) -> Iterator[tuple[MicroBatch, int]]:
        """Yield this rank's validation batches and how many rows of each count; every rank gets as many batches."""
        ...


class Lookahead:
    """The micro-batches of one step after another; on a GPU the next is on its way while one is computed.

    There is no thread: a GPU is given work faster than it does it, and in that time its host reads the next one, which
    travels beside the work on a stream of its own. On a CPU nothing is read before it is asked for.
    """

    def __init__(self, feed: Batches, steps: Iterable[int], device: torch.device) -> None:
        self._source = (batch for step in steps for batch in feed.micro_batches(step))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: MicroBatch | None = None
        self._failed: HalfstepError | None = None

    def take(self) -> MicroBatch:
        """Return the next micro-batch, on the device. Raises what the feed raised over it, not before its turn."""
        if self._failed is not None:
            raise self._failed
        if self._stream is None or self._ahead is None:
            return next(self._source)
        batch, self._ahead = self._ahead, None
        computing = torch.cuda.current_stream(self._stream.device)
        computing.wait_stream(self._stream)  # until the copy is done
        batch.used_on(computing)
        return batch

    def look_ahead(self) -> None:
        """Read the next micro-batch and send it to the GPU, if there is one."""
        if self._stream is None:
            return
        try:
            with torch.cuda.stream(self._stream):
                self._ahead = next(self._source, None)
        except HalfstepError as error:
            self._failed = error


class Feed:
    """The training and validation sequences of one rank."""

    def __init__(self, plan: Plan, rank: Rank, device: torch.device) -> None:
        self._plan, self.rank, self._device = plan, rank.rank, device
        self._train = TokenFile(plan.data.train_prefix, vocabulary=plan.model.vocabulary)
        prefix = plan.data.validation_prefix
        self._validation = TokenFile(prefix, vocabulary=plan.model.vocabulary) if prefix else None

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step, `batch.micro` windows each.

        The windows of the step are dealt out micro-step by micro-step, rank by rank: which sequences make up the
        global batch does not depend on how many ranks share it.
        """
        plan = self._plan
        windows = windows_of_step(plan.seed, step, plan.batch.global_, plan.data.train_windows)
        shares = windows.reshape(plan.batch.accumulation, plan.batch.ranks, plan.batch.micro)[:, self.rank]
        for share in shares:
            yield self._batch(self._train, share)

    def target_count(self, step: int) -> float:
        """Return how many targets the global batch has, or 1 where there are none.

        In whole windows every token but the first is one, but for the beginnings of documents that are kept apart.
        """
        plan = self._plan
        every = plan.batch.global_ * plan.sequence
        if plan.documents == "plain":
            return every
        windows = windows_of_step(plan.seed, step, plan.batch.global_, plan.data.train_windows)
        return max(1, every - int(self._train.document_starts(windows, plan.sequence)[:, 1:].sum()))

    def validation_batches(self) -> Iterator[tuple[MicroBatch, int]]:
        """Yield this rank's validation batches, `batch.micro` windows each, and how many rows count.

        Every rank gets the same number of batches, or ZeRO stage 3 would wait for ever; the surplus rows count nothing.
        """
        plan = self._plan
        if self._validation is None:
            return
        micro, ranks, total = plan.batch.micro, plan.batch.ranks, plan.data.validation_windows
        for start in range(0, total, micro * ranks):
            first = start + self.rank * micro
            rows = [min(row, total - 1) for row in range(first, first + micro)]
            yield self._batch(self._validation, rows), max(0, min(micro, total - first))

    def _batch(self, file: TokenFile, windows: Sequence[int] | np.ndarray) -> MicroBatch:
        tokens, sequence = file.batch(windows, self._plan.sequence), self._plan.sequence
        if self._plan.documents == "plain":
            batch = MicroBatch.of_windows(tokens)
        else:
            batch = MicroBatch.of_documents(tokens, file.document_starts(windows, sequence))
        # From pageable memory a copy to a GPU makes the host wait for it.
        return (batch.pinned() if self._device.type == "cuda" else batch).to(self._device)
