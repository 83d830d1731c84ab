"""What the roll call makes of the ranks' reports."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from launcher.engine.preflight import RollCall
from launcher.engine.reports import Report, different, summary
from launcher.errors import TopologyError
from launcher.plan.plan import Plan
from launcher.topology import Rank, free_port


def report(rank: int = 0, host: str = "n1", **more: Any) -> Report:
    about: dict[str, Any] = {
        "address": "10.0.0.1",
        "device": "cpu",
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
    }
    about |= {"halfstep": "aa", "plan": "bb", "data": "cc", "problem": None}
    return Report(rank=rank, host=host, **{**about, **more})


def test_ranks_that_are_alike_raise_nothing() -> None:
    assert different([report(rank, host) for rank, host in enumerate(["n1", "n1", "n2", "n2"])]) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "2.12.0", "python": "3.11.7"}}, "torch is 2.13.0 on n1, and 2.12.0 on n2"),
        ({"versions": {"python": "3.11.7"}}, "torch is 2.13.0 on n1, and missing on n2"),
        ({"halfstep": "ab"}, "Halfstep's code is aa on n1, and ab on n2 (rank 1)"),
        ({"plan": "x"}, "the plan of the run is bb on n1, and x on n2 (rank 1)"),
        ({"data": "x"}, "the corpus is cc on n1, and x on n2 (rank 1)"),
        ({"device": "A100"}, "the device is cpu on n1, and A100 on n2 (rank 1)"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_what_differs_is_one_sentence_that_names_both_nodes(change: dict[str, Any], said: str) -> None:
    assert different([report(), dataclasses.replace(report(1, "n2"), **change)]) == said


def test_the_record_has_a_row_for_each_host() -> None:
    seen = summary([report(0, "n1"), report(1, "n1"), report(2, "n2", address="10.0.0.2")], 0.25)
    assert seen["hosts"] == [
        {"host": "n1", "address": "10.0.0.1", "device": "cpu", "ranks": [0, 1]},
        {"host": "n2", "address": "10.0.0.2", "device": "cpu", "ranks": [2]},
    ]
    assert (seen["seconds"], seen["halfstep"]) == (0.25, "aa")


def test_a_rank_of_another_run_that_met_this_one_at_its_port_goes(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    ours, theirs = plan("zero=1"), plan("zero=2")
    numbered = [
        Rank(rank=rank, local_rank=rank, world_size=2, local_world_size=2, source="launcher") for rank in (0, 1)
    ]
    first, stranger, second = RollCall(numbered[0], ours), RollCall(numbered[1], theirs), RollCall(numbered[1], ours)
    left: list[Exception] = []

    def of_another_run() -> None:
        try:
            stranger.answer()
        except TopologyError as error:
            left.append(error)

    threads = [threading.Thread(target=of_another_run), threading.Thread(target=second.answer)]
    threads[0].start()
    while not first._calls.check(["report/1"]):
        pass
    before = first._calls.get("report/1")
    threads[1].start()
    while first._calls.get("report/1") == before:  # ours takes the place of theirs
        pass
    assert len(first.answer()["hosts"]) == 1
    for one in threads:
        one.join()
    assert "is of another run" in str(left[0])
