"""A rank's side of being watched: it marks its progress, and its watchdog, another process, acts when that ends."""

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from halfstep.launcher.errors import Fault, Stopped
from halfstep.launcher.rundir import exits
from halfstep.launcher.system import processes
from halfstep.launcher.watchdog.shared_page import IGNORED, SIZE, Pulse
from halfstep.launcher.watchdog.stop import Stop

EARLY_GRACE_SECONDS = 3.0
"""How long a rank that is asked to stop may take before its attempt has begun: there is nothing to save."""
_WATCHDOGS = 4
"""One, and three more where somebody kills it."""


class Heartbeat:
    """What a rank tells its watchdog, and what it does on the watchdog's word."""

    def __init__(self, rank: int, stop: Stop) -> None:
        self._rank, self._stop = rank, stop
        self._pulse = Pulse(bytearray(SIZE))
        self._memory: int | None = None
        self._socket: socket.socket | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._started = 0
        self._launchers: list[processes.Process] = []
        self._log: object = None
        stop.rank = rank
        stop.on_change.append(self._tell_stop)
        stop.on_leave.append(self.end)

    def start(self) -> None:
        """Start the watchdog; without Linux there is none, and a rank runs unwatched."""
        if not hasattr(os, "memfd_create") or not sys.executable:
            return
        self._memory = os.memfd_create("halfstep-heartbeat")
        os.ftruncate(self._memory, SIZE)
        page = mmap.mmap(self._memory, SIZE)
        page[:] = self._pulse.memory[:]  # what was set before now
        self._pulse = Pulse(page)
        # A data worker that was forked from the rank makes no progress for it.
        os.register_at_fork(after_in_child=self._forget)
        self._launchers = processes.launchers_above(os.getpid(), over_ssh="HALFSTEP_REMOTE" in os.environ)
        first = processes.starter()
        if first is not None and first.pid not in [launcher.pid for launcher in self._launchers]:
            self._launchers.append(first)  # a shell between the two hides it
        self._dump_stacks_to(sys.stderr)
        self.mark("start")
        self._tell_stop()
        self._spawn()

    def set_timeout(self, seconds: float) -> None:
        """Count this rank as stalled when it makes no mark for so long; 0 = never."""
        self._pulse.put_seconds("timeout", seconds)

    def set_attempt(self, attempt: Path, world_size: int, log: Path | None = None) -> None:
        """Tell where this attempt's exit.json and heartbeats belong, and the rank's log, which gets its stacks."""
        attempt = attempt.absolute()
        log = log or attempt / f"rank-{self._rank}.log"
        self._stop.attempt = attempt
        with contextlib.suppress(OSError):
            self._dump_stacks_to(log.open("ab"))
        self._pulse.put_about({"attempt": str(attempt), "world_size": world_size, "log": str(log)})

    def mark(self, phase: str, step: int = 0) -> None:
        """Note progress; every rank has to make the same marks in the same order, so that the counts compare."""
        self._pulse.mark(phase, step)

    def touch(self) -> None:
        """Note progress that other ranks may not make: it keeps the watchdog quiet, and is not counted."""
        self._pulse.touch()

    def end(self, code: int) -> None:
        """Note that this rank ends by itself with this code; it has half a minute to do so."""
        self._pulse.put("code", code)
        self._pulse.put("ended", 1)

    def _dump_stacks_to(self, file: object) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.register(signal.SIGQUIT, file=file, all_threads=True)  # type: ignore[arg-type]
            self._log = file  # it has to stay open
            self._pulse.put("stacks", 1)

    def _tell_stop(self) -> None:
        self._pulse.put_seconds("signalled", self._stop.signalled)
        self._pulse.put_seconds("deadline", self._stop.deadline or 0.0)
        self._pulse.put("interrupts", self._stop.interrupts)

    def _spawn(self) -> None:
        assert self._memory is not None, "start() comes first"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own, pidfd = processes.stat(os.getpid()), processes.pidfd(os.getpid())
        given = {
            "rank": self._rank,
            "pid": os.getpid(),
            "start": own.start if own else 0,
            # Opened here: the rank may be gone before its watchdog is awake.
            "pidfd": pidfd,
            "memory": self._memory,
            "socket": theirs.fileno(),
            "signals": self._stop.signals,
            "launchers": [[launcher.pid, launcher.start, launcher.name] for launcher in self._launchers],
        }
        command = [sys.executable, "-S", "-P", str(Path(__file__).with_name("watcher.py")), json.dumps(given)]
        files = [file for file in (self._memory, theirs.fileno(), self._stop.signals, pidfd) if file is not None]
        # Blocked signals stay blocked in a new process: until the watchdog ignores them itself, none can end it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            # A session of its own: Ctrl-C, a signal to the launch's group, and a stop of it all pass it by.
            self._watchdog = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=files,
                start_new_session=True,
                cwd="/",
            )
        except OSError:
            ours.close()  # no process can be had: better unwatched than not at all
        else:
            self._started += 1
            self._socket = ours
            self._stop.watch(ours.fileno(), self._obey)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
            if pidfd is not None:
                os.close(pidfd)

    def _obey(self) -> None:
        """Do what the watchdog says; where it has gone, start another."""
        assert self._socket is not None
        try:
            said = self._socket.recv(4096)
        except OSError:
            said = b""
        if said:
            word = json.loads(said)
            if "stop" in word:
                self._stop.ask(word["stop"])
            if "exit" in word:
                self._stop.leave(word["exit"])
            return
        self._stop.unwatch(self._socket.fileno())
        self._socket.close()
        if self._watchdog is not None:
            self._watchdog.wait()
        if self._started < _WATCHDOGS:
            self._spawn()

    def _forget(self) -> None:
        self._pulse = Pulse(bytearray(SIZE))


def begin(rank: int, timeout: float, leave_word: Callable[[str], None]) -> tuple[Stop, Heartbeat]:
    """Hear signals and be watched from here on, which is before torch is imported: that takes seconds.

    `leave_word` tells the other ranks why this one, asked to stop so early, will not meet them.
    """
    if "HALFSTEP_REMOTE" in os.environ and processes.is_orphan(os.getpid()):
        raise Fault(
            "the ssh session that started this rank had ended before it began",
            where=f"rank {rank} on {socket.gethostname()}",
            fix="start the same command again",
        )
    if lost := processes.has_lost_its_launcher(os.getpid()):
        raise Fault(
            f"{lost} had ended before this rank began",
            where=f"rank {rank} on {socket.gethostname()}",
            fix="start the same command again",
        )
    stop = Stop()
    stop.install()

    def last_word() -> None:
        early = "asked to stop before the run had begun"
        exits.say(Stopped(early, where="nothing is lost", fix="start the same command again"))
        leave_word(stop.asked or early)

    stop.set_grace(EARLY_GRACE_SECONDS, last_word)
    heartbeat = Heartbeat(rank, stop)
    heartbeat.set_timeout(timeout)
    heartbeat.start()
    heartbeat.mark("import")
    return stop, heartbeat
