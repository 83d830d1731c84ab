"""What the roll call makes of the ranks' reports."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from halfstep.launcher.engine.ranks.meeting import Connection, GoneError
from halfstep.launcher.engine.ranks.preflight import RollCall
from halfstep.launcher.engine.ranks.reports import Report, different, summary
from halfstep.launcher.errors import Fault, HalfstepError, Stalled, Stopped, TopologyError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system.machine import free_port
from halfstep.launcher.topology import Rank


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


SECRET = b"of this launch"


@pytest.fixture
def call(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., "Answer"]:
    """Return a function that holds one rank's part of a roll call of `world` ranks in a thread."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)

    def begin(rank: int, *arguments: str, world: int = 2, local: int | None = None, **more: Any) -> Answer:
        local_world = local or world
        numbered = Rank(
            rank=rank, local_rank=rank % local_world, world_size=world, local_world_size=local_world, source="launcher"
        )
        made = plan("watch.startup=20", *arguments)
        return Answer(RollCall(numbered, made, more.get("secret", SECRET), more.get("asked", lambda: None)))

    return begin


class Answer:
    """What came of a rank's part."""

    def __init__(self, call: RollCall) -> None:
        self._call = call
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call.answer()
        except HalfstepError as error:
            self._result = error

    def get(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self._result


@pytest.mark.parametrize("local", [2, 1], ids=["one host", "two nodes"])
def test_ranks_that_share_a_secret_meet_and_get_one_store(call: Callable[..., Answer], local: int) -> None:
    second, first = call(1, local=local), call(0, local=local)
    seen, store = first.get().seen, first.get().store
    assert [row["ranks"] for row in seen["hosts"]] == [[0, 1]]
    assert seen["strangers"] == []
    store.set("a", "b")
    assert second.get().store.get("a") == b"b"
    assert second.get().seen == {}


@pytest.mark.parametrize("local", [2, 1], ids=["one host", "two nodes"])
def test_a_rank_without_the_secret_is_sent_away_and_the_others_meet(call: Callable[..., Answer], local: int) -> None:
    first, stranger = call(0, local=local), call(1, "watch.startup=2", local=local, secret=b"a guess")
    assert isinstance(stranger.get(), Stalled)
    second = call(1, local=local)
    assert len(first.get().seen["hosts"]) == 1
    assert second.get().store is not None
    if local == 1:  # on one host it does not even find the door
        assert first.get().seen["strangers"][0].endswith("from 127.0.0.1: it does not know the secret of this launch")
    assert stranger.get().exit_code == 77


def test_ranks_of_two_plans_find_out_before_anything_is_built(call: Callable[..., Answer]) -> None:
    first, second = call(0, "zero=1"), call(1, "zero=2")
    for answer in (first, second):
        assert isinstance(answer.get(), TopologyError)
        assert answer.get().what.startswith("the plan of the run is ")
    assert (first.get().reported, second.get().reported) == (False, True)


def test_two_processes_with_one_number_are_told_of_each_other(call: Callable[..., Answer]) -> None:
    first, second, third = call(0, world=3), call(1, world=3), call(1, world=3)
    assert first.get().what.startswith("a second process says that it is rank 1, on ")
    assert {type(second.get()), type(third.get())} <= {TopologyError, Fault}


def test_a_rank_that_never_comes_is_named(call: Callable[..., Answer]) -> None:
    first = call(0, "watch.startup=1")
    assert isinstance(first.get(), Stalled)
    assert first.get().what.endswith("did not come to 127.0.0.1 within 1 s: rank 1 of 2")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_while_ranks_are_awaited_ends_all_at_once(call: Callable[..., Answer], rank: int) -> None:
    asked = {rank: lambda: "SIGTERM"}
    both = [call(number, world=3, asked=asked.get(number, lambda: None)) for number in (0, 1)]
    if rank == 0:  # it may be gone before the other has found it
        both = both[:1]
    for answer in both:
        assert isinstance(answer.get(), Stopped), answer.get()
        assert answer.get().what == "SIGTERM, before the ranks had met"


def test_a_rank_that_leaves_ends_the_waiting(call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    first = call(0, world=3)
    monkeypatch.setattr(RollCall, "_hear", lambda call, connection, seconds: _leave(connection))
    second = call(1, world=3)
    assert isinstance(second.get(), Fault)
    assert isinstance(first.get(), Fault)
    assert first.get().what.endswith(" was gone before all ranks had met")


def _leave(connection: Connection) -> None:
    connection.close()
    raise GoneError


def test_ranks_that_are_said_to_be_on_one_host_and_are_not_hear_of_it(
    call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # an address of nobody (RFC 5737)
    error = call(1).get()
    assert isinstance(error, TopologyError)
    assert error.what == "all 2 ranks are said to be on one host, and 192.0.2.1 is another"
    assert "LOCAL_WORLD_SIZE" in error.fix
