"""Where the ranks of a launch hold their roll call; a rank that will not come can leave word there without torch.

Ranks of one host need no network for it: they meet at a socket of the host that only they can name.
"""

import contextlib
import datetime
import hmac
import json
import os
import time
from collections.abc import Callable
from typing import Any

from halfstep.launcher.engine.ranks import meeting
from halfstep.launcher.errors import TopologyError
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

    def say_not_coming(self, why: str) -> None:
        """Let rank 0 know that this rank was asked to stop and will not come, if rank 0 is there to be told.

        Where it has to be looked up in torchrun's store, torchrun ends the others.
        """
        if not self._announces:
            self.tell(self.own(), why)

    def tell(self, address: meeting.Address, why: str) -> None:
        """Let who listens at an address know that this rank will not come."""
        connection = meeting.connect(address, self._secret, 1.0)
        if isinstance(connection, meeting.Connection):
            with contextlib.suppress(meeting.GoneError):
                connection.send({"stopping": why})
            connection.close()

    def _agent(self, seconds: float) -> Any:
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

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
