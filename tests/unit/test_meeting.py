"""Ranks meet only whom they share a secret with: what strangers say is neither believed nor executed."""

import contextlib
import gc
import os
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfstep.launcher.engine.ranks import meeting
from halfstep.launcher.engine.ranks.meeting import Connection, GoneError, Server, StrangerError, connect
from halfstep.launcher.engine.ranks.places import file_store
from halfstep.launcher.topology import Rank

SECRET = b"a secret of one launch"
Held = contextlib.ExitStack


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    """Close what a test has opened."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(params=["this host", "network"])
def server(request: pytest.FixtureRequest, held: Held) -> Server:
    place = f"\0halfstep-test-{os.urandom(8).hex()}" if request.param == "this host" else ("127.0.0.1", 0)
    server = Server(place, SECRET)
    held.callback(server.close)
    return server


def address(server: Server) -> meeting.Address:
    return ("127.0.0.1", server.port) if server.port else server._listening.getsockname().decode()


def joined(server: Server, held: Held) -> tuple[Connection, Connection]:
    """Return both ends of a connection whose first message was read."""
    client = connect(address(server), SECRET, 5)
    assert isinstance(client, Connection), client
    held.callback(client.close)
    client.send({"report": 1})
    arrived = server.next(5)
    assert arrived is not None
    held.callback(arrived[0].close)
    assert arrived[1] == {"report": 1}
    return arrived[0], client


def test_who_knows_the_secret_talks_both_ways_and_a_leaver_is_noticed(server: Server, held: Held) -> None:
    ours, theirs = joined(server, held)
    ours.send({"verdict": None, "text": "ü" * 1000})
    theirs.send({"link": ""})
    assert theirs.receive(5) == {"verdict": None, "text": "ü" * 1000}
    assert ours.receive(5) == {"link": ""}
    assert ours.receive(0) is None
    theirs.close()
    assert ours.ready(5)
    with pytest.raises(GoneError):
        ours.receive(5)


class Payload:
    """What makes a folder in whoever reads it."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        os.urandom(200),
        b"\0" * 500,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
        struct.pack("<I", 2**31 - 1) + b"x" * 100,
        pickle.dumps(Payload()) * 3,
    ],
    ids=["silence", "noise", "zeros", "http", "a huge length", "a pickle"],
)
def test_a_stranger_is_sent_away_and_the_ranks_still_meet(
    server: Server, held: Held, greeting: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(40):
        stream = held.enter_context(socket.socket(socket.AF_INET if server.port else socket.AF_UNIX))
        stream.settimeout(5)
        stream.connect(address(server))
        stream.sendall(greeting)
    joined(server, held)
    assert not (tmp_path / "executed").exists()


def test_a_stranger_with_another_secret_is_named_and_told_nothing(server: Server, held: Held) -> None:
    reason = connect(address(server), b"a guess", 0)
    assert reason == "who answers does not know the secret of this launch"
    joined(server, held)
    host = "127.0.0.1" if server.port else "this host"
    assert server.strangers() == [f"1 connection(s) from {host}: it does not know the secret of this launch"]


def test_who_pretends_to_be_rank_0_is_not_believed(held: Held) -> None:
    pretender = held.enter_context(socket.create_server(("127.0.0.1", 0)))

    def pretend() -> None:
        stream, _ = pretender.accept()
        with stream:
            stream.sendall(os.urandom(32))
            stream.recv(64)
            stream.sendall(os.urandom(32))

    thread = threading.Thread(target=pretend)
    thread.start()
    place = ("127.0.0.1", pretender.getsockname()[1])
    assert connect(place, SECRET, 0) == "who answers does not know the secret of this launch"
    thread.join()


def test_a_message_that_is_changed_repeated_or_too_long_is_refused(server: Server, held: Held) -> None:
    text = b'{"link": "a"}'
    for length, reason in ((len(text), "changed on its way"), (2**30, "longer than any")):
        ours, theirs = joined(server, held)
        theirs.send({"link": "a"})
        assert ours.receive(5) == {"link": "a"}
        old = theirs._code(b"client", 1, text)  # of the message that has been read
        theirs._stream.sendall(struct.pack("<I", length) + old + text)
        with pytest.raises(StrangerError, match=reason):
            ours.receive(5)


def test_waiting_ends_when_it_is_asked_to(server: Server, held: Held) -> None:
    ours, _ = joined(server, held)
    asked = iter([None, None, "SIGTERM"])
    assert ours.receive(60, lambda: next(asked)) is None
    assert connect(("127.0.0.1", 1), SECRET, 60, lambda: "SIGTERM") is None


def test_the_name_of_a_socket_tells_nothing_and_belongs_to_one_secret() -> None:
    names = {meeting.name_of(secret, place) for secret in (SECRET, b"other") for place in ("29500", "29501")}
    assert len(names) == 4
    assert all(len(name) == len("\0halfstep-") + 40 for name in names)


def test_a_store_that_nobody_needs_any_longer_leaves_its_file_alone(tmp_path: Path) -> None:
    """Its destructor would open the file again, and wait for it where its folder has been removed meanwhile."""
    file = tmp_path / "store"
    store = file_store(file, Rank(rank=0, local_rank=0, world_size=2, local_world_size=2, source="by hand"))
    store.set("key", "value")
    before = file.read_bytes()
    del store
    gc.collect()
    assert file.read_bytes() == before
