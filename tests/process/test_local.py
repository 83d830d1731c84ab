"""`halfstep run` hears signals for its ranks, outlives them all, and passes on how the run ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from process.small_ranks import LAUNCHER, RANK, ROOT

from halfstep.launcher.system import processes

pytestmark = pytest.mark.process
STARTER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from halfstep.launcher.submit import local
sys.exit(local.start(sys.argv[2:], Path(sys.argv[1]), 2, launch="of this test"))
"""


class Run:
    """One local.start in a process of its own."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.run, self.mark = folder / "run", f"HALFSTEP_TEST={folder}"
        (folder / "rank.py").write_text(RANK.format(root=str(ROOT)))
        (folder / "deepspeed").write_text(LAUNCHER)
        self.errors = folder / "stderr"
        (folder / "halfstep").write_text(STARTER)
        arguments = [sys.executable, str(folder / "halfstep"), str(self.run), *command]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                arguments, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "HALFSTEP_TEST": str(folder)}
            )

    def until_step(self, step: int) -> None:
        end = time.monotonic() + 20
        while not (self.run / f"attempts/0001/meet-{step}-1").exists():
            assert time.monotonic() < end, self.errors.read_text()
            time.sleep(0.02)

    @property
    def left(self) -> list[int]:
        return processes.marked(self.mark)

    @property
    def launcher(self) -> int:
        """The process that started the ranks."""
        arguments = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in self.left}
        (launcher,) = [pid for pid, line in arguments.items() if line[1].endswith("/deepspeed")]
        return launcher


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Run] = []

    def begin(*deeds: str) -> Run:
        (tmp_path / "run").mkdir()
        ranks = [str(tmp_path / "deepspeed"), str(tmp_path / "rank.py"), str(tmp_path / "run/attempts/0001")]
        started.append(Run(tmp_path, sys.executable, *ranks, "2", "60", "says=1", *deeds))
        started[-1].until_step(2)
        return started[-1]

    yield begin
    for launch in started:
        for pid in launch.left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launch.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_the_ranks_save_and_end(start: Start, number: signal.Signals) -> None:
    run = start()
    run.process.send_signal(number)
    assert run.process.wait(10) == 75
    assert run.errors.read_text() == "stopping: the ranks save and end; Ctrl-C again quits at once\n"
    assert not run.left
    assert not (run.run / "STOP").exists()


def test_a_second_interrupt_kills_everything_at_once(start: Start) -> None:
    run = start("deaf=1")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(5) == 130
    assert not run.left
    assert json.loads((run.run / "attempts/0001/exit.json").read_text())["code"] == 130
    assert run.errors.read_text().endswith("at once\ninterrupted\n")
    assert not (run.run / "STOP").exists()


def test_a_stop_file_of_somebody_else_is_left_alone(start: Start) -> None:
    run = start("deaf=1")
    (run.run / "STOP").touch()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(5) == 130
    assert (run.run / "STOP").exists()


def test_it_returns_only_when_the_ranks_of_a_killed_launcher_are_gone(start: Start) -> None:
    run = start("deaf=1")
    os.kill(run.launcher, signal.SIGKILL)
    assert run.process.wait(10) == 1
    assert not run.left
    assert run.errors.read_text().count("error: the launcher died: deepspeed") == 1


def test_ranks_end_when_halfstep_run_itself_is_killed(start: Start) -> None:
    run = start("deaf=1")
    run.process.kill()
    end = time.monotonic() + 15
    while run.left and time.monotonic() < end:
        time.sleep(0.1)
    assert not run.left


def test_a_killed_rank_decides_the_code(start: Start) -> None:
    run = start("at1-9=os.kill(os.getpid(), 9)")
    assert run.process.wait(10) == 137
    assert not run.left


@pytest.mark.parametrize(
    ("deed", "code", "said"),
    [
        ("os._exit(0)", 1, "error: the launcher ended, and no rank wrote how the run did"),
        ("os._exit(3)", 3, ""),
        ("os._exit(247)", 137, ""),
        ("os.kill(os.getpid(), 11)", 139, ""),
        ("os._exit(255)", 255, ""),
    ],
)
def test_a_launcher_that_ends_before_the_run_has_begun(tmp_path: Path, deed: str, code: int, said: str) -> None:
    run = Run(tmp_path, sys.executable, "-c", f"import os; {deed}")
    assert run.process.wait(10) == code
    assert run.errors.read_text().startswith(said)
    assert bool(run.errors.read_text()) == bool(said)


def test_a_launcher_that_finds_the_run_finished_is_believed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"status": "done"}')
    assert Run(tmp_path, "true").process.wait(10) == 0
