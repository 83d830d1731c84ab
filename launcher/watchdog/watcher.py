"""A rank's watchdog: a small process that sees the rank, its launcher or another rank fail, and ends what is left.

Started by `watchdog.heartbeat` with one JSON argument. Nothing here may wait for the rank, nor long for a file system.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    above = Path(__file__).resolve().parents
    sys.path.insert(0, next(str(folder) for folder in above if (folder / "halfstep" / "__init__.py").is_file()))

from halfstep.launcher.errors import EXIT_STALLED, EXIT_STOPPED, Fault, Interrupted
from halfstep.launcher.rundir import exits
from halfstep.launcher.system import processes
from halfstep.launcher.watchdog import stalls
from halfstep.launcher.watchdog.shared_page import IGNORED, SIZE, Pulse

POLL = 0.25
FILES_EVERY = 0.5
HEARTBEAT_EVERY = 5.0
LAUNCHER_LIMIT, LAUNCHER_KILL = 7.0, 8.5
"""Seconds from a launcher's death to the order to end, and to the kill: no rank outlives its launcher by ten."""
OTHERS_LIMIT, OTHERS_KILL = 5.0, 7.0
"""The same from another rank's failure: normally the broken connection ends this one before."""
LINGER = 30.0
"""How long a rank that is done may take to leave: process groups have been seen to hang there for hours."""
GAP = 5.0
"""Seconds between two looks that mean this machine, not the rank, was asleep."""


@dataclass(kw_only=True)
class KillOrder:
    """That the rank has to end: with which code, why, and when."""

    code: int
    cause: str | None
    """What to write into exit.json first; None where that has been written."""
    order_at: float
    kill_at: float
    ordered: bool = False


