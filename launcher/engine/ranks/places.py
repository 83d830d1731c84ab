"""Where the ranks of a launch open their process group, once the roll call is over.

Ranks of one host need no network: a file in a folder that only this user can enter. Between hosts the store listens at
MASTER_ADDR alone, its keys under a name that nobody can guess; torch's store knows no passwords, so the network between
hosts has to be trusted (docs/reliability.md).
"""

import contextlib
import datetime
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from halfstep.launcher.engine.ranks.doorway import several_nodes
from halfstep.launcher.errors import TopologyError
from halfstep.launcher.system import caches
from halfstep.launcher.topology import Rank


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


_KEPT: list[Store] = []
"""Stores whose destructor must not run: it opens the file once more and, where the first rank that is done has removed
the folder meanwhile, tries again until the store's timeout (torch, FileStore.cpp). A rank ends without destructors."""


def file_store(file: Path, rank: Rank) -> Store:
    """Return a store for ranks of one host in a file whose folder nobody else may enter."""
    _KEPT.append(FileStore(str(file), rank.world_size))
    return _KEPT[-1]


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
