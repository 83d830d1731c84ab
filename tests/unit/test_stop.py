"""A stop is asked for once, heard in time, and its last word is said; each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.rundir.exits import Kind, read_exit, write_exit, write_follow_up
from halfstep.launcher.system import processes
from halfstep.launcher.watchdog import stalls
from halfstep.launcher.watchdog.heartbeat import Heartbeat
from halfstep.launcher.watchdog.shared_page import Beat
from halfstep.launcher.watchdog.stalls import death
from halfstep.launcher.watchdog.stop import Stop

ROOT = Path(__file__).resolve().parents[2]
BEGIN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from halfstep.launcher.watchdog.stop import Stop
stop = Stop()
stop.install()
"""


def run(text: str, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + text, *arguments], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr


def test_the_first_reason_stays() -> None:
    stop = Stop()
    assert (stop.asked, stop.asked_at, stop.deadline) == (None, None, None)
    stop.ask("the STOP file")
    first = stop.asked_at
    stop.ask("another reason")
    assert (stop.asked, stop.asked_at) == ("the STOP file", first)
    stop.set_grace(10, lambda: None)
    assert first is not None
    assert stop.deadline == first + 10


def test_a_signal_is_noted_and_ends_nothing() -> None:
    text = "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); print(stop.asked)"
    assert run(text) == (0, "SIGUSR1\n")


def test_a_library_that_takes_the_handlers_is_undone_by_installing_again() -> None:
    text = """
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.set_wakeup_fd(-1)
stop.install()
os.kill(os.getpid(), signal.SIGTERM)
print(stop.asked)
"""
    assert run(text) == (0, "SIGTERM\n")


def test_a_second_interrupt_counts_even_where_a_library_took_the_pipe() -> None:
    text = """
signal.set_wakeup_fd(-1)
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
time.sleep(20)
"""
    assert run(text) == (130, "")


def test_a_second_interrupt_is_written_down(tmp_path: Path) -> None:
    text = """
stop.attempt = Path(sys.argv[1])
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)
"""
    assert run(text, str(tmp_path)) == (130, "")
    end = read_exit(tmp_path)
    assert end is not None
    assert (end.code, end.cause, end.kind) == (130, "interrupted", Kind.INTERRUPTED)


def test_the_grace_ends_a_process_with_its_last_word_even_if_that_hangs() -> None:
    said = "stop.set_grace(0.2, lambda: print('the end', flush=True)); stop.ask('x'); time.sleep(20)"
    assert run(said) == (75, "the end\n")
    assert run("stop.set_grace(0.2, lambda: time.sleep(60)); stop.ask('x'); time.sleep(20)") == (75, "")


def test_a_grace_that_is_set_after_the_signal_counts_from_the_signal() -> None:
    text = "stop.ask('x'); time.sleep(0.3); stop.set_grace(0.2, lambda: None); time.sleep(20)"
    assert run(text)[0] == 75


def test_a_signal_to_a_forked_worker_is_not_ours() -> None:
    text = """
child = os.fork()
if not child:
    time.sleep(20)
time.sleep(0.1)
os.kill(child, signal.SIGINT)
os.kill(child, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.1)
print(stop.asked)
"""
    code, said = run(text)
    assert (code, said.split()[:1], said.split()[-1]) == (0, ["15"], "None")


def test_marking_progress_costs_less_than_five_microseconds() -> None:
    text = """
from halfstep.launcher.watchdog.heartbeat import Heartbeat
heartbeat = Heartbeat(0, stop)
heartbeat.start()
best = 1e9
for _ in range(20):
    began = time.perf_counter()
    for step in range(1000):
        heartbeat.mark("forward", step)
    best = min(best, time.perf_counter() - began)
heartbeat.end(0)
print(best * 1000)
"""
    code, said = run(text)
    assert code == 0, said
    assert float(said) < 5, "microseconds"


def test_what_is_set_before_the_watchdog_starts_is_kept() -> None:
    stop = Stop()
    heartbeat = Heartbeat(3, stop)
    heartbeat.set_timeout(12.5)
    stop.ask("x")
    stop.set_grace(5, lambda: None)
    assert heartbeat._pulse.get_seconds("timeout") == 12.5
    assert heartbeat._pulse.get_seconds("deadline") > 0
    assert heartbeat._pulse.get("signalled") == 0, "asked from within"


def test_the_first_to_write_how_an_attempt_ended_wins(tmp_path: Path) -> None:
    assert write_exit(tmp_path, 137, "rank 1 was killed", 1) is None
    assert write_exit(tmp_path, 1, "connection closed", 0) == 137
    assert write_follow_up(tmp_path, 1, "connection closed", 0) == 137
    assert [file.name for file in tmp_path.iterdir()] == ["exit.json"]


