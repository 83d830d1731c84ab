"""Where the ranks of a launch find each other: first for the roll call, then for the process group.

Ranks of one host need no network for either: a socket of the host, and a file in a folder that only this user can
enter. Between hosts the process group's store listens at MASTER_ADDR alone, its keys under a name that nobody can
guess; torch's store knows no passwords, so the network between hosts has to be trusted (docs/reliability.md).
"""

import contextlib
import datetime
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from halfstep.launcher.engine.ranks import meeting
from halfstep.launcher.errors import TopologyError
from halfstep.launcher.system import caches
from halfstep.launcher.system.machine import is_this_host
from halfstep.launcher.topology import Rank


def several_nodes(rank: Rank) -> bool:
    """Tell whether the ranks are on more than one host."""
    return rank.world_size > rank.local_world_size


class Doorway:
    """Where the roll call is held, as each rank works it out from its environment and the launch's secret.

    torchrun has a store of its own at MASTER_PORT: ranks of several nodes then read there where rank 0 listens.
    """

    def __init__(self, rank: Rank, secret: bytes) -> None:
        self._rank, self._secret = rank, secret
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.where = f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._announces = several_nodes(rank) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def own(self) -> meeting.Address:
        """Return where rank 0 has to listen; raises TopologyError where the ranks cannot be on one host as they say."""
        if several_nodes(self._rank):
            return self.host, 0 if self._announces else self.port
        if not is_this_host(self.host):
            raise TopologyError(
                f"all {self._rank.world_size} ranks are said to be on one host, and {self.host} is another",
                where=f"{self.where}, and LOCAL_WORLD_SIZE={self._rank.local_world_size}",
                fix="let LOCAL_WORLD_SIZE be the number of ranks on this host, or MASTER_ADDR this host's address",
            )
        launch = os.environ.get("HALFSTEP_LAUNCH", "")
        return meeting.name_of(self._secret, json.dumps([self.port, self._attempt, launch]))

    def announce(self, port: int) -> None:
        """Write where rank 0 listens into torchrun's store, signed; without torchrun the others know."""
        if self._announces:
            text = json.dumps([self.host, port])
            self._agent(60.0).set("meeting", json.dumps([text, self._sign(text)]))

    def find(self, seconds: float, ended: Callable[[], object]) -> meeting.Address | None:
        """Return where rank 0 can be met, None where it does not say so in time; what it did not sign is no answer."""
        if not self._announces:
            return self.own()
        end = time.monotonic() + seconds
        agent = self._agent(seconds)
        while time.monotonic() < end and not ended():
            with contextlib.suppress(ValueError, TypeError, RuntimeError):
                if agent.check(["meeting"]):
                    text, code = json.loads(agent.get("meeting"))
                    if hmac.compare_digest(code, self._sign(text)):
                        host, port = json.loads(text)
                        return host, port
            time.sleep(0.1)
        return None

    def _agent(self, seconds: float) -> Store:
        try:
            store = TCPStore(self.host, self.port, timeout=datetime.timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            raise TopologyError(
                f"torchrun's store cannot be reached: {str(error).splitlines()[0]}",
                where=self.where,
                fix="is the first node up, and can its address be reached from here?",
            ) from None
        return PrefixStore(f"halfstep/{self._attempt}", store)

    def _sign(self, text: str) -> str:
        return hmac.digest(self._secret, f"meeting {self._attempt} {text}".encode(), "sha256").hex()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the process group's store is, as rank 0 tells the others once they have proved themselves."""

    file: str | None = None
    """On one host: a file in a folder of this user alone."""
    host: str = ""
    port: int = 0
    prefix: str = ""
    """Between hosts: what all keys begin with."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return asdict(self)


class Stores:
    """The store that a process group of this launch meets at."""

    def __init__(self, rank: Rank, seconds: float) -> None:
        self._rank, self._timeout = rank, datetime.timedelta(seconds=seconds)

    def open_first(self, host: str) -> tuple[Place, Store]:
        """Make the store on rank 0 and return where the others find it."""
        if self._rank.world_size == 1:
            return Place(), HashStore()
        if not several_nodes(self._rank):
            place = Place(file=str(caches.scratch() / "store"))
            return place, self.open(place)
        with _bound(host) as listening:
            port = listening.getsockname()[1]
            place = Place(host=host, port=port, prefix=secrets.token_hex(16))
            store = TCPStore(
                host,
                port,
                self._rank.world_size,
                is_master=True,
                timeout=self._timeout,
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )
        return place, PrefixStore(place.prefix, store)

    def open(self, place: Place) -> Store:
        """Return the store at a place that rank 0 has told."""
        if place.file is not None:
            store = file_store(Path(place.file), self._rank)
            store.set_timeout(self._timeout)
            return store
        store = TCPStore(place.host, place.port, self._rank.world_size, timeout=self._timeout, wait_for_workers=False)
        return PrefixStore(place.prefix, store)


def file_store(file: Path, rank: Rank) -> Store:
    """Return a store for ranks of one host in a file whose folder nobody else may enter."""
    return FileStore(str(file), rank.world_size)


def _bound(host: str) -> socket.socket:
    """Return a socket that listens at one address of this host; at all where that address is only the host's name."""
    for address in (host, ""):
        with contextlib.suppress(OSError):
            family = socket.getaddrinfo(address or "0.0.0.0", 0, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((address, 0), family=family, backlog=4096)
    raise TopologyError(
        f"{socket.gethostname()} cannot listen for the other nodes at {host}",
        where=f"MASTER_ADDR={host}",
        fix="let MASTER_ADDR be an address of the node of rank 0",
    )