class Watchdog:
    """Watches one rank."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.rank, self.pid = given["rank"], given["pid"]
        self.pulse = Pulse(mmap.mmap(given["memory"], SIZE))
        self.socket = socket.socket(fileno=given["socket"])
        self.socket.setblocking(False)
        self.signals = socket.socket(fileno=given["signals"])
        rank = processes.Process(pid=self.pid, start=given["start"], name=f"rank {self.rank}")
        self.child = processes.Watched(rank, given["pidfd"])
        self.launchers = [
            processes.Watched(processes.Process(pid=pid, start=start, name=name))
            for pid, start, name in given["launchers"]
        ]
        self.poller = select.poll()
        for process in (self.child, *self.launchers):
            if process.fd is not None:
                self.poller.register(process.fd, select.POLLIN)
        self.attempt: Path | None = None
        self.log, self.world_size, self.version = "stderr", 1, 0
        self.kill_order: KillOrder | None = None
        self.launcher_died_at = self.unheard_since = self.looked_at = self.written_at = self.alarm_at = 0.0
        self.made_marker = self.ended = self.reported = False
        self.written: tuple[str, int] | None = None
        self.awake_since = time.monotonic()
        self.memory_kills = processes.out_of_memory_kills()

    def watch(self) -> None:
        """Look until the rank is gone."""
        while True:
            last = time.monotonic()
            self.poller.poll(POLL * 1000)
            now = time.monotonic()
            self.awake_since = now if now - last > GAP else self.awake_since  # asleep, not at work on a slow disk
            self._learn()
            if self.child.gone():
                self._tell_death()
                self._heartbeat(now, at_end=True)
                if not self.reported:
                    self._call_off()
                return
            self._look_at_launchers(now)
            self._look_at_stop(now)
            if now - self.looked_at >= FILES_EVERY:
                self.looked_at = now
                self._look_at_others(now)
                self._look_for_stall(now)
                self._heartbeat(now)
            self._carry_out(now)

    def _learn(self) -> None:
        if self.pulse.get("version") != self.version:
            self.version = self.pulse.get("version")
            about = self.pulse.about()
            self.attempt, self.log, self.world_size = Path(about["attempt"]), about["log"], about["world_size"]

    def _look_at_launchers(self, now: float) -> None:
        for launcher in [launcher for launcher in self.launchers if launcher.gone()]:
            self.launchers.remove(launcher)
            if launcher.fd is not None:
                self.poller.unregister(launcher.fd)
            if not self.launcher_died_at:
                self.launcher_died_at = now
                cause = f"the launcher died: {launcher.process.name}, process {launcher.process.pid}"
                self._send(stop=cause)
                self._order_kill(1, cause, now + LAUNCHER_LIMIT, now + LAUNCHER_KILL)

    def _look_at_stop(self, now: float) -> None:
        """See to it that a stop's limit holds even where the rank's own control thread cannot run."""
        deadline = self.pulse.get_seconds("deadline")
        if deadline and now > deadline + 3:
            cause = f"rank {self.rank} was asked to stop and did not within the time it had"
            self._order_kill(EXIT_STOPPED, cause, now, now + 1.5)
        try:
            unheard = self.signals.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT).count(signal.SIGINT)
        except OSError:
            unheard = 0
        if not unheard or unheard + self.pulse.get("interrupts") < 2:
            self.unheard_since = 0.0
        elif not self.unheard_since:
            self.unheard_since = now
        elif now - self.unheard_since > 1:  # something in C holds Python's lock
            self._order_kill(Interrupted.exit_code, "interrupted", now, now)
        if self.pulse.get("ended") and not self.ended:
            self.ended = True
            self._order_kill(self.pulse.get("code"), None, now + LINGER, now + LINGER + 2)

    def _look_at_others(self, now: float) -> None:
        """End this rank some time after the attempt has ended, and leave it the chance to do so by itself."""
        ending = None if self.attempt is None else _beside(exits.read_exit, self.attempt)
        if ending is None or self.reported:
            return
        self.reported, code = True, ending.code
        if code == EXIT_STALLED:
            self._dump_stacks()
            self._order_kill(code, None, now, now + 1.5)
        elif code == 0:
            self._order_kill(code, None, now + 2 * LINGER, now + 2 * LINGER + 2)
        else:
            self._order_kill(code, None, now + OTHERS_LIMIT, now + OTHERS_KILL)

    def _look_for_stall(self, now: float) -> None:
        if self.reported or self.ended:
            return
        timeout, beat = self.pulse.get_seconds("timeout"), self.pulse.beat()
        quiet = now - max(beat.at, self.awake_since)
        stalled = 0 < timeout <= quiet
        if stalled and self._suspended():
            self.awake_since, stalled = now, False
        if self.attempt is None:
            # Who waits for the others to join gives their watchdogs time to speak first.
            if stalled and quiet > timeout + (3 if beat.phase == "join" else 0):
                self._mark_failed([self._report(quiet)], now)
            return
        marker = self.attempt / stalls.MARKER
        suspected = _beside(marker.exists, otherwise=False)
        if stalled and not suspected:
            self.made_marker = suspected = _beside(lambda: marker.touch() or True, otherwise=True)
        if not suspected or (self.made_marker and not stalled):
            self._call_off()
            return
        self.alarm_at = self.alarm_at or now
        report = self._report(quiet)
        _beside(stalls.write, self.attempt, report)
        if stalled:
            reports = _beside(stalls.read, self.attempt) or [report]
            if len(reports) < self.world_size and time.monotonic() - self.alarm_at < 3:
                return
            named = stalls.culprits(reports)
            # Whom the others wait for may be slow, and moving.
            if all(stall.seconds >= timeout - 2 * FILES_EVERY for stall in named):
                self._mark_failed(named, now)

    def _call_off(self) -> None:
        """Take back what was written on a suspicion: the rank moves, or has ended."""
        if self.attempt is not None and self.alarm_at:
            if self.made_marker:
                _beside((self.attempt / stalls.MARKER).unlink)
            _beside(stalls.withdraw, self.attempt, self.rank)
        self.made_marker, self.alarm_at = False, 0.0

    def _mark_failed(self, named: list[stalls.Report], now: float) -> None:
        where = self.log if self.attempt is None else str(self.attempt / f"rank-{named[0].rank}.log")
        first = None
        if self.attempt is not None:
            # Before the stacks are asked for: that wakes a stopped rank, and the run would continue for a moment.
            first = _beside(exits.write_exit, self.attempt, EXIT_STALLED, stalls.cause(named), named[0].rank)
            if first == 0:
                return
            if self.made_marker:
                _beside((self.attempt / stalls.MARKER).unlink)
        if first is None and (self.attempt is not None or not self.pulse.get("signalled")):
            exits.say(stalls.stalled(named, f"{where} (the stacks of its threads)"))
        self._dump_stacks()
        self.reported = True
        self._order_kill(EXIT_STALLED if first is None else first, None, now, time.monotonic() + 1.5)

    def _report(self, quiet: float) -> stalls.Report:
        own = processes.stat(self.pid)
        return stalls.report(self.rank, self.pid, self.pulse.beat(), own.state if own else "Z", quiet)

    def _suspended(self) -> bool:
        """Tell whether the launcher is stopped as well: then somebody has put the whole launch to sleep."""
        above = processes.stat(self.launchers[0].process.pid) if self.launchers else None
        return above is not None and above.state == "T"

    def _dump_stacks(self) -> None:
        """Have the rank write its threads' stacks into its log; a stopped one writes them where it woke."""
        if self.pulse.get("stacks"):
            self._signal(signal.SIGQUIT)
            self._signal(signal.SIGCONT)
            if self.child.fd is not None:
                select.select([self.child.fd], [], [], 0.5)

    def _order_kill(self, code: int, cause: str | None, order_at: float, kill_at: float) -> None:
        """Let the rank end at a time, unless that has been settled for an earlier one."""
        if self.kill_order is None or kill_at < self.kill_order.kill_at:
            self.kill_order = KillOrder(code=code, cause=cause, order_at=order_at, kill_at=kill_at)

    def _carry_out(self, now: float) -> None:
        order = self.kill_order
        if order is None or now < order.order_at:
            return
        if not order.ordered:
            signalled, deadline = self.pulse.get_seconds("signalled"), self.pulse.get_seconds("deadline")
            if self.launcher_died_at and 0 < signalled < self.launcher_died_at + 2 and deadline > now:
                # A batch system has told everybody to stop: the launcher went at once, the rank has its grace.
                self.kill_order = None
                return
            if self.launcher_died_at and 0 < signalled < self.launcher_died_at + 2 and order.code == 1:
                order.code, order.cause = EXIT_STOPPED, "asked to stop; the launcher left before all was saved"
            order.ordered = True
            if order.cause is not None and self.attempt is not None:
                before = _beside(exits.write_exit, self.attempt, order.code, order.cause, self.rank)
                order.code = order.code if before is None else before
                if before is None and order.code != Interrupted.exit_code:
                    exits.say(Fault(order.cause, where=self.log, fix="start the same command again"))
            self._send(exit=order.code)
        if now >= order.kill_at:
            self._signal(signal.SIGKILL)

    def _tell_death(self) -> None:
        """Write down how a rank ended that did not say so itself."""
        if self.attempt is None or self.pulse.get("ended"):
            return
        starved = processes.out_of_memory_kills() > self.memory_kills
        code, cause, fix, kind = stalls.death(self.rank, self.pulse.beat(), self.child.status(), starved=starved)
        if _beside(exits.write_exit, self.attempt, code, cause, self.rank, kind) is None:
            exits.say(Fault(cause, where=self.log, fix=fix))

    def _heartbeat(self, now: float, *, at_end: bool = False) -> None:
        """Write now and then for people where the rank is."""
        beat = self.pulse.beat()
        if (
            self.attempt is None
            or self.written == (beat.phase, beat.step)
            or (now - self.written_at < HEARTBEAT_EVERY and not at_end)
        ):
            return
        self.written, self.written_at = (beat.phase, beat.step), now
        self.memory_kills = processes.out_of_memory_kills() if not at_end else self.memory_kills
        text = {"rank": self.rank, "host": os.uname().nodename, "pid": self.pid, "phase": beat.phase,
                "step": beat.step, "time": time.time()}  # fmt: skip
        _beside(stalls.replace_json, self.attempt / f"rank-{self.rank}.heartbeat", text)

    def _send(self, **word: object) -> None:
        with contextlib.suppress(OSError):  # where it does not read, the kill does not ask
            self.socket.send(json.dumps(word).encode())

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.child.fd is not None:
                signal.pidfd_send_signal(self.child.fd, number)
            elif not self.child.gone():
                os.kill(self.pid, number)


def main(argument: str) -> None:
    """Watch the rank that started this process."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    Watchdog(json.loads(argument)).watch()
    os._exit(0)  # a thread may still wait for a file system


def _beside(call: Callable[..., Any], *arguments: Any, otherwise: Any = None) -> Any:
    """Call something that touches files in a thread, and continue without it when the file system hangs or refuses."""
    result = [otherwise]

    def run() -> None:
        try:
            result[0] = call(*arguments)
        except OSError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2.0)
    return result[0]


if __name__ == "__main__":
    main(sys.argv[1])
