"""Asked to stop, in every phase of a run: one checkpoint at one step on all ranks, exit code 75; then it resumes."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from faults.rig import Launch

pytestmark = pytest.mark.faults
CELL = ("zero=2", "precision=fp16")


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, (0, 1)),
        (signal.SIGTERM, (0,)),
        (signal.SIGUSR1, (1,)),
        (signal.SIGUSR2, (0, 1)),
        (signal.SIGINT, (0, 1)),
    ],
    ids=str,
)
def test_a_signal_in_mid_run(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    number: signal.Signals,
    ranks: tuple[int, ...],
    record: Callable[..., None],
) -> None:
    launched = launch(f"{number.name}-{len(ranks)}-{ranks[0]}", *CELL)
    launched.until_step(13)
    asked = time.monotonic()
    launched.kill(number, ranks)
    assert launched.wait(timeout=40) == [75, 75], launched.output
    took = time.monotonic() - asked
    assert rig.steps_saved(launched.out)[-1] == rig.last_step(launched.out)
    assert number.name in rig.exit_of(launched.out)["cause"]
    assert launch(launched.out, *CELL).wait() == [0, 0]
    rig.assert_same(launched.out, undisturbed(*CELL))
    assert rig.redone(launched.out) == 0
    record(f"{number.name} to {'both ranks' if len(ranks) == 2 else f'rank {ranks[0]}'}", injected=1, survived=1,
           worst_redone=0, detect=[took])  # fmt: skip


def test_the_file_stop(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], record: Callable[..., None]
) -> None:
    launched = launch("stop-file", *CELL)
    launched.until_step(13)
    (launched.out / "STOP").touch()
    assert launched.wait(timeout=40) == [75, 75], launched.output
    assert not (launched.out / "STOP").exists(), "it has been done"
    assert "stopped: the file STOP after step" in launched.output
    assert launch(launched.out, *CELL).wait() == [0, 0]
    rig.assert_same(launched.out, undisturbed(*CELL))
    record("the file STOP", injected=1, survived=1, worst_redone=0)


PHASES = {
    # where rank 1 sleeps for five seconds, and how far the run is then
    "importing": ("import:1:0:sleep=5", lambda out: True),
    "compiling": ("jit:1:0:sleep=5", lambda out: True),
    "building": ("init:1:0:sleep=5", lambda out: (out / "attempts/0002").exists()),
    "loading": ("load:1:20:sleep=5", lambda out: len(rig.events(out, "built")) == 2),
    "evaluating": ("eval:1:40:sleep=5", lambda out: rig.last_step(out) >= 40),
    "saving": ("save.shard:1:30:sleep=5", lambda out: rig.last_step(out) >= 30),
    "syncing a save": ("save.sync:1:30:sleep=5", lambda out: rig.last_step(out) >= 30),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_while(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], phase: str, record: Callable[..., None]
) -> None:
    fault, reached = PHASES[phase]
    launched = launch(f"while-{phase}", *CELL, HALFSTEP_FAULT="step:*:25:kill9")
    assert launched.wait() == [-9, -9]
    again = launch(launched.out, *CELL, HALFSTEP_FAULT=fault)
    if phase in ("importing", "compiling"):
        time.sleep(3)
    else:
        again.until(lambda: reached(launched.out))
    time.sleep(0.5)
    again.kill(signal.SIGTERM, ranks=(1,))
    with rig.nothing_left(launched.out):
        assert again.wait(timeout=60) == [75, 75], again.output
    assert "Traceback" not in again.output
    last = launch(launched.out, *CELL)
    assert last.wait() == [0, 0], last.output
    rig.assert_same(launched.out, undisturbed(*CELL))
    record(f"SIGTERM while {phase}", injected=1, survived=1, worst_redone=rig.redone(launched.out))


def test_a_second_interrupt_quits_at_once(launch: Callable[..., Launch]) -> None:
    launched = launch("interrupts", *CELL, HALFSTEP_FAULT="save.shard:*:20:sleep=30")
    launched.until(lambda: list((launched.out / "checkpoints").glob(".writing-step-00000020*")))
    launched.kill(signal.SIGINT)
    time.sleep(0.5)
    launched.kill(signal.SIGTERM)  # which launch.py sends after Ctrl-C: not the second
    time.sleep(1)
    assert all(rank.poll() is None for rank in launched.ranks), launched.output
    launched.kill(signal.SIGINT)
    assert set(launched.wait(timeout=10)) == {130}, launched.output
    assert rig.exit_of(launched.out)["code"] == 130
    assert rig.steps_saved(launched.out) == [10]


def test_when_the_grace_is_over_the_last_good_checkpoint_stands(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], record: Callable[..., None]
) -> None:
    launched = launch("grace", *CELL, "checkpoint.grace=3", HALFSTEP_FAULT="save.shard:1:20:sleep=60")
    launched.until(lambda: list((launched.out / "checkpoints").glob(".writing-step-00000020*")))
    asked = time.monotonic()
    launched.kill(signal.SIGTERM)
    assert 75 in launched.wait(timeout=30), launched.output
    took = time.monotonic() - asked
    assert "the time to stop in was over before the state was saved" in launched.output
    assert "the last good checkpoint: step-00000010" in launched.output
    assert rig.exit_of(launched.out)["code"] == 75
    assert launch(launched.out, *CELL).wait() == [0, 0]
    rig.assert_same(launched.out, undisturbed(*CELL))
    record("a save longer than checkpoint.grace=3", injected=1, survived=1, detect=[took])


@pytest.mark.parametrize(
    ("action", "code", "cause"),
    [
        ("exit=85", 85, "rank 1 ended with exit code 85 in phase forward of step 15 without saying why"),
        ("exit=0", 1, "rank 1 ended with exit code 0 in phase forward of step 15 without saying why"),
        ("segv", 139, "rank 1 crashed (SIGSEGV) in phase forward of step 15"),
        ("raise", 1, "RuntimeError: HALFSTEP_FAULT at fwd"),
    ],
)
def test_a_rank_that_ends_ends_the_others_and_the_first_cause_is_named(
    launch: Callable[..., Launch], action: str, code: int, cause: str, record: Callable[..., None]
) -> None:
    launched = launch(f"rank-{action}", *CELL, HALFSTEP_FAULT=f"fwd:1:15:{action}")
    launched.ranks[1].wait(timeout=90)
    died = time.monotonic()
    with rig.nothing_left(launched.out):
        codes = launched.wait(timeout=20)
    gone = time.monotonic() - died
    assert gone < 10, "the promise"
    ending = rig.exit_of(launched.out)
    assert (ending["code"], ending["cause"]) == (code, cause), (codes, ending)
    assert codes[0] == code, "whoever follows passes the first one's code on"
    assert launched.output.count("error:") == 1, launched.output
    record(f"rank ends with {action}", injected=1, survived=1, detect=[gone])


def test_halfstep_run_stops_at_ctrl_c_and_resumes(
    scratch: Path, data: Path, undisturbed: Callable[..., Path], record: Callable[..., None]
) -> None:
    out = scratch / "faults" / "ctrl-c"
    arguments = ["run", *rig.WORDS, "steps=400", "eval.every=0", *CELL, f"data={data}"]
    launched = rig.start_by("halfstep", arguments, out, scratch)
    rig.wait_for(lambda: rig.last_step(out) >= 13)
    launched.send_signal(signal.SIGINT)
    with rig.nothing_left(out):
        assert launched.wait(timeout=40) == 75
    said = rig.log_of(out, scratch)
    assert "Traceback" not in said
    assert "stopping" in said
    assert rig.steps_saved(out)[-1] == rig.last_step(out)
    assert rig.start_by("halfstep", arguments, out, scratch).wait(timeout=120) == 0
    rig.assert_same(out, undisturbed(*CELL, "steps=400", "eval.every=0"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["attempts"] == 2
    record("Ctrl-C under halfstep run", injected=1, survived=1, worst_redone=rig.redone(out))
