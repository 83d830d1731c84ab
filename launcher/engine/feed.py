"""Give a rank its share of every batch: the same global batch for any world size."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from halfstep.launcher.data.order import draws_of_step, windows_of_step
from halfstep.launcher.data.packed import PackedExamples, Rows
from halfstep.launcher.data.tokens import TokenFile
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.plan.data_plan import CorpusPlan
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
        """Return the sum of `target_count` over all micro-batches of a step, of all ranks; 0 where none has any."""
        ...

    def validation_batches(self, part: int) -> Iterator[tuple[MicroBatch, int]]:
        """Yield this rank's validation batches of a corpus and how many rows of each count; each rank gets as many."""
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
        corpora = plan.data.corpora
        self._train = [_opened(corpus, corpus.train_prefix, plan, plan.seed) for corpus in corpora]
        # The same examples are evaluated whatever the seed.
        self._validation = [
            _opened(corpus, corpus.validation_prefix, plan, 0) if corpus.validation_prefix else None
            for corpus in corpora
        ]

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step, `batch.micro` windows each.

        The windows of the step are dealt out micro-step by micro-step, rank by rank: which sequences make up the
        global batch does not depend on how many ranks share it.
        """
        batch = self._plan.batch
        parts, windows = (
            numbers.reshape(batch.accumulation, batch.ranks, batch.micro)[:, self.rank]
            for numbers in self.sequences(step)
        )
        for share, own in zip(parts, windows, strict=True):
            yield self._mixed(share, own)

    def sequences(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return of each sequence of a step's global batch its corpus and its window; two int64 arrays (global,)."""
        plan, data = self._plan, self._plan.data
        if not data.parts:
            windows = windows_of_step(plan.seed, step, plan.batch.global_, data.train_windows)
            return np.zeros_like(windows), windows
        sizes = [part.train_windows for part in data.parts]
        return draws_of_step(plan.seed, step, plan.batch.global_, data.weights, sizes)

    def target_count(self, step: int) -> int:
        """Return how many targets the global batch has.

        In whole windows of text every token but the first is one, but for the beginnings of documents that are kept
        apart.
        """
        plan = self._plan
        if not plan.documents_apart:
            return plan.batch.global_ * plan.sequence
        parts, windows = self.sequences(step)
        return sum(self._targets_of(self._train[part], windows[parts == part]) for part in np.unique(parts))

    def validation_batches(self, part: int) -> Iterator[tuple[MicroBatch, int]]:
        """Yield this rank's validation batches of a corpus, `batch.micro` windows each, and how many rows count.

        Every rank gets the same number of batches, or ZeRO stage 3 would wait for ever; the surplus rows count nothing.
        """
        plan, file = self._plan, self._validation[part]
        if file is None:
            return
        micro, ranks, total = plan.batch.micro, plan.batch.ranks, plan.data.corpora[part].validation_windows
        for start in range(0, total, micro * ranks):
            first = start + self.rank * micro
            rows = [min(row, total - 1) for row in range(first, first + micro)]
            yield self._on_device(self._rows(file, rows)), max(0, min(micro, total - first))

    def _mixed(self, parts: np.ndarray, windows: np.ndarray) -> MicroBatch:
        shape = (len(windows), self._plan.sequence + 1)
        ids = torch.empty(shape, dtype=torch.int64)
        mixed = Rows(ids, *torch.zeros((2, *shape), dtype=torch.bool))
        for part in np.unique(parts):
            rows = np.flatnonzero(parts == part)
            for whole, own in zip(mixed, self._rows(self._train[part], windows[rows]), strict=True):
                whole[rows] = own
        return self._on_device(mixed)

    def _rows(self, file: TokenFile | PackedExamples, windows: Sequence[int] | np.ndarray) -> Rows:
        """Return the tokens of windows, which of them begin a document that is kept apart, and which are targets."""
        if isinstance(file, PackedExamples):
            return file.rows(windows)
        ids = file.batch(windows, self._plan.sequence)
        every = torch.ones_like(ids, dtype=torch.bool)
        if self._plan.documents == "plain":
            return Rows(ids, torch.zeros_like(every), every)
        return Rows(ids, file.document_starts(windows, self._plan.sequence), every)

    def _targets_of(self, file: TokenFile | PackedExamples, windows: np.ndarray) -> int:
        if isinstance(file, PackedExamples):
            return file.target_count(windows)
        every = len(windows) * self._plan.sequence
        if self._plan.documents == "plain":
            return every
        return every - int(file.document_starts(windows, self._plan.sequence)[:, 1:].sum())

    def _on_device(self, rows: Rows) -> MicroBatch:
        apart = self._plan.documents_apart
        batch = MicroBatch.of_documents(*rows) if apart else MicroBatch.of_windows(rows.ids)
        # From pageable memory a copy to a GPU makes the host wait for it.
        return (batch.pinned() if self._device.type == "cuda" else batch).to(self._device)


def _opened(corpus: CorpusPlan, prefix: str, plan: Plan, seed: int) -> TokenFile | PackedExamples:
    how, vocabulary = corpus.examples, plan.model.vocabulary
    if how is None:
        return TokenFile(prefix, vocabulary=vocabulary)
    return PackedExamples(
        prefix, plan.sequence, pack=how.packing, too_long=how.too_long, seed=seed, vocabulary=vocabulary
    )
