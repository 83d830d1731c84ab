"""Start a run on this host, wait for it and all its processes, and pass on how it ended."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from halfstep.launcher.errors import Fault, Interrupted
from halfstep.launcher.rundir import layout
from halfstep.launcher.rundir.exits import EXIT_TIMED_OUT, read_exit, write_exit
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.rundir.trust import CONSENT_VARIABLE, SECRET_VARIABLE
from halfstep.launcher.submit.hostfile import write_environment
from halfstep.launcher.system.machine import usable_cores
from halfstep.launcher.system.processes import LAUNCHER, marked, this_process
from halfstep.launcher.topology import prefer_cpu
from halfstep.launcher.watchdog import reaper as reaper_page

MARK = "HALFSTEP_LAUNCH"
"""The variable that names a launch: whatever it starts bears it, wherever it moves."""
SET_HERE = ("DS_ACCELERATOR", "OMP_NUM_THREADS", MARK, SECRET_VARIABLE, LAUNCHER, CONSENT_VARIABLE)
"""The variables that a launch sets for its ranks, on whatever host."""
STOP_FILE = "STOP"
"""In the run directory: the ranks look for it at step boundaries, save and end with 75."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_LEAVING_SECONDS = 15.0
"""How long what the launcher leaves behind may take to end; the ranks' watchdogs need ten at most."""


def start(
    argv: list[str],
    run: Path,
    ranks: int,
    remote: Path | None = None,
    *,
    launch: str,
    trusted: bool = False,
    log: Path | None = None,
    limit: float = 0.0,
) -> int:
    """Run a starter's command and return the run's exit code.

    `remote` is where ranks on other hosts look for their environment; it is written now and removed at the end.
    `launch` is the name that the run directory is reserved for, `trusted` whether that is taken as it is. `log` gets
    what the launch prints, instead of the screen. After `limit` seconds the run is ended (0 = never).

    The starter gets a session of its own, so that Ctrl-C reaches only this process, which asks the ranks to stop at
    their next step; a second one ends them at once. torchrun and accelerate turn every failure into 1, so the code
    that the run itself wrote down comes first.
    """
    before = layout.attempts(run)
    # torchrun takes options of its own from PET_*: those of a shell inside another launch are not this one's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    prefer_cpu(environment)
    # torchrun would set one thread a rank, whatever the machine has.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    environment[MARK] = launch  # torchrun gives each rank its own session, but leaves it this
    environment.setdefault(CONSENT_VARIABLE, "")
    if trusted:
        environment[CONSENT_VARIABLE] = str(run)
    environment[SECRET_VARIABLE] = secrets.token_hex(32)
    environment[LAUNCHER] = this_process()
    reaper = None
    if remote is not None:
        write_environment(remote, environment)
        command = [sys.executable, "-S", "-P", reaper_page.__file__, str(os.getpid()), f"{MARK}={launch}"]
        reaper = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    stop, end = run / STOP_FILE, time.monotonic() + limit
    with _output(log) as out, _heard() as signals, subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
    ) as process:  # fmt: skip
        asked = ours = False
        try:
            while process.poll() is None:
                if signals.count(signal.SIGINT) >= 2:
                    _end(f"{MARK}={launch}", _newest(run, before))
                    process.wait()
                    print("interrupted", file=sys.stderr, flush=True)
                    return Interrupted.exit_code
                if limit and time.monotonic() > end:
                    cause = f"it took longer than the {limit:g} s it was given"
                    _end(f"{MARK}={launch}", _newest(run, before), EXIT_TIMED_OUT, cause)
                    process.wait()
                    return EXIT_TIMED_OUT
                if signals and not asked:
                    asked, ours = True, _ask(stop, signals[0])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            status = _status(process.wait())
            _wait_for_the_rest(f"{MARK}={launch}", signals)
        finally:
            if ours:
                stop.unlink(missing_ok=True)
            if remote is not None:
                remote.unlink(missing_ok=True)
            if reaper is not None:
                reaper.kill()
                reaper.wait()
    return _verdict(run, _newest(run, before), status)


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[IO[bytes] | None]:
    """Open the log that the launch's words are added to, or leave them to the screen."""
    if log is None:
        yield None
        return
    with log.open("ab") as file:
        yield file


@contextlib.contextmanager
def _heard() -> Iterator[list[int]]:
    """Collect signals instead of being ended by them."""
    heard: list[int] = []
    try:
        former = {number: signal.signal(number, lambda caught, _: heard.append(caught)) for number in _SIGNALS}
    except ValueError:  # not the main thread: whoever started this hears the signals
        former = {}
    try:
        yield heard
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _ask(stop: Path, number: int) -> bool:
    """Ask the ranks to stop, and tell whether it was this process that did."""
    try:
        with stop.open("x") as file:
            file.write(f"{signal.Signals(number).name} to halfstep run, process {os.getpid()}\n")
    except FileExistsError:
        return False
    except OSError as error:
        print(f"cannot ask the ranks to stop: {error}; Ctrl-C again quits at once", file=sys.stderr, flush=True)
        return False
    print("stopping: the ranks save and end; Ctrl-C again quits at once", file=sys.stderr, flush=True)
    return True


def _end(mark: str, attempt: Path | None, code: int = Interrupted.exit_code, cause: str = "interrupted") -> None:
    """Kill everything of this launch, having said why, so that nobody reports the killing as the cause."""
    if attempt is not None:
        write_exit(attempt, code, cause, 0)
    end = time.monotonic() + _LEAVING_SECONDS
    while (left := marked(mark)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _wait_for_the_rest(mark: str, signals: list[int]) -> None:
    """Wait until no process of this launch is left: a launcher that is killed goes before its ranks."""
    end = time.monotonic() + _LEAVING_SECONDS
    while marked(mark):
        if time.monotonic() > end or signals.count(signal.SIGINT) >= 2:
            _end(mark, None)
            return
        time.sleep(0.1)


def _verdict(run: Path, attempt: Path | None, status: int) -> int:
    """Return the code the run wrote down; where it wrote none, the launcher's own, but 0 only for a finished run."""
    end = None if attempt is None else read_exit(attempt)
    if end is not None:
        return end.code
    if status == 0 and (attempt is not None or Run(run).finished is None):
        # The deepspeed command ends with 0 when what it started is killed (T22).
        what = "the launcher ended, and no rank wrote how the run did"
        print(Fault(what, where=str(attempt or run), fix="start the same command again"), file=sys.stderr, flush=True)
        return 1
    return status


def _status(status: int) -> int:
    """Return an exit status as a shell has it: 128 + signal, also where DeepSpeed passes on -9, which is 247 (T22)."""
    if status < 0:
        return 128 - status
    return 128 + 256 - status if 256 - signal.NSIG < status < 255 else status


def _newest(run: Path, before: Sequence[Path]) -> Path | None:
    return next((attempt for attempt in reversed(layout.attempts(run)) if attempt not in before), None)
