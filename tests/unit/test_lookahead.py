"""The next micro-batch: read ahead for a GPU alone, in the feed's order, and kept until the work on it is done."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfstep.launcher.engine.feed import Lookahead
from halfstep.launcher.errors import RequestError
from halfstep.models.micro_batch import MicroBatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Batch:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def used_on(self, stream: Any) -> None:
        self._log.append(f"{self.name} used on {stream}")


class Feed:
    """Two micro-batches a step, which say when and on which stream they are read."""

    rank = 0

    def __init__(self, log: list[str], broken: str = "") -> None:
        self.log, self.stream, self._broken = log, "computing", broken

    def micro_batches(self, step: int) -> Iterator[Any]:
        for micro_step in (1, 2):
            name = f"{step}.{micro_step}"
            if name == self._broken:
                raise RequestError("a token is outside the vocabulary", where="train.bin", fix="prepare it again")
            self.log.append(f"{name} read on {self.stream}")
            yield Batch(name, self.log)


class Stream:
    """A stream beside the computing one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def feed(log: list[str], monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Return a feed that knows of the stream it is asked on, and put streams that can be watched in torch's place."""
    feed = Feed(log)

    class Computing:
        def wait_stream(self, other: Stream) -> None:
            log.append("computing waits")

        def __str__(self) -> str:
            return "computing"

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        feed.stream = "copying"
        yield
        feed.stream = "computing"

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computing())
    return feed


def work(feed: Any, device: torch.device, log: list[str]) -> list[str]:
    """Take and compute all micro-batches of steps 3 and 4, looking ahead behind each."""
    batches, names = Lookahead(feed, range(3, 5), device), []
    for _ in range(4):
        names.append(batches.take().name)  # type: ignore[attr-defined]
        log.append(f"{names[-1]} computed")
        batches.look_ahead()
    return names


def test_on_a_cpu_nothing_is_read_before_it_is_asked_for(log: list[str]) -> None:
    assert work(Feed(log), CPU, log) == ["3.1", "3.2", "4.1", "4.2"]
    assert log[:4] == ["3.1 read on computing", "3.1 computed", "3.2 read on computing", "3.2 computed"]


def test_for_a_gpu_each_is_copied_beside_the_work_on_the_one_before_and_waited_for(feed: Feed, log: list[str]) -> None:
    assert work(feed, GPU, log) == ["3.1", "3.2", "4.1", "4.2"], "the order of a CPU"
    assert log[:2] == ["3.1 read on computing", "3.1 computed"]
    for at, name in enumerate(["3.2", "4.1", "4.2"]):
        part = log[2 + 4 * at : 6 + 4 * at]
        assert part == [
            f"{name} read on copying",
            "computing waits",
            f"{name} used on computing",
            f"{name} computed",
        ]
    assert len(log) == 14, "nothing is read beyond the last step"


def test_what_cannot_be_read_is_told_at_its_turn(feed: Feed, log: list[str]) -> None:
    feed._broken = "4.1"
    with pytest.raises(RequestError, match="outside the vocabulary"):
        work(feed, GPU, log)
    assert "3.2 computed" in log
    assert "4.1 computed" not in log


def test_all_parts_of_a_micro_batch_are_kept_for_the_stream_that_uses_them() -> None:
    kept: list[str] = []

    def part(name: str) -> Any:
        return SimpleNamespace(record_stream=lambda stream: kept.append(f"{name} for {stream}"))

    batch = object.__new__(MicroBatch)
    batch.inputs, batch.targets, batch.positions, batch.weights = part("inputs"), part("targets"), None, part("weights")
    batch.used_on("computing")  # type: ignore[arg-type]
    assert kept == ["inputs for computing", "targets for computing", "weights for computing"]
