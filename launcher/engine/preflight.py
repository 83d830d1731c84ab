"""The roll call before anything is built: every rank says where it is and what it has, and rank 0 compares.

It runs over a plain TCP store, before any process group: a group that cannot form says only that it timed out.
"""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from launcher.engine.reports import Report, different, report, summary
from launcher.errors import Fault, HalfstepError, Stalled, TopologyError
from launcher.plan.plan import Plan
from launcher.topology import Rank, hosts

LIMIT = 300.0
"""Seconds that the first rank to be there waits for the last, which may import torch from a cold disk meanwhile."""
_KINDS: dict[str, type[HalfstepError]] = {"wrong": TopologyError, "stalled": Stalled}
_MESSAGE_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}


class RollCall:
    """The store that ranks meet at; rank 0 keeps it open, because torch's process group then uses it too."""

    def __init__(self, rank: Rank, plan: Plan) -> None:
        self._rank, self._plan = rank, plan
        self._limit = min(LIMIT, 0.8 * plan.watch.startup)
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._began = time.perf_counter()
        # Under torchrun, its agent has the store.
        serves = rank.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            self._knock()
        try:
            self._store = dist.TCPStore(
                self._host,
                self._port,
                rank.world_size,
                is_master=serves,
                timeout=datetime.timedelta(seconds=self._limit),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise self._unreachable(str(error).splitlines()[0]) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._calls = dist.PrefixStore(f"halfstep/{attempt}", self._store)

    def _knock(self) -> None:
        """Wait until the first node answers; a store that cannot connect says so at length, and not why."""
        end = time.monotonic() + self._limit
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=max(1.0, self._limit / 4)).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise self._unreachable(error.strerror or error) from None
                time.sleep(0.2)

    def answer(self) -> dict[str, Any]:
        """Report, compare, and return on rank 0 what is written down, nothing elsewhere.

        Raises on every rank: Stalled where a rank is missing or cannot reach the next node, TopologyError where one has
        something else than the others.
        """
        leads = self._rank.local_rank == 0
        with contextlib.closing(_listener()) as ear:
            own = report(self._rank, self._plan, (self._host, self._port), ear.getsockname()[1] if leads else None)
            self._calls.set(f"report/{own.rank}", json.dumps(own.__dict__))
            reports = self._collect() if self._rank.rank == 0 else []
            if self._rank.rank == 0 and len(reports) < self._rank.world_size:
                verdict = self._judge(reports)
            else:
                if leads and self._several_nodes:
                    self._calls.set(f"link/{own.rank}", self._reach_the_next_node())
                verdict = self._judge(reports) if self._rank.rank == 0 else json.loads(self._hear())
            if self._rank.rank == 0:
                self._calls.set("plan", own.plan)
                self._calls.set("verdict", json.dumps(verdict))
                if verdict:
                    self._wait_for_listeners(len(reports) - 1)
        if verdict:
            kind, *words = verdict
            error = _KINDS[kind](words[0], where=words[1], fix=words[2])
            error.said_elsewhere = self._rank.rank != 0
            raise error
        if self._rank.rank and self._calls.get("plan").decode() != own.plan:
            # Where two launches share a port (the deepspeed command's is 29500), the other one's rank may have been
            # counted in this one's place.
            raise TopologyError(
                f"rank 0 at {self._host}:{self._port} is of another run",
                where=f"MASTER_ADDR={self._host} MASTER_PORT={self._port}, rank {self._rank.rank}",
                fix="choose another port: `deepspeed --master_port N`; `halfstep run` finds a free one",
            )
        return summary(reports, time.perf_counter() - self._began) if reports else {}

    @property
    def _several_nodes(self) -> bool:
        return self._rank.world_size > self._rank.local_world_size

    def _hear(self) -> bytes:
        try:
            # Rank 0 waits for everybody first, then for the links between nodes.
            self._calls.wait(["verdict"], datetime.timedelta(seconds=2 * self._limit + 60))
            verdict = self._calls.get("verdict")
            self._calls.add("heard", 1)
            return verdict
        except (dist.DistError, RuntimeError) as error:
            raise Fault(
                f"rank 0 was gone before all ranks had met: {str(error).splitlines()[0]}",
                where=f"MASTER_ADDR={self._host} MASTER_PORT={self._port}",
                fix="what it said before is the cause",
            ) from None

    def _wait_for_listeners(self, ranks: int) -> None:
        """Keep the store open until all have heard the verdict: it ends with this rank."""
        end = time.monotonic() + 5
        while self._calls.add("heard", 0) < ranks and time.monotonic() < end:
            time.sleep(0.02)

    def _collect(self) -> list[Report]:
        end = time.monotonic() + self._limit
        missing = set(range(self._rank.world_size))
        while missing and time.monotonic() < end:
            missing -= {rank for rank in missing if self._calls.check([f"report/{rank}"])}
            if missing:
                time.sleep(0.05)
        there = sorted(set(range(self._rank.world_size)) - missing)
        return [Report(**json.loads(self._calls.get(f"report/{rank}"))) for rank in there]

    def _reach_the_next_node(self) -> str:
        """Connect to the first rank of the next node, and return what keeps us from it, or nothing."""
        step, world = self._rank.local_world_size, self._rank.world_size
        other = (self._rank.rank + step) // step * step % world
        try:
            self._calls.wait([f"report/{other}"], datetime.timedelta(seconds=self._limit))
            found = Report(**json.loads(self._calls.get(f"report/{other}")))
        except (dist.DistError, RuntimeError):
            return ""  # it never came: rank 0 says so
        # Where a host calls itself 127.0.1.1, only the first one's address is known to the others.
        address = found.address or (self._host if other == 0 else "")
        if not address:
            return ""
        try:
            with socket.create_connection((address, found.listens or 0), timeout=min(10.0, self._limit / 2)):
                return ""
        except OSError as error:
            return f"{socket.gethostname()} cannot reach {found.host} at {address}: {error.strerror or error}"

    def _judge(self, reports: Sequence[Report]) -> tuple[str, str, str, str] | None:
        """Return what is wrong, if anything: the kind of error, what, where from, and what to do."""
        there = {one.rank for one in reports}
        if absent := sorted(set(range(self._rank.world_size)) - there):
            nodes = _names_of_nodes(absent, self._rank, reports)
            return (
                "stalled",
                f"{nodes} did not come to {self._host} within {self._limit:.0f} s: rank {_some(absent)} of "
                f"{self._rank.world_size}",
                f"MASTER_ADDR={self._host} MASTER_PORT={self._port}",
                "look at that node: is it up, can it reach the first one, is the network interface the right one?",
            )
        for one in reports:
            if one.problem:
                fix = "mend that node, or put data where all see it"
                return "wrong", f"{one.host}: {one.problem}", "the preflight", fix
        if told := different(reports):
            fix = "give all nodes the same installation and the same data"
            return "wrong", told, "the preflight: what every rank has", fix
        for leader in range(0, self._rank.world_size, self._rank.local_world_size) if self._several_nodes else ():
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._calls.wait([f"link/{leader}"], datetime.timedelta(seconds=min(30.0, self._limit)))
                if told := self._calls.get(f"link/{leader}").decode():
                    return "stalled", told, "the preflight", "look at the network between the two"
        return None

    def _unreachable(self, reason: object) -> HalfstepError:
        where = f"MASTER_ADDR={self._host} MASTER_PORT={self._port}"
        if self._rank.rank == 0:
            return TopologyError(
                f"{socket.gethostname()} cannot open port {self._port} for the others: {reason}",
                where=where,
                fix="name a port that is free: `deepspeed --master_port N`, or MASTER_PORT=N",
            )
        told = Stalled(
            f"{socket.gethostname()} (rank {self._rank.rank}) could not reach {self._host} within {self._limit:.0f} s: "
            f"{reason}",
            where=where,
            fix="is the first node up, does its name resolve to an address that the others see, is there no firewall?",
        )
        told.said_elsewhere = self._rank.local_rank != 0
        return told


