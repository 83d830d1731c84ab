"""Asked to stop, by a signal or from within: one Stop per rank, heard even while Python's main thread is busy in C."""

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from halfstep.launcher.errors import EXIT_STOPPED, Interrupted
from halfstep.launcher.rundir.exits import write_exit

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_WRITING_SECONDS = 2.0
"""How long a last word may take to write: the file system may be what hangs."""


class Stop:
    """Whether this rank was asked to stop, and the thread that hears it."""

    def __init__(self) -> None:
        self.rank = 0
        self.attempt: Path | None = None
        """Where exit.json belongs, once it is known."""
        self.signalled: float = 0.0
        """When the first signal came, by time.monotonic(); 0 = none has."""
        self.interrupts = 0
        """How many SIGINTs came."""
        self.on_change: list[Callable[[], None]] = []
        """Called when a stop is asked for or its limit changes; maybe by a signal handler, so they must not wait."""
        self.on_leave: list[Callable[[int], None]] = []
        """Called with the exit code before this process ends by its control thread."""
        self._first: dict[str, tuple[str, float]] = {}
        self._handled_interrupts = 0
        self._grace = 0.0
        self._file: Path | None = None
        self._expired: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def asked(self) -> str | None:
        """Why this rank was asked to stop first, or None."""
        return self._first["asked"][0] if self._first else None

    @property
    def asked_at(self) -> float | None:
        """When, by time.monotonic()."""
        return self._first["asked"][1] if self._first else None

    @property
    def deadline(self) -> float | None:
        """When a rank that was asked to stop is ended, whatever it does; None = never."""
        return self.asked_at + self._grace if self.asked_at is not None and self._grace else None

    @property
    def signals(self) -> int:
        """The file that signals arrive at once installed, for the watchdog to look into when nobody reads it."""
        return self._signals.fileno()

    def install(self) -> None:
        """Hear signals from now on; call it in the main thread, and again after a library may have changed handlers."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        if self._thread is None:
            self._selector = selectors.DefaultSelector()
            self._signals, self._wakeup = socket.socketpair()
            self._signals.setblocking(False)
            self._wakeup.setblocking(False)
            self._selector.register(self._signals, selectors.EVENT_READ, self._hear)
            # A forked child (a data worker) shares our pipe: its signals would arrive here as ours.
            os.register_at_fork(after_in_child=self._forget)
            self._thread = threading.Thread(target=self._control, name="halfstep-control", daemon=True)
            self._thread.start()
        # Python runs handlers in the main thread only, and that may be inside a collective: the number also goes to a
        # pipe, from the signal's own handler in C.
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def ask(self, why: str) -> None:
        """Ask this rank to stop at its next good moment; the first reason stays."""
        self._first.setdefault("asked", (why, time.monotonic()))
        self._changed()

    def set_grace(self, seconds: float, expired: Callable[[], None]) -> None:
        """End the process with 75 this long after a stop was asked for, `expired` being called before; 0 = no limit."""
        self._grace, self._expired = seconds, expired
        self._changed()

    def look_for(self, file: Path) -> None:
        """Ask to stop when a file appears, whatever the rank is doing."""
        self._file = file
        self._wake()

    def watch(self, file: int, ready: Callable[[], None]) -> None:
        """Call `ready` in the control thread whenever a file can be read."""
        self._selector.register(file, selectors.EVENT_READ, ready)
        self._wake()

    def unwatch(self, file: int) -> None:
        """Undo `watch`."""
        self._selector.unregister(file)

    def leave(self, code: int, last_word: Callable[[], object] | None = None) -> None:
        """End this process at once with a code, saying a last word first if that takes no time."""
        with contextlib.suppress(Exception):
            if last_word is not None:
                word = threading.Thread(target=last_word, daemon=True)
                word.start()
                word.join(_WRITING_SECONDS)
            for tell in self.on_leave:
                tell(code)
        os._exit(code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal in the main thread, in case a library has taken the pipe from us."""
        self._handled_interrupts += number == signal.SIGINT
        self._note(number)
        self._wake()

    def _note(self, number: int) -> None:
        self.signalled = self.signalled or time.monotonic()
        self.ask(signal.Signals(number).name)

    def _changed(self) -> None:
        for tell in self.on_change:
            tell()
        self._wake()

    def _wake(self) -> None:
        if self._thread is not None:
            with contextlib.suppress(OSError):
                self._wakeup.send(b"\0")

    def _control(self) -> None:
        while True:
            deadline = self.deadline
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._file is not None and not self._first:
                wait = 1.0
                with contextlib.suppress(OSError):
                    if self._file.exists():
                        self.ask(f"the file {self._file.name}")
            for key, _ in self._selector.select(wait):
                key.data()
            if max(self.interrupts, self._handled_interrupts) >= 2:
                self.leave(Interrupted.exit_code, self._say_interrupted)
            deadline = self.deadline
            if deadline is not None and time.monotonic() >= deadline:
                self.leave(EXIT_STOPPED, self._expired)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._signals.recv(4096):
                if number in _SIGNALS:
                    # Only SIGINT counts: after Ctrl-C, DeepSpeed's launch.py sends its ranks a SIGTERM of its own.
                    self.interrupts += number == signal.SIGINT
                    self._note(number)

    def _say_interrupted(self) -> None:
        if self.attempt is not None:
            write_exit(self.attempt, Interrupted.exit_code, "interrupted", self.rank)

    def _forget(self) -> None:
        with contextlib.suppress(ValueError):
            if self._thread is not None and signal.getsignal(signal.SIGTERM) == self._handle:
                signal.set_wakeup_fd(-1)
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
