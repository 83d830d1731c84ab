"""One page of memory that a rank and its watchdog share: how far the rank is, and what the watchdog needs to know."""

import json
import mmap
import signal
import struct
import time
from dataclasses import dataclass
from typing import Any

PHASES = (
    "start", "import", "join", "build", "compile", "load", "data", "forward", "backward", "step", "evaluate", "save",
    "exit",
)  # fmt: skip
ALONE = ("start", "import", "build", "compile", "data", "save")
"""Phases in which a rank waits for nobody: of ranks that are equally far, one that stands here holds up the others."""
SIZE = 64 * 1024
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What a watchdog ignores: a batch system sends these to everybody, and a watchdog must not go before its rank."""

_NUMBER = {name: number for number, name in enumerate(PHASES)}
_BEAT = struct.Struct("@4q")
_WORD = struct.Struct("@q")
# Eight-byte words, each written whole by one instruction, so that no lock is needed.
_WORDS = ("ended", "code", "timeout", "signalled", "deadline", "interrupts", "stacks", "version")
_AT = {name: 64 + 8 * number for number, name in enumerate(_WORDS)}
_ABOUT = 256


@dataclass(frozen=True, kw_only=True)
class Beat:
    """How far a rank is."""

    count: int
    """Marks so far; ranks make the same ones, so that the smallest count lags."""
    phase: str
    step: int
    at: float
    """When the last mark was made, by time.monotonic(), which processes of a host share."""


class Pulse:
    """The shared page; the rank writes, the watchdog reads."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self.memory = memory
        self._count = 0

    def mark(self, phase: str, step: int) -> None:
        """Note progress."""
        self._count += 1
        _BEAT.pack_into(self.memory, 0, self._count, _NUMBER[phase], step, time.monotonic_ns())

    def beat(self) -> Beat:
        """Return the last mark."""
        count, phase, step, at = _BEAT.unpack_from(self.memory, 0)
        return Beat(count=count, phase=PHASES[phase], step=step, at=at / 1e9)

    def touch(self) -> None:
        """Note that the rank lives, without counting it as progress that every rank makes."""
        _WORD.pack_into(self.memory, 24, time.monotonic_ns())

    def put(self, name: str, value: int) -> None:
        """Write one word."""
        _WORD.pack_into(self.memory, _AT[name], value)

    def get(self, name: str) -> int:
        """Read one word."""
        return _WORD.unpack_from(self.memory, _AT[name])[0]

    def put_seconds(self, name: str, seconds: float) -> None:
        """Write a time or a duration."""
        self.put(name, int(seconds * 1e9))

    def get_seconds(self, name: str) -> float:
        """Read a time or a duration; 0 where none was written."""
        return self.get(name) / 1e9

    def put_about(self, about: dict[str, Any]) -> None:
        """Write what a watchdog needs to know of the run, and then a new version number."""
        text = json.dumps(about).encode()
        assert len(text) < SIZE - _ABOUT, "the run directory's name is too long"
        self.memory[_ABOUT : _ABOUT + len(text) + 1] = text + b"\0"
        self.put("version", self.get("version") + 1)

    def about(self) -> dict[str, Any]:
        """Read what the rank has written of the run, or nothing yet."""
        if not self.get("version"):
            return {}
        return json.loads(bytes(self.memory[_ABOUT:]).partition(b"\0")[0])
