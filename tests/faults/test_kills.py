"""kill -9, at any instant: of a rank, of all, at every point of a save, while loading, of whatever started them."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faults import rig
from faults.rig import Launch

from halfstep.launcher.system import caches

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("HALFSTEP_KILLS", "50"))
LONG = ("steps=600", "eval.every=200")


@pytest.mark.parametrize("cell", [("zero=2", "precision=fp16"), ("zero=3", "precision=bf16")], ids=" ".join)
def test_kills_at_random_instants_lose_no_step_and_no_bit(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    cell: tuple[str, ...],
    record: Callable[..., None],
) -> None:
    reference = undisturbed(*cell, *LONG)
    chance = random.Random(20261124)
    out: Path | str = f"random-kills-{cell[0]}"
    recovered, detected, in_save, wall = [], [], 0, 0.0
    for number in range(KILLS):
        launched = launch(out, *cell, *LONG)
        out = launched.out
        launched.until(lambda before=number, run=out: _trained(run) > before)
        begun = rig.last_step(out)
        if number:
            recovered.append(rig.events(out, "training")[-1]["time"] - wall)
        if number % 2:  # in a save, whichever comes first
            launched.until(lambda run=out: list((run / "checkpoints").glob(".writing-*")))
            time.sleep(chance.uniform(0, 0.03))
            in_save += bool(list((out / "checkpoints").glob(".writing-*")))
        else:
            launched.until_step(begun + chance.randint(1, 18))
            time.sleep(chance.uniform(0, 0.06))
        victims = chance.choice([(0,), (1,), (0, 1)])
        launched.kill(ranks=victims)
        killed, wall = time.monotonic(), time.time()
        codes = launched.wait(timeout=30)
        detected.append(time.monotonic() - killed)
        assert any(code == -signal.SIGKILL for code in codes), (number, codes, launched.output)
    last = launch(out, *cell, *LONG)
    with rig.nothing_left(last.out):
        assert last.wait() == [0, 0], last.output
    rig.assert_same(last.out, reference)
    assert rig.redone(last.out) <= 10, "no step beyond the interval"
    assert not rig.events(last.out, "checkpoint_damaged")
    goodput = json.loads((last.out / "summary.json").read_text())["goodput"]
    record(
        f"kill -9 at a random instant, {' '.join(cell)}, 600 steps",
        injected=KILLS,
        survived=KILLS,
        in_saves=in_save,
        worst_redone=rig.redone(last.out),
        detect=detected,
        recover=recovered,
        goodput=round(goodput, 3),
    )


def _trained(out: Path) -> int:
    return len(rig.events(out, "training")) if (out / "events.jsonl").exists() else 0


POINTS = ["save.begin", "save.shard", "save.sync", "save.manifest", "save.rename", "save.prune"]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_a_point_of_a_save_leaves_the_old_checkpoint_or_the_new(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], point: str, record: Callable[..., None]
) -> None:
    cell = ("zero=2", "precision=fp16", "checkpoint.keep=2")
    worst = []
    for rank in (0, 1) if point != "save.prune" else (0,):
        step = 10 if point == "save.prune" else 30
        launched = launch(f"{point}-{rank}", *cell, HALFSTEP_FAULT=f"{point}:{rank}:{step}:kill9")
        codes = launched.wait(timeout=60)
        assert codes[rank] == -signal.SIGKILL, (codes, launched.output)
        saved = rig.steps_saved(launched.out)
        assert saved[-1] in (20, 30), "the old one or the new"
        assert len(saved) >= 2
        with rig.nothing_left(launched.out):
            again = launch(launched.out, *cell)
            assert again.wait() == [0, 0], again.output
        assert [event["step"] for event in rig.events(launched.out, "resumed")] == [saved[-1]]
        rig.assert_same(launched.out, undisturbed(*cell))
        worst.append(rig.redone(launched.out))
    record(f"kill -9 at {point}", injected=len(worst), survived=len(worst), worst_redone=max(worst))


def test_a_kill_while_loading_and_another_while_it_recovers(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], record: Callable[..., None]
) -> None:
    cell = ("zero=2", "precision=fp16")
    launched = launch("loading", *cell, HALFSTEP_FAULT="step:*:25:kill9")
    assert launched.wait() == [-9, -9]
    again = launch(launched.out, *cell, HALFSTEP_FAULT="load:1:20:kill9")
    assert again.wait(timeout=60)[1] == -9
    third = launch(launched.out, *cell, HALFSTEP_FAULT="init:0:0:kill9")
    assert third.wait(timeout=60)[0] == -9
    with rig.nothing_left(launched.out):
        assert launch(launched.out, *cell).wait() == [0, 0]
    rig.assert_same(launched.out, undisturbed(*cell))
    record("kill -9 of all ranks, then of one while loading, then while building", injected=3, survived=3)


STARTERS = [("deepspeed", "runner"), ("deepspeed", "launch.py"), ("deepspeed", "rank"), ("torchrun", "agent")]


@pytest.mark.parametrize(("starter", "victim"), STARTERS, ids=" ".join)
def test_no_rank_survives_what_started_it(
    scratch: Path, data: Path, starter: str, victim: str, record: Callable[..., None]
) -> None:
    out = scratch / "faults" / f"orphans-{starter}-{victim}"
    arguments = [*rig.WORDS, "steps=5000", "zero=2", "precision=fp16", f"data={data}"]
    launched = rig.start_by("halfstep", ["run", "--with", starter, *arguments], out, scratch)
    rig.wait_for(lambda: rig.last_step(out) >= 5)
    ranks = rig.ranks_of(out)
    assert len(ranks) == 2
    above = [
        parent for parent in ranks[0].parents() if parent.pid != launched.pid and parent in _descendants(launched.pid)
    ]
    target = {"runner": above[-1], "launch.py": above[0], "rank": ranks[1], "agent": above[0]}[victim]
    with rig.nothing_left(out):
        target.kill()
        killed = time.monotonic()
        rig.wait_for(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), timeout=30)
        gone = time.monotonic() - killed
        assert gone < 10, "the promise"
        status = launched.wait(timeout=40)
    cause = rig.exit_of(out)
    if victim == "rank":
        assert status == cause["code"] == 128 + 9, (status, cause)
        assert "rank 1 was killed by signal 9" in cause["cause"]
    else:
        assert status == cause["code"] == 75, (status, cause)
        assert "died" in cause["cause"]
        assert rig.steps_saved(out)[-1] == rig.last_step(out), "what the ranks still could save, they did"
    record(f"kill -9 of {starter}'s {victim}", injected=1, survived=1, detect=[gone])


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_starts_that_are_killed_pile_nothing_up(
    launch: Callable[..., Launch], scratch: Path, record: Callable[..., None]
) -> None:
    before = set(Path("/tmp").iterdir()) | set(Path("/dev/shm").iterdir())
    # Before they meet, a rank hears of another's death only if that one had come so far: else watch.startup ends it.
    cell = ("zero=2", "precision=fp16", "watch.startup=20")
    chance = random.Random(7)
    for number in range(12):
        launched = launch("restarts", *cell)
        time.sleep(chance.uniform(0.5, 5.0))
        launched.kill(ranks=chance.choice([(0,), (1,), (0, 1)]))
        launched.wait(timeout=40)
        assert launched.ranks[0].poll() is not None, number
    with rig.nothing_left(scratch / "faults" / "restarts"):
        pass
    after = set(Path("/tmp").iterdir()) | set(Path("/dev/shm").iterdir())
    left = {file for file in after - before if file.name.startswith(("halfstep", "deepspeed", "torch"))}
    assert left <= {caches.temporary()}, "a folder for what lives for one launch"
    assert not list((scratch / "ops").glob("*/lock")), "no build lock that the next start would wait for"
    again = launch("restarts", *cell)
    assert again.wait() == [0, 0], again.output
    assert not list(caches.temporary().glob("launch-*")), "the next start removes what killed ones left"
    record("start and kill during start-up", injected=12, survived=12)
