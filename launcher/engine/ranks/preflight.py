"""The roll call before anything is built: every rank says where it is and what it has, and rank 0 compares.

It runs before any process group: a group that cannot form says only that it timed out.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from halfstep.launcher.engine.ranks import links, meeting
from halfstep.launcher.engine.ranks.doorway import Doorway, several_nodes
from halfstep.launcher.engine.ranks.meeting import Connection, GoneError, Server, StrangerError
from halfstep.launcher.engine.ranks.places import Place, Stores
from halfstep.launcher.engine.ranks.reports import Report, different, report, summary
from halfstep.launcher.errors import Fault, HalfstepError, Stalled, Stopped, TopologyError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Rank, hosts

LIMIT = 300.0
"""Seconds that the first rank to be there waits for the last, which may import torch from a cold disk meanwhile."""
_KINDS: dict[str, type[HalfstepError]] = {
    "wrong": TopologyError,
    "stalled": Stalled,
    "gone": Fault,
    "stopped": Stopped,
}
_REPORT = TypeAdapter(Report)
Verdict = tuple[str, str, str, str]
"""The kind of error, what, where from, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Met:
    """What a rank knows after the roll call."""

    seen: dict[str, Any]
    """What is written down about it; empty on all ranks but the first."""
    store: Store
    """Where the process group meets."""


