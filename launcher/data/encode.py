"""Tokenise a stream of pieces in several processes: in order, in bounded memory, the same for any number of them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halfstep.launcher.data import chat, tokenizer
from halfstep.launcher.data.readers import Piece
from halfstep.launcher.errors import RequestError

_BATCH_CHARACTERS = 2**18
_BATCHES_AHEAD = 3
"""Per worker; what is read but not yet tokenised stays this small."""


class Layout(NamedTuple):
    """How examples become tokens."""

    template: str
    """One of `chat.CHOICES`."""
    targets: str
    """`chat.ALL` or `chat.LAST`."""


class Encoded(NamedTuple):
    """The tokens of consecutive pieces, the end-of-text token after each document."""

    tokens: np.ndarray
    lengths: list[tuple[int, bool]]
    """Of each piece: how many tokens, and whether its document ends there."""
    unknown: int
    """How many tokens stand for text that the tokenizer does not know."""
    marks: np.ndarray | None = None
    """Of each token whether it is a target; of examples alone."""
    refused: tuple[RequestError, ...] = ()
    """What is wrong with examples that the template does not take, and that are left out."""


def encode(
    pieces: Iterable[Piece],
    *,
    folder: Path,
    kind: str,
    dtype: np.dtype,
    workers: int,
    layout: Layout | None = None,
) -> Generator[Encoded]:
    """Yield the tokens of all pieces in their order; the tokenizer is loaded from `folder` in every process."""
    batches = _batches(pieces)
    if workers == 1:
        encoder = _Encoder(folder, kind, dtype, layout)
        for batch in batches:
            yield encoder.encode(batch)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(folder, kind, dtype, layout),
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > workers * _BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RequestError(
            "a tokenising process died; the system may have ended it for want of memory",
            where=f"--workers {workers}",
            fix="use fewer: --workers 1",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        # One more for each: a million empty lines are a batch too.
        characters += len(piece.text) + 1
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Encoder:
    """What makes tokens of pieces in a process."""

    def __init__(self, folder: Path, kind: str, dtype: np.dtype, layout: Layout | None) -> None:
        self._loaded, self._dtype = tokenizer.load(folder, kind), dtype
        self._template = None if layout is None else chat.named(layout.template, self._loaded)
        self._targets = chat.ALL if layout is None else layout.targets

    def encode(self, batch: list[Piece]) -> Encoded:
        """Return the tokens of some pieces."""
        return self._texts(batch) if self._template is None else self._examples(batch, self._template)

    def _texts(self, batch: list[Piece]) -> Encoded:
        ids: list[int] = []
        lengths = []
        unknown = 0
        for piece in batch:
            before = len(ids)
            own = self._loaded.encode(piece.text)
            unknown += self._unknown(own)
            ids += own
            if piece.ends_document:
                ids.append(self._loaded.end_of_text)
            lengths.append((len(ids) - before, piece.ends_document))
        return Encoded(np.asarray(ids, dtype=self._dtype), lengths, unknown)

    def _examples(self, batch: list[Piece], template: chat.Template) -> Encoded:
        ids: list[int] = []
        marks: list[int] = []
        lengths, refused = [], []
        for _, _, example in batch:
            assert example is not None, "a template lays out examples"
            try:
                own, targets = template.encode(example.messages, self._targets)
            except RequestError as error:
                refused.append(
                    RequestError(
                        f"{example.name}: {error.what}", where=f"{example.where}, {error.where}", fix=error.fix
                    )
                )
                continue
            ids += own
            # Nothing stands before a document's first token: it is never predicted.
            marks += [0, *targets[1:]][: len(own)]
            lengths.append((len(own), True))
        tokens = np.asarray(ids, dtype=self._dtype)
        return Encoded(tokens, lengths, self._unknown(ids), np.asarray(marks, dtype=np.uint8), tuple(refused))

    def _unknown(self, ids: list[int]) -> int:
        return 0 if self._loaded.unknown is None else ids.count(self._loaded.unknown)


class _Worker:
    """What a worker process holds, set once when it starts."""

    encoder: _Encoder


def _start_worker(folder: Path, kind: str, dtype: np.dtype, layout: Layout | None) -> None:
    # Ctrl-C reaches the whole process group: the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's workers hold both ends of their queue, so the death of a killed parent would never reach them.
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.encoder = _Encoder(folder, kind, dtype, layout)


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(batch: list[Piece]) -> Encoded:
    return _Worker.encoder.encode(batch)
