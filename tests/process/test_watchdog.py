"""Ranks that are killed, stopped or told to stop: real processes, Heartbeats and watchdogs, without DeepSpeed."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from process.small_ranks import Launch

from halfstep.launcher.system import processes

pytestmark = pytest.mark.process
Start = Callable[..., Launch]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Start]:
    started: list[Launch] = []

    def start(world: int, timeout: float = 60.0, *deeds: str) -> Launch:
        started.append(Launch(tmp_path, world, timeout, *deeds))
        return started[-1]

    yield start
    for launch in started:
        for pid in [*processes.marked(launch.mark)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launch.process.kill()
        launch.process.wait()
        if launch.process.stdout:
            launch.process.stdout.close()
        launch.errors.close()


def test_a_clean_end_is_reported_by_nobody(launch: Start) -> None:
    run = launch(2, 60.0, "steps=20")
    run.until_gone()
    assert run.exit is None
    assert run.said == ""
    assert json.loads((run.where / "rank-1.heartbeat").read_text())["phase"] == "exit"


@pytest.mark.parametrize(
    ("deed", "code", "cause"),
    [
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by signal 9 (SIGKILL) in phase forward of step 5: "),
        ("os.kill(os.getpid(), 11)", 139, "rank 1 crashed (SIGSEGV) in phase forward of step 5"),
        ("os._exit(85)", 85, "rank 1 ended with exit code 85 in phase forward of step 5 without saying why"),
        ("os._exit(0)", 1, "rank 1 ended with exit code 0 in phase forward of step 5 without saying why"),
        ("raise SystemError", 1, "rank 1 ended with exit code 1 in phase forward of step 5 without saying why"),
    ],
)
def test_the_death_of_one_rank_is_named_and_ends_the_other(launch: Start, deed: str, code: int, cause: str) -> None:
    run = launch(2, 60.0, f"at1-5={deed}")
    run.until_step(4)
    assert run.until_gone() < 10
    assert run.exit is not None
    assert run.exit["code"] == code
    assert run.exit["cause"].startswith(cause)
    assert run.said.count("error: rank 1") == 1


def test_no_rank_outlives_its_launcher_by_ten_seconds(launch: Start) -> None:
    run = launch(2, 60.0, "deaf=1")
    run.until_step(3)
    run.process.kill()
    run.process.wait()
    assert run.until_gone() < 10
    assert run.exit is not None
    assert run.exit["code"] == 1
    assert run.exit["cause"] == f"the launcher died: deepspeed, process {run.process.pid}"
    assert run.said.count("error:") == 1


def test_ranks_whose_launcher_died_save_first_if_they_can(launch: Start) -> None:
    run = launch(2)
    run.until_step(3)
    run.process.kill()
    run.process.wait()
    assert run.until_gone() < 5
    assert f"the launcher died: deepspeed, process {run.process.pid}" in [
        (run.where / f"asked-{rank}").read_text() for rank in range(2)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_a_stopped_rank_is_named_with_its_stacks(launch: Start, world: int) -> None:
    run = launch(world, 2.0)
    run.until_step(5)
    last = run.pids[-1]
    os.kill(last, signal.SIGSTOP)
    assert run.wait(lambda: run.exit) < 5
    assert run.until_gone() < 5
    assert run.exit is not None
    assert run.exit["code"] == 77
    assert f"rank {world - 1} stopped moving in phase " in run.exit["cause"]
    assert f"process {last} is stopped by a signal)" in run.exit["cause"]
    assert "rank.py" in (run.where / f"rank-{world - 1}.log").read_text()
    assert run.said.count("error:") == 1
    report = json.loads((run.where / f"stall-rank-{world - 1}.json").read_text())
    assert report["process_state"] == "T"


def test_of_two_ranks_that_wait_the_one_that_lags_is_named(launch: Start) -> None:
    run = launch(2, 2.0, "at0-7=time.sleep(60)")
    run.wait(lambda: run.exit, 15)
    run.until_gone(5)
    assert run.exit is not None
    assert run.exit["cause"].startswith("rank 0 stopped moving in phase forward of step 7 (for ")
    assert all("Current thread" in (run.where / f"rank-{rank}.log").read_text() for rank in range(2))


def test_waiting_for_a_slow_rank_that_moves_is_no_stall(launch: Start) -> None:
    slow = "[(time.sleep(0.3), heartbeat.touch()) for _ in range(12)]"
    run = launch(2, 2.0, f"at0-7={slow}", "steps=10")
    run.until_gone(20)
    assert run.exit is None
    assert run.said == ""
    assert not list(run.where.glob("stall*"))


def test_a_stall_before_the_attempt_is_known_ends_the_rank(launch: Start) -> None:
    run = launch(1, 1.0, "early=1")
    assert run.until_gone() < 8
    assert run.said.startswith("error: rank 0 stopped moving in phase start (for 1 s")
    assert run.process.stdout is not None
    assert run.process.stdout.readline().strip() == "77"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_asks_for_a_stop(launch: Start, number: signal.Signals) -> None:
    run = launch(1)
    run.until_step(2)
    os.kill(run.pids[0], number)
    run.until_gone()
    assert (run.where / "asked-0").read_text() == number.name
    assert run.exit is None


@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(60)",
        "os.read(os.pipe()[0], 1)",
        "sum(range(10**11))",  # holds Python's lock, so that only the watchdog can act
    ],
)
def test_a_second_interrupt_quits_whatever_the_rank_does(launch: Start, busy: str) -> None:
    run = launch(1, 60.0, f"at0-3={busy}")
    run.until_step(2)
    time.sleep(0.2)
    os.kill(run.pids[0], signal.SIGINT)
    os.kill(run.pids[0], signal.SIGTERM)  # as launch.py does after Ctrl-C
    os.kill(run.pids[0], signal.SIGTERM)
    time.sleep(0.5)
    assert processes.is_alive(run.pids[0])
    os.kill(run.pids[0], signal.SIGINT)
    assert run.until_gone() < 5
    assert run.exit is not None
    assert (run.exit["code"], run.exit["cause"]) == (130, "interrupted")


def test_a_rank_that_does_not_stop_is_ended_after_its_grace(launch: Start) -> None:
    run = launch(1, 60.0, "grace=1", "at0-3=time.sleep(60)")
    run.until_step(2)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.until_gone() < 5
    assert (run.where / "expired-0").exists()
    assert run.exit is None, "what the rank was given to say is said"
    assert run.process.stdout is not None
    assert run.process.stdout.readline().strip() == "75"


def test_a_rank_that_nobody_can_tell_to_stop_is_killed_after_its_grace(launch: Start) -> None:
    run = launch(1, 60.0, "grace=1", "at0-3=(os.kill(os.getpid(), 15), sum(range(10**11)))")
    run.until_step(2)
    assert run.until_gone() < 10
    assert run.exit is not None
    assert run.exit["code"] == 75


def test_a_killed_watchdog_is_replaced(launch: Start) -> None:
    run = launch(1)
    run.until_step(2)
    (first,) = _watchdogs(run)
    os.kill(first, signal.SIGTERM)
    os.kill(first, signal.SIGKILL)
    run.wait(lambda: _watchdogs(run) not in ([], [first]))
    time.sleep(0.2)
    os.kill(run.pids[0], signal.SIGKILL)
    run.wait(lambda: run.exit)
    assert run.exit is not None
    assert run.exit["code"] == 137


def test_another_attempts_end_lets_a_stopped_rank_go(launch: Start) -> None:
    run = launch(2)
    run.until_step(2)
    os.kill(run.pids[0], signal.SIGSTOP)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.until_gone() < 10
    assert run.exit is not None
    assert run.exit["rank"] == 1


def _watchdogs(run: Launch) -> list[int]:
    return [pid for pid in processes.marked(run.mark) if pid not in (run.process.pid, *run.pids)]