def _listener() -> socket.socket:
    """Return a socket that listens at a port of its own, for IPv4 and, where there is that, IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def bandwidth(device: torch.device) -> dict[str, float]:
    """Measure an all-reduce over all ranks: `bytes`, median `seconds`, `gigabytes_per_second` of the bus.

    The bus's share is 2 (n - 1) / n of the bytes, the convention of nccl-tests; one rank alone has none. A collective.
    """
    ranks, size = dist.get_world_size(), _MESSAGE_BYTES[device.type]
    if ranks == 1:
        return {}
    message = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[2]
    rate = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    return {"bytes": size, "seconds": round(seconds, 6), "gigabytes_per_second": round(rate, 3)}


def _names_of_nodes(absent: Sequence[int], rank: Rank, reports: Sequence[Report]) -> str:
    """Name the nodes of ranks that never came: by others of the node, else by SLURM's list, else by number."""
    known = {one.rank // rank.local_world_size: one.host for one in reports}
    listed = hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    names = []
    for number in dict.fromkeys(one // rank.local_world_size for one in absent):
        names.append(known.get(number) or (listed[number] if number < len(listed) else f"node {number}"))
    return _some(names)


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(str(one) for one in values[:4])
    return shown + (f" and {len(values) - 4} more" if len(values) > 4 else "")
