"""What a rank says of itself at the roll call, and how the reports of all ranks compare."""

import hashlib
import ipaddress
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.launcher.config.digest import digest
from halfstep.launcher.corpus.joined import read_corpora
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import environment
from halfstep.launcher.system import assets
from halfstep.launcher.topology import Rank

_ALIKE = {
    "halfstep": "Halfstep's code is {} on {}, and {} on {}",
    "plan": "the plan of the run is {} on {}, and {} on {}",
    "data": "the corpus is {} on {}, and {} on {}",
    "device": "the device is {} on {}, and {} on {}",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank says."""

    rank: int
    host: str
    address: str
    """Its own, on the way to the first node; empty where that is one that only the host itself can use."""
    device: str
    versions: dict[str, str]
    halfstep: str
    """Hash of Halfstep's own files."""
    plan: str
    data: str
    problem: str | None
    """What is missing on this node."""
    listens: int | None = None
    """The port at which a node's first rank can be reached."""


def report(rank: Rank, plan: Plan, master: tuple[str, int], listens: int | None) -> Report:
    """Return what this rank says; `master` is where it is to meet the others."""
    on_gpu = plan.topology.accelerator == "cuda"
    problem, data = None, ""
    if rank.local_rank == 0:  # the ranks of a node see the same files
        try:
            corpus = read_corpora(plan.data.path)
            data = corpus.digest
            if data != plan.data.digest or plan.data.tokens_digest not in (None, corpus.tokens_digest):
                problem = f"{plan.data.path} holds another corpus than the run was planned for"
            weights = plan.model.weights
            if weights and weights.startswith("/") and not Path(weights).exists():
                problem = f"the weights {weights} are not there"
        except HalfstepError as error:
            problem = error.what
    return Report(
        rank=rank.rank,
        host=socket.gethostname(),
        address=_address_towards(master),
        device=torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else "cpu",
        versions={**environment.versions(), "python": platform.python_version()},
        halfstep=_code_hash(),
        # What a host forecasts depends on the devices that its user measured, not on the question.
        plan=digest({**plan.to_dict(), "time": None}),
        data=data or plan.data.digest,
        problem=problem,
        listens=listens,
    )


def different(reports: Sequence[Report]) -> str | None:
    """Return one sentence on the first thing that is not the same everywhere, naming both nodes."""
    first = reports[0]
    for name in sorted(set[str]().union(*(other.versions for other in reports))):
        for other in reports:
            mine, its = first.versions.get(name, "missing"), other.versions.get(name, "missing")
            if mine != its:
                return f"{name} is {mine} on {first.host}, and {its} on {other.host}"
    for key, sentence in _ALIKE.items():
        for other in reports:
            mine, its = getattr(first, key), getattr(other, key)
            if mine != its:
                return sentence.format(mine, first.host, its, f"{other.host} (rank {other.rank})")
    return None


def summary(reports: Sequence[Report], seconds: float) -> dict[str, Any]:
    """Return what is written down: a row for each host, and what all have in common."""
    first = reports[0]
    rows: dict[str, dict[str, Any]] = {}
    for other in reports:
        row = rows.setdefault(
            other.host, {"host": other.host, "address": other.address, "device": other.device, "ranks": []}
        )
        row["ranks"].append(other.rank)
    common = {"versions": first.versions, "halfstep": first.halfstep, "plan": first.plan, "data": first.data}
    return {"seconds": round(seconds, 3), "hosts": list(rows.values()), **common}


def _address_towards(master: tuple[str, int]) -> str:
    """Return the address that this host uses on the way to another; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return ""
    return "" if ipaddress.ip_address(own.partition("%")[0]).is_loopback and not _is_here(master[0]) else own


def _is_here(host: str) -> bool:
    """Tell whether an address was named that means this host to itself only: then there is no other one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _code_hash() -> str:
    total = hashlib.sha256()
    root = assets.home()
    for file in sorted([*(root / "launcher").rglob("*.py"), *(root / "models").rglob("*.py")]):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:12]
