"""A rank that stands still or is slow: noticed, named with its phase and step, and ended."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from faults.rig import Launch
from ranks import environment

pytestmark = pytest.mark.faults
WATCHED = ("watch.timeout=4", "watch.startup=60")


@pytest.mark.parametrize("cell", [("zero=0", "precision=bf16"), ("zero=3", "precision=fp16")], ids=" ".join)
def test_a_stopped_rank(launch: Callable[..., Launch], cell: tuple[str, ...], record: Callable[..., None]) -> None:
    launched = launch(f"stopped-{cell[0]}", *cell, *WATCHED, "steps=400")
    launched.until_step(12)
    launched.kill(signal.SIGSTOP, ranks=(1,))
    stopped = time.monotonic()
    with rig.nothing_left(launched.out):
        codes = launched.wait(timeout=40)
    took = time.monotonic() - stopped
    assert 77 in codes, (codes, launched.output)
    cause = rig.exit_of(launched.out)
    assert cause["code"] == 77
    assert cause["cause"].startswith("rank 1 stopped moving in phase "), cause
    assert "of step 1" in cause["cause"]
    assert launched.output.count("error:") == 1
    record(f"SIGSTOP of a rank, {' '.join(cell)}, watch.timeout=4", injected=1, survived=1, detect=[took])


def test_a_run_of_one_rank_is_watched_too(launch: Callable[..., Launch]) -> None:
    launched = launch("alone", "zero=2", "precision=fp16", *WATCHED, "steps=400", world=1)
    launched.until_step(12)
    launched.kill(signal.SIGSTOP, ranks=(0,))
    codes = launched.wait(timeout=40)
    assert codes in ([77], [-9]), (codes, launched.output)
    assert rig.exit_of(launched.out)["cause"].startswith("rank 0 stopped moving in phase ")


HANGS = {
    "data:1:15": "rank 1 stopped moving in phase data of step 15",
    "eval:1:20": "rank 1 stopped moving in phase evaluate of step 20",
    "save.shard:1:20": "rank 1 stopped moving in phase save",
    "save.sync:1:20": "rank 1 stopped moving in phase save",
    "step:0:15": "rank 0 stopped moving in phase step of step 15",
}


@pytest.mark.parametrize("place", HANGS)
def test_a_rank_that_hangs(launch: Callable[..., Launch], place: str, record: Callable[..., None]) -> None:
    launched = launch(f"hang-{place}", "zero=2", "precision=fp16", *WATCHED, HALFSTEP_FAULT=f"{place}:hang")
    with rig.nothing_left(launched.out, half_written=place.startswith("save")):
        codes = launched.wait(timeout=90)
    assert 77 in codes, (codes, launched.output)
    cause = rig.exit_of(launched.out)
    assert cause["code"] == 77
    assert HANGS[place] in cause["cause"], cause
    log = (launched.out / "attempts/0001" / f"rank-{place.split(':')[1]}.log").read_text()
    assert "most recent call first" in log
    assert "fault_injection.py" in log, "the stack shows where it hangs"
    record(f"hang at {place}", injected=1, survived=1)


@pytest.mark.parametrize("place", ["init:1:0", "jit:0:0"])
def test_a_start_that_hangs(launch: Callable[..., Launch], place: str, record: Callable[..., None]) -> None:
    launched = launch(f"hang-{place}", "zero=2", "precision=fp16", "watch.startup=15", HALFSTEP_FAULT=f"{place}:hang")
    codes = launched.wait(timeout=120)
    assert 77 in codes, (codes, launched.output)
    rank = place.split(":")[1]
    assert f"rank {rank} stopped moving in phase" in launched.output
    record(f"hang at {place}", injected=1, survived=1)


def test_a_stale_compiler_lock_heals_itself(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], scratch: Path, record: Callable[..., None]
) -> None:
    arguments = ("zero=2", "precision=fp16", "offload=optimizer-cpu", "ds.optimizer.params.torch_adam=false")
    undisturbed(*arguments)
    (folder,) = (file.parent for file in (scratch / "ops").glob("*cpu_adam*/build.ninja"))
    (folder / "lock").touch()
    launched = launch("stale-lock", *arguments, "steps=10")
    assert launched.wait(timeout=90) == [0, 0], launched.output
    record("a stale compiler lock", injected=1, survived=1)


@pytest.mark.parametrize("cell", [("zero=2", "precision=fp16"), ("zero=3", "precision=bf16")], ids=" ".join)
@pytest.mark.parametrize("times", [1.5, 3.0])
def test_a_slow_rank_is_named_within_20_steps(
    launch: Callable[..., Launch], cell: tuple[str, ...], times: float, record: Callable[..., None]
) -> None:
    launched = launch(f"slow-{cell[0]}-{times}", *cell, "steps=400", "checkpoint.every=0", "eval.every=0")
    launched.until_step(40)
    done = threading.Event()
    limit = threading.Thread(target=_limit, args=(launched, times, done))
    limit.start()
    begun = rig.last_step(launched.out)
    try:
        slow = launched.until(lambda: rig.events(launched.out, "slow_rank"), timeout=60)
    finally:
        done.set()
        limit.join()
        launched.kill(signal.SIGTERM)
        launched.wait(timeout=40)
    assert slow[0]["rank"] == 1
    assert slow[0]["step"] - begun <= 20, (begun, slow)
    record(f"a rank {times} times slower, {' '.join(cell)}", injected=1, survived=1, steps=slow[0]["step"] - begun)


def _limit(launched: Launch, times: float, done: threading.Event) -> None:
    """Let rank 1 run for a share of the time only, as cpulimit does."""
    period = 0.012
    while not done.is_set():
        launched.kill(signal.SIGSTOP, ranks=(1,))
        time.sleep(period * (1 - 1 / times))
        launched.kill(signal.SIGCONT, ranks=(1,))
        time.sleep(period / times)
    launched.kill(signal.SIGCONT, ranks=(1,))


@pytest.mark.parametrize("cell", [("zero=2", "precision=fp16"), ("zero=3", "precision=bf16")], ids=" ".join)
def test_a_thousand_clean_steps_raise_no_alarm(
    launch: Callable[..., Launch], cell: tuple[str, ...], record: Callable[..., None]
) -> None:
    launched = launch(
        f"clean-{cell[0]}", *cell, "steps=1000", "checkpoint.every=200", "eval.every=0", "watch.timeout=5"
    )
    assert launched.wait(timeout=240) == [0, 0], launched.output
    assert rig.events(launched.out, "slow_rank") == []
    record(f"1000 clean steps, {' '.join(cell)}", injected=0, alarms=0)


def test_every_process_group_has_the_timeout(
    scratch: Path, data: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Where nobody watches, a collective that a rank does not join ends too, and not after torch's 30 minutes."""
    script = Path(__file__).with_name("lonely_rank.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, "model=gpt2-nano", "zero=2", "precision=fp16", "batch.global=8", "sequence=64", f"data={data}"],
        env={**environment(scratch), "PYTHONPATH": str(rig.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("group ")]
    assert len(said) >= 2, done.stdout + done.stderr
    assert all("timed out" in line for line in said), said
    record("a collective that a rank does not join, nobody watching", injected=len(said), survived=len(said))
