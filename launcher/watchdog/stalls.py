"""Who stopped moving: every rank's watchdog writes down where its rank stands, and one rule names the culprit."""

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import Stalled
from halfstep.launcher.rundir.exits import Kind
from halfstep.launcher.system import files, foreign
from halfstep.launcher.watchdog.shared_page import ALONE, Beat

MARKER = "stalling"
"""In the attempt's folder while a rank is suspected: every watchdog then reports."""
_STATES = {
    "T": "is stopped by a signal",
    "t": "is held by a debugger",
    "D": "waits for a disk or another device",
    "R": "is computing",
    "Z": "has ended",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where one rank stood."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    count: int
    """Marks so far."""
    process_state: str
    """As /proc/PID/status has it."""
    seconds: float
    """Since the last mark."""


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("rank", "pid", "step", "count"), int),
    **dict.fromkeys(("host", "phase", "process_state"), str),
    "seconds": (int, float),
}


def report(rank: int, pid: int, beat: Beat, process_state: str, seconds: float) -> Report:
    """Return where a rank of this host stands."""
    return Report(
        rank=rank,
        host=os.uname().nodename,
        pid=pid,
        phase=beat.phase,
        step=beat.step,
        count=beat.count,
        process_state=process_state,
        seconds=round(seconds, 1),
    )


def write(attempt: Path, own: Report) -> None:
    """Write or renew a rank's report."""
    replace_json(attempt / f"stall-rank-{own.rank}.json", asdict(own))


def withdraw(attempt: Path, rank: int) -> None:
    """Remove a rank's report: it, or the rank it waited for, moves again."""
    (attempt / f"stall-rank-{rank}.json").unlink(missing_ok=True)


def read(attempt: Path) -> list[Report]:
    """Return the reports that can be read, by rank."""
    reports = []
    for file in attempt.glob("stall-rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            said = foreign.read_object(file)
            if all(isinstance(said.get(name), kind) for name, kind in _KINDS.items()):
                reports.append(Report(**{name: said[name] for name in _KINDS}))
    return sorted(reports, key=lambda stall: stall.rank)


def culprits(reports: Sequence[Report]) -> list[Report]:
    """Return who holds up the others: the one stopped rank, else who lags, else who waits for nobody, else all."""
    stopped = [stall for stall in reports if stall.process_state in ("T", "t")]
    if len(stopped) == 1:
        return stopped
    least = min((stall.count for stall in reports), default=0)
    lagging = [stall for stall in reports if stall.count == least]
    return [stall for stall in lagging if stall.phase in ALONE] or lagging


def cause(named: Sequence[Report]) -> str:
    """Return one sentence on the ranks that stopped moving."""
    first = named[0]
    who = f"rank {first.rank}" if len(named) == 1 else f"ranks {', '.join(str(stall.rank) for stall in named)}"
    step = f" of step {first.step}" if first.step else ""
    doing = f"; process {first.pid} {_STATES[first.process_state]}" if first.process_state in _STATES else ""
    return f"{who} stopped moving in phase {first.phase}{step} (for {first.seconds:.0f} s{doing})"


def stalled(named: Sequence[Report], where: str) -> Stalled:
    """Return what to say about it."""
    again = "start the same command again"
    fixes = {
        "T": f"find who stopped it (a scheduler, a debugger, Ctrl-Z), then {again}",
        "t": f"take the debugger away, then {again}",
        "D": f"look after the file system or device it waits for, then {again}",
    }
    fix = fixes.get(named[0].process_state, f"read the stacks there; {again}, with a longer watch.timeout if it works")
    return Stalled(cause(named), where=where, fix=fix)


def replace_json(file: Path, value: object) -> None:
    """Replace a small file whole; not synced to the disk, since it tells of the present."""
    files.write_atomic(file, json.dumps(value) + "\n", sync=False)


def death(rank: int, beat: Beat, status: int | None, *, starved: bool) -> tuple[int, str, str, Kind]:
    """Return the exit code, the cause, the remedy and the kind of the end of a rank that is gone and did not say why.

    `status` is as waitpid has it, None where nobody could see it; `starved` is whether the kernel has just killed for
    want of memory.
    """
    where = f"in phase {beat.phase}" + (f" of step {beat.step}" if beat.step else "")
    fix = "start the same command again"
    if status is None:
        return 1, f"rank {rank} was gone {where}, and nobody saw how", fix, Kind.LOST_RANK
    number = status & 0x7F
    if not number:
        code = (status >> 8) & 0xFF
        return code or 1, f"rank {rank} ended with exit code {code} {where} without saying why", fix, Kind.FAILED
    name = signal.Signals(number).name if number in list(signal.Signals) else "of real time"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        return 128 + number, f"rank {rank} crashed ({name}) {where}", fix, Kind.SIGNAL
    cause = f"rank {rank} was killed by signal {number} ({name}) {where}"
    if number == signal.SIGKILL and starved:
        fix = "take a smaller batch.micro, or more memory"
        return 128 + number, f"{cause}: the host is out of memory", fix, Kind.OUT_OF_HOST_MEMORY
    cause += ": by hand, by the system, or out of memory" if number == signal.SIGKILL else ""
    return 128 + number, cause, fix, Kind.SIGNAL
