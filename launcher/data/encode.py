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

from halfstep.launcher.data import tokenizer
from halfstep.launcher.data.readers import Piece
from halfstep.launcher.errors import RequestError

_BATCH_CHARACTERS = 2**18
_BATCHES_AHEAD = 3
"""Per worker; what is read but not yet tokenised stays this small."""


class Encoded(NamedTuple):
    """The tokens of consecutive pieces, the end-of-text token after each document."""

    tokens: np.ndarray
    lengths: list[tuple[int, bool]]
    """Of each piece: how many tokens, and whether its document ends there."""
    unknown: int
    """How many tokens stand for text that the tokenizer does not know."""


def encode(pieces: Iterable[Piece], *, folder: Path, kind: str, dtype: np.dtype, workers: int) -> Generator[Encoded]:
    """Yield the tokens of all pieces in their order; the tokenizer is loaded from `folder` in every process."""
    batches = _batches(pieces)
    if workers == 1:
        loaded = tokenizer.load(folder, kind)
        for batch in batches:
            yield _encode(loaded, batch, dtype)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(folder, kind, dtype),
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


def _encode(loaded: tokenizer.Tokenizer, batch: list[Piece], dtype: np.dtype) -> Encoded:
    ids: list[int] = []
    lengths = []
    unknown = 0
    for piece in batch:
        before = len(ids)
        own = loaded.encode(piece.text)
        unknown += 0 if loaded.unknown is None else own.count(loaded.unknown)
        ids += own
        if piece.ends_document:
            ids.append(loaded.end_of_text)
        lengths.append((len(ids) - before, piece.ends_document))
    return Encoded(np.asarray(ids, dtype=dtype), lengths, unknown)


class _Worker:
    """What a worker process holds, set once when it starts."""

    loaded: tokenizer.Tokenizer
    dtype: np.dtype


def _start_worker(folder: Path, kind: str, dtype: np.dtype) -> None:
    # Ctrl-C reaches the whole process group: the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's workers hold both ends of their queue, so the death of a killed parent would never reach them.
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.loaded, _Worker.dtype = tokenizer.load(folder, kind), dtype


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(batch: list[Piece]) -> Encoded:
    return _encode(_Worker.loaded, batch, _Worker.dtype)