class RollCall:
    """One rank's part in the roll call; `asked` returns why this rank was asked to stop, if it was."""

    def __init__(self, rank: Rank, plan: Plan, secret: bytes, asked: Callable[[], str | None] = lambda: None) -> None:
        self._rank, self._plan, self._secret, self._asked = rank, plan, secret, asked
        self._limit = min(LIMIT, 0.8 * plan.watch.startup)
        self._end = time.monotonic() + self._limit
        self._door = Doorway(rank, secret)
        self._stores = Stores(rank, 2 * max(plan.watch.startup, plan.watch.timeout))

    def answer(self) -> Met:
        """Report, compare, and return where the process group meets and what is written down.

        Raises on every rank: Stalled where a rank is missing or cannot reach the next node, TopologyError where one has
        something else than the others, Fault where one has left, Stopped where one was asked to stop.
        """
        with contextlib.ExitStack() as held:
            reached = None
            if self._rank.local_rank == 0 and several_nodes(self._rank):
                reached = held.enter_context(links.reachable())
            own = report(self._rank, self._plan, (self._door.host, self._door.port), reached)
            return self._lead(own, held) if self._rank.rank == 0 else self._follow(own, held)

    def _lead(self, own: Report, held: contextlib.ExitStack) -> Met:
        """Do what rank 0 does: collect the reports, compare them, and tell everybody."""
        began, reports, others, strangers = time.perf_counter(), {0: own}, dict[int, Connection](), list[str]()
        verdict: Verdict | None = None
        if self._rank.world_size > 1:
            server = self._serve()
            held.callback(server.close)
            verdict = self._collect(server, reports, others, held)
            strangers = server.strangers()
        ordered = [reports[number] for number in sorted(reports)]
        verdict = verdict or self._judge(ordered, others)
        if verdict is not None:
            _send(others, {"verdict": verdict})
            raise _error(verdict)
        place, store = self._stores.open_first(self._door.host)
        _send(others, {"verdict": None, "place": place.to_dict()})
        seen = {**summary(ordered, time.perf_counter() - began), "strangers": sorted(strangers)}
        return Met(seen=seen, store=store)

    def _serve(self) -> Server:
        address = self._door.own()
        try:
            server = Server(address, self._secret)
        except OSError as error:
            if isinstance(address, str):
                raise TopologyError(
                    "another launch of this run is about to start on this host",
                    where=self._door.where,
                    fix="wait for it to end, stop it, or choose another out",
                ) from None
            raise TopologyError(
                f"{socket.gethostname()} cannot open port {address[1]} for the others: {error.strerror or error}",
                where=self._door.where,
                fix="name a port that is free: `deepspeed --master_port N`, or MASTER_PORT=N",
            ) from None
        self._door.announce(server.port)
        return server

    def _collect(
        self, server: Server, reports: dict[int, Report], others: dict[int, Connection], held: contextlib.ExitStack
    ) -> Verdict | None:
        """Wait for every rank's report; return why not all came, if so."""
        while len(reports) < self._rank.world_size:
            if why := self._asked():
                return _stopped(why)
            if time.monotonic() > self._end:
                return self._absent(list(reports.values()))
            if arrived := server.next(0.1):
                connection, message = arrived
                held.callback(connection.close)
                if why := message.get("stopping"):
                    return _stopped(str(why))
                try:
                    came = _REPORT.validate_json(json.dumps(message.get("report")), strict=True)
                except (ValidationError, AttributeError):
                    what = "a rank has reported what this version of Halfstep does not understand"
                    return "wrong", what, self._door.where, "give all nodes the same installation"
                if came.rank in reports or not 0 < came.rank < self._rank.world_size:
                    return (
                        "wrong",
                        f"a second process says that it is rank {came.rank}, on {came.host}",
                        self._door.where,
                        "is another launch of this run starting? Start it once, with as many ranks as planned",
                    )
                reports[came.rank], others[came.rank] = came, connection
            if verdict := self._left(reports, others):
                return verdict
        return None

    def _left(self, reports: dict[int, Report], others: dict[int, Connection]) -> Verdict | None:
        """Return what a rank that has reported says meanwhile, if it was asked to stop or is gone."""
        for number, connection in others.items():
            if not connection.ready():
                continue
            try:
                message = connection.receive(0) or {}
            except (GoneError, StrangerError, ValueError):
                message = {}
            if why := message.get("stopping"):
                return _stopped(str(why))
            return (
                "gone",
                f"rank {number} on {reports[number].host} was gone before all ranks had met",
                self._door.where,
                "what it said before is the cause",
            )
        return None

    def _judge(self, reports: Sequence[Report], others: dict[int, Connection]) -> Verdict | None:
        """Return what is wrong, if anything."""
        for node in reports:
            if node.problem:
                fix = "fix that node, or put data where all see it"
                return "wrong", f"{node.host}: {node.problem}", "the preflight", fix
        if differs := different(reports):
            fix = "give all nodes the same installation and the same data"
            return "wrong", differs, "the preflight: what every rank has", fix
        for problem in self._links(reports, others) if several_nodes(self._rank) else ():
            return "stalled", problem, "the preflight", "look at the network between the two"
        return None

    def _links(self, reports: Sequence[Report], others: dict[int, Connection]) -> list[str]:
        """Let the first rank of each node connect to that of the next, and return what kept them from it."""
        step, world = self._rank.local_world_size, self._rank.world_size
        leaders = range(0, world, step)
        for leader in leaders:
            if leader in others:
                with contextlib.suppress(GoneError):
                    others[leader].send({"reach": self._next_node(reports, leader)})
        problems = [links.reach(self._next_node(reports, 0), self._limit)]
        for leader in leaders:
            if leader in others:
                with contextlib.suppress(GoneError, StrangerError, ValueError):
                    answer = others[leader].receive(min(30.0, self._limit), self._asked) or {}
                    problems.append(str(answer.get("link") or ""))
        return [problem for problem in problems if problem]

    def _next_node(self, reports: Sequence[Report], rank: int) -> list[Any]:
        """Return address, port and name of the node after a rank's own."""
        step, world = self._rank.local_world_size, self._rank.world_size
        other = reports[(rank + step) // step * step % world]
        # Where a host calls itself 127.0.1.1, only the first one's address is known to the others.
        return [other.address or (self._door.host if other.rank == 0 else ""), other.listens or 0, other.host]

    def _absent(self, reports: Sequence[Report]) -> Verdict:
        there = {arrived.rank for arrived in reports}
        absent = sorted(set(range(self._rank.world_size)) - there)
        nodes = _names_of_nodes(absent, self._rank, reports)
        return (
            "stalled",
            f"{nodes} did not come to {self._door.host} within {self._limit:.0f} s: rank {_some(absent)} of "
            f"{self._rank.world_size}",
            self._door.where,
            "look at that node: is it up, can it reach the first one, is the network interface the right one?",
        )

    def _follow(self, own: Report, held: contextlib.ExitStack) -> Met:
        """Do what the other ranks do: report, and hear what comes of it."""
        connection = self._connect()
        held.callback(connection.close)
        try:
            connection.send({"report": own.__dict__})
            # Rank 0 waits for everybody first, then for the links between nodes.
            message = self._hear(connection, 2 * self._limit + 60)
            if "reach" in message:
                connection.send({"link": links.reach(message["reach"], self._limit)})
                message = self._hear(connection, 2 * self._limit + 60)
        except (GoneError, StrangerError, ValueError):
            raise Fault(
                "rank 0 was gone before all ranks had met",
                where=self._door.where,
                fix="what it said before is the cause",
            ) from None
        if message.get("verdict"):
            raise _error(message["verdict"], reported=True)
        return Met(seen={}, store=self._stores.open(Place(**message["place"])))

    def _hear(self, connection: Connection, seconds: float) -> dict[str, Any]:
        message = connection.receive(seconds, self._asked)
        if message is None:
            if why := self._asked():
                connection.send({"stopping": why})
                raise _error(_stopped(why))
            raise GoneError
        return message

    def _connect(self) -> Connection:
        address = self._door.find(self._end - time.monotonic(), self._asked)
        reason: object = "it never said where it can be met"
        if address is not None:
            reason = meeting.connect(address, self._secret, self._end - time.monotonic(), self._asked)
        if isinstance(reason, Connection):
            return reason
        if why := self._asked():
            if address is not None:
                self._door.tell(address, why)
            raise _error(_stopped(why))
        raise self._unreachable(str(reason))

    def _unreachable(self, reason: str) -> HalfstepError:
        return Stalled(
            f"{socket.gethostname()} (rank {self._rank.rank}) could not reach {self._door.host} "
            f"within {self._limit:.0f} s: {reason}",
            where=self._door.where,
            fix="is the first node up, does its name resolve to an address that the others see, is there no firewall?",
            reported=self._rank.local_rank != 0,
        )


def _send(others: dict[int, Connection], message: dict[str, Any]) -> None:
    for connection in others.values():
        with contextlib.suppress(GoneError):
            connection.send(message)


def _error(verdict: Sequence[str], *, reported: bool = False) -> HalfstepError:
    kind, what, where, fix = verdict
    return _KINDS[kind](what, where=where, fix=fix, reported=reported)


def _stopped(why: str) -> Verdict:
    return "stopped", f"{why}, before the ranks had met", "nothing is lost", "start the same command again"


def _names_of_nodes(absent: Sequence[int], rank: Rank, reports: Sequence[Report]) -> str:
    """Name the nodes of ranks that never came: by others of the node, else by SLURM's list, else by number."""
    known = {came.rank // rank.local_world_size: came.host for came in reports}
    listed = hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    names = []
    for number in dict.fromkeys(rank_number // rank.local_world_size for rank_number in absent):
        names.append(known.get(number) or (listed[number] if number < len(listed) else f"node {number}"))
    return _some(names)


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:4])
    return shown + (f" and {len(values) - 4} more" if len(values) > 4 else "")