def test_a_follow_up_failure_waits_for_the_cause_but_not_for_ever(tmp_path: Path) -> None:
    assert write_follow_up(tmp_path, 1, "connection closed", 0, patience=0.1) is None
    end = read_exit(tmp_path)
    assert end is not None
    assert end.cause == "connection closed"


def test_a_death_is_told_by_its_status() -> None:
    beat = Beat(count=9, phase="save", step=20, at=0.0)
    assert death(1, beat, 9, starved=False)[:2] == (
        137,
        "rank 1 was killed by signal 9 (SIGKILL) in phase save of step 20: by hand, by the system, or out of memory",
    )
    assert death(1, beat, 9, starved=True)[1].endswith("step 20: the host is out of memory")
    assert death(1, beat, 128 + 11, starved=False)[:2] == (139, "rank 1 crashed (SIGSEGV) in phase save of step 20")
    assert death(1, beat, 85 << 8, starved=False)[0] == 85
    assert death(1, beat, 0, starved=False)[0] == 1
    assert death(1, beat, None, starved=False)[0] == 1
    assert death(1, beat, 40, starved=False)[0] == 168
    assert death(1, beat, 9, starved=True)[3] is Kind.OUT_OF_HOST_MEMORY
    kinds = [death(1, beat, status, starved=False)[3] for status in (9, 128 + 11, 85 << 8, None)]
    assert kinds == [Kind.SIGNAL, Kind.SIGNAL, Kind.FAILED, Kind.LOST_RANK]


def report(rank: int, count: int, phase: str, state: str = "S") -> stalls.Report:
    beat = Beat(count=count, phase=phase, step=3, at=0.0)
    return stalls.report(rank, 100 + rank, beat, state, 12.0)


def test_who_stalls_the_run_is_the_stopped_one_then_who_lags_then_who_waits_for_nobody() -> None:
    def named(*reports: stalls.Report) -> list[int]:
        return [stall.rank for stall in stalls.culprits(reports)]

    assert named(report(0, 7, "backward"), report(1, 9, "forward", "T")) == [1]
    assert named(report(0, 7, "backward", "T"), report(1, 6, "forward", "T")) == [1]
    assert named(report(0, 9, "backward"), report(1, 7, "backward")) == [1]
    assert named(report(0, 9, "step"), report(1, 9, "data")) == [1]
    both = stalls.culprits([report(0, 9, "backward"), report(1, 9, "backward")])
    assert stalls.cause(both) == "ranks 0, 1 stopped moving in phase backward of step 3 (for 12 s)"
    stalled = stalls.stalled([report(1, 9, "save", "D")], "rank-1.log")
    assert stalled.what.endswith("(for 12 s; process 101 waits for a disk or another device)")
    assert isinstance(stalled, HalfstepError)
    assert stalled.exit_code == 77


def test_a_report_that_is_damaged_is_passed_over(tmp_path: Path) -> None:
    stalls.write(tmp_path, report(0, 9, "step"))
    (tmp_path / "stall-rank-1.json").write_text("{")
    (tmp_path / "stall-rank-2.json").write_text(json.dumps({"rank": 2}))
    assert [stall.rank for stall in stalls.read(tmp_path)] == [0]
    stalls.withdraw(tmp_path, 0)
    assert stalls.read(tmp_path) == []


def test_launchers_are_known_by_their_command_lines() -> None:
    for line, name in {
        "/v/bin/python3 /v/bin/deepspeed --num_gpus 2 train.py": "deepspeed",
        "python -u -m deepspeed.launcher.launch --world_info=x train.py": "launch.py of deepspeed.launcher",
        "python3.11 -X dev -m torch.distributed.run train.py": "run.py of torch.distributed",
        "python -m halfstep run model=x": "halfstep.py",
        "python /v/bin/halfstep run": "halfstep",
    }.items():
        assert processes.launcher_name(line.split()) == (name, True)
    for line in ("python my.py deepspeed", "slurmstepd: [12.0]", "bash", "python -m halfsteps.x", "vim deepspeed"):
        assert not processes.launcher_name(line.split())[1]
    assert processes.launcher_name([]) == ("a process", False)


def test_a_process_is_watched_to_its_end_and_its_status_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]) as child:
        stat = processes.stat(child.pid)
        assert stat is not None
        assert stat.parent == os.getpid()
        watched = processes.Watched(processes.Process(pid=child.pid, start=stat.start, name="x"))
        namesake = processes.Watched(processes.Process(pid=child.pid, start=stat.start + 1, name="x"))
        assert not watched.gone()
        assert namesake.gone(), "the number alone is not the process"
        child.send_signal(signal.SIGKILL)
        while not watched.gone():
            pass
        assert watched.status() == 9
