"""Let the ranks of one launch meet: connections on which both ends first prove that they know the launch's secret.

On one host they meet at a socket that only they can name, between hosts at MASTER_ADDR. A message is JSON with a code
that nobody makes without the secret (HMAC-SHA256, RFC 2104); nothing that comes from outside is executed.
"""

import collections
import contextlib
import hmac
import json
import os
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from halfstep.launcher.rundir.trust import user_name

Address = str | tuple[str, int]
"""A name in Linux's abstract namespace, or host and port."""

_CODE_BYTES = _NONCE_BYTES = 32
_LARGEST_MESSAGE = 1 << 20
_PROOF_SECONDS = 10.0
_AT_ONCE = 256
"""Connections that may be proving themselves at a time; the others wait for their turn."""
_LENGTH = struct.Struct("<I")
_POLL_SECONDS = 0.1


class StrangerError(Exception):
    """Who is at the other end does not know the launch's secret, or sends what no rank would."""


class GoneError(Exception):
    """The other end has closed the connection."""


class Connection:
    """One end of a connection whose other end has proved itself; messages are JSON objects."""

    def __init__(self, stream: socket.socket, key: bytes, *, serves: bool) -> None:
        self._stream, self._key = stream, key
        self._names = (b"server", b"client") if serves else (b"client", b"server")
        self._sent = self._received = 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; raises GoneError where the other end has left."""
        text = json.dumps(message).encode()
        assert len(text) <= _LARGEST_MESSAGE, "a message between ranks is small"
        code = self._code(self._names[0], self._sent, text)
        self._sent += 1
        try:
            self._stream.sendall(_LENGTH.pack(len(text)) + code + text)
        except OSError:
            raise GoneError from None

    def receive(self, seconds: float, ended: Callable[[], object] = lambda: None) -> dict[str, Any] | None:
        """Return the next message, or None when there was none for so long, or `ended` returns something.

        Raises GoneError where the other end has left, StrangerError for what does not come from there.
        """
        end = time.monotonic() + seconds
        while not self.ready(min(_POLL_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end or ended():
                return None
        try:
            (length,) = _LENGTH.unpack(_read(self._stream, _LENGTH.size))
            if length > _LARGEST_MESSAGE:
                raise StrangerError("it sent a message longer than any that ranks send")
            code, text = _read(self._stream, _CODE_BYTES), _read(self._stream, length)
        except OSError:
            raise GoneError from None
        if not hmac.compare_digest(code, self._code(self._names[1], self._received, text)):
            raise StrangerError("a message was changed on its way")
        self._received += 1
        return json.loads(text)

    def ready(self, seconds: float = 0.0) -> bool:
        """Tell whether something can be received, the other end's leaving included, waiting for so long."""
        poller = select.poll()  # select() knows only the first 1,024 files of a process
        poller.register(self._stream, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def _code(self, sender: bytes, number: int, text: bytes) -> bytes:
        return _proof(self._key, sender, b"%d" % number, text)


class Server:
    """The first rank's side: proves itself to whoever comes, and keeps those who prove themselves too.

    Raises OSError where the address cannot be had.
    """

    def __init__(self, address: Address, secret: bytes) -> None:
        self._secret = secret
        self._strangers: collections.Counter[str] = collections.Counter()
        self._proved: queue.SimpleQueue[tuple[Connection, dict[str, Any]]] = queue.SimpleQueue()
        self._slots = threading.Semaphore(_AT_ONCE)
        self._closed, self._closing = False, threading.Lock()
        self._listening = _listen(address)
        threading.Thread(target=self._accept, name="halfstep-meeting", daemon=True).start()

    @property
    def port(self) -> int:
        """The TCP port it listens at; 0 for a socket of this host."""
        name = self._listening.getsockname()
        return name[1] if isinstance(name, tuple) else 0

    def next(self, seconds: float) -> tuple[Connection, dict[str, Any]] | None:
        """Return the next rank that has proved itself with its first message, or None where none does for so long."""
        with contextlib.suppress(queue.Empty):
            return self._proved.get(timeout=seconds) if seconds else self._proved.get_nowait()
        return None

    def strangers(self) -> list[str]:
        """Return a phrase on each kind of who came and was sent away."""
        return [f"{count} connection(s) {about}" for about, count in self._strangers.items()]

    def close(self) -> None:
        """Let nobody come any more; connections that `next` has returned stay."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listening.close()
        with self._closing:
            self._closed = True
        while late := self.next(0):
            late[0].close()

    def _accept(self) -> None:
        while True:
            self._slots.acquire()
            try:
                stream, peer = self._listening.accept()
            except OSError:
                return
            host = peer[0] if isinstance(peer, tuple) else "this host"
            threading.Thread(target=self._prove, args=(stream, host), daemon=True).start()

    def _prove(self, stream: socket.socket, host: str) -> None:
        try:
            if stranger := _other_user(stream):
                raise StrangerError(f"it belongs to {stranger}")
            connection = _as_server(stream, self._secret)
            message = connection.receive(_PROOF_SECONDS)
            with self._closing:
                if message is None or self._closed:
                    connection.close()
                else:
                    self._proved.put((connection, message))
        except (StrangerError, GoneError, OSError, ValueError) as error:
            if not isinstance(error, GoneError | ConnectionError) and len(self._strangers) < _AT_ONCE:
                self._strangers[f"from {host}: {error}"] += 1
            stream.close()
        finally:
            self._slots.release()


def connect(
    address: Address, secret: bytes, seconds: float, ended: Callable[[], object] = lambda: None
) -> Connection | str | None:
    """Connect to the first rank, again and again for `seconds`; return why it did not work, or None when `ended`."""
    end, reason = time.monotonic() + seconds, "nobody answers"
    while not ended():
        try:
            stream = _dial(address)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            try:
                if stranger := _other_user(stream):
                    raise StrangerError(f"who answers belongs to {stranger}")
                return _as_client(stream, secret)
            except (StrangerError, GoneError, OSError, ValueError) as error:
                reason = str(error) or "who answers does not know the secret of this launch"
                stream.close()
        if time.monotonic() >= end:
            return reason
        time.sleep(_POLL_SECONDS)
    return None


def _as_server(stream: socket.socket, secret: bytes) -> Connection:
    stream.settimeout(_PROOF_SECONDS)
    own = secrets.token_bytes(_NONCE_BYTES)
    stream.sendall(own)
    other = _read(stream, _NONCE_BYTES)
    if not hmac.compare_digest(_read(stream, _CODE_BYTES), _proof(secret, b"client", own, other)):
        raise StrangerError("it does not know the secret of this launch")
    stream.sendall(_proof(secret, b"server", own, other))
    return Connection(stream, _proof(secret, b"session", own, other), serves=True)


def _as_client(stream: socket.socket, secret: bytes) -> Connection:
    stream.settimeout(_PROOF_SECONDS)
    other = _read(stream, _NONCE_BYTES)
    own = secrets.token_bytes(_NONCE_BYTES)
    stream.sendall(own + _proof(secret, b"client", other, own))
    if not hmac.compare_digest(_read(stream, _CODE_BYTES), _proof(secret, b"server", other, own)):
        raise StrangerError("who answers does not know the secret of this launch")
    return Connection(stream, _proof(secret, b"session", other, own), serves=False)


def _proof(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(_LENGTH.pack(len(part)) + part for part in parts), "sha256")


def name_of(secret: bytes, place: str) -> str:
    """Return the name of the socket of this host at which the ranks with a secret meet; nobody else can work it out."""
    return f"\0halfstep-{_proof(secret, b'name', place.encode()).hex()[:40]}"


def _listen(address: Address) -> socket.socket:
    if isinstance(address, str):
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(address)
        listening.listen(_AT_ONCE)
        return listening
    family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    return socket.create_server(place[:2], family=family, backlog=_AT_ONCE)


def _dial(address: Address) -> socket.socket:
    if isinstance(address, str):
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(address)
        except OSError:
            stream.close()
            raise
        return stream
    return socket.create_connection(address, timeout=_PROOF_SECONDS)


def _read(stream: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = stream.recv(count - len(parts))
        if not part:
            raise GoneError
        parts += part
    return bytes(parts)


def _other_user(stream: socket.socket) -> str | None:
    """Return who is at the other end of a socket of this host, where that is neither this user nor root."""
    if stream.family != socket.AF_UNIX:
        return None
    _, user, _ = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return None if user in (os.geteuid(), 0) else user_name(user)
