"""Whether nodes can connect to each other, which is looked at before any process group tries for minutes."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any


def reach(place: Sequence[Any], limit: float) -> str:
    """Connect to the first rank of another node, and return what keeps us from it, or nothing."""
    address, port, host = place
    if not address:
        return ""
    try:
        with socket.create_connection((address, port), timeout=min(10.0, limit / 2)):
            return ""
    except OSError as error:
        return f"{socket.gethostname()} cannot reach {host} at {address}: {error.strerror or error}"


@contextlib.contextmanager
def reachable() -> Iterator[int]:
    """Let others connect at a port of its own, which is returned, for IPv4 and, where there is that, IPv6.

    Nothing is read: that somebody gets through is all that is asked.
    """
    if socket.has_dualstack_ipv6():
        listening = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listening = socket.create_server(("", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                listening.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
