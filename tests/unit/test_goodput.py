"""Goodput: the parts of a run's time add up to it, whatever its attempts left behind."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.rundir import goodput


def write(file: Path, *rows: dict[str, Any], torn: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
        out.write(torn)


def step(number: int, seconds: float, time: float, *, overflow: bool = False) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "overflow": overflow, "step_seconds": seconds, "time": time}


@pytest.fixture
def killed_once(tmp_path: Path) -> Path:
    """Two attempts: one from 100 s, killed after 130; one from 150, with a checkpoint of step 2 to resume from."""
    write(tmp_path / "attempts/0001/env.json", {"began": 100.0, "time": 104.0})
    write(tmp_path / "attempts/0002/env.json", {"began": 150.0, "time": 155.0})
    write(
        tmp_path / "events.jsonl",
        {"event": "start", "time": 104.0},
        {"event": "training", "time": 110.0},
        {"event": "evaluated", "step": 0, "seconds": 2.0, "time": 112.0},
        {"event": "saved", "step": 2, "seconds": 1.5, "time": 120.0},
        torn='{"event": "sav',
    )
    write(
        tmp_path / "events.jsonl",
        {"event": "start", "time": 155.0},
        {"event": "resumed", "seconds": 1.0, "verify_seconds": 0.5, "time": 158.0},
        {"event": "training", "time": 160.0},
    )
    write(
        tmp_path / "metrics.jsonl",
        {"step": 0, "eval_loss": 5.0, "time": 112.0},
        step(1, 3.0, 115.0),
        step(2, 3.0, 118.0, overflow=True),
        step(3, 4.0, 164.0),
    )
    write(tmp_path / "attempts/0001/metrics-redone.jsonl", step(3, 4.0, 125.0), torn='{"step": 4, "lo')
    write(tmp_path / "attempts/0001/exit.json", {"code": 137, "time": 130.0})
    return tmp_path


def test_every_second_has_one_cause(killed_once: Path) -> None:
    spent = goodput.of(killed_once, now=170.0)
    assert spent.wall_seconds == 70.0
    assert spent.productive_seconds == 3.0 + 4.0
    assert spent.lost_seconds == pytest.approx(
        {
            "start": 10.0 + 10.0 - 1.5,
            "load": 1.5,
            "evaluate": 2.0,
            "save": 1.5,
            "skipped": 3.0,
            "redone": 4.0,
            "down": 20.0,
            "other": (30 - 10 - 2 - 1.5 - 3 - 3 - 4) + (20 - 10 - 4),
        }
    )
    assert spent.productive_seconds + sum(spent.lost_seconds.values()) == pytest.approx(70.0, abs=1e-9)
    assert spent.to_dict()["goodput"] == pytest.approx(0.1)


def test_a_run_that_nobody_ends_is_accounted_for_up_to_its_last_sign(killed_once: Path) -> None:
    assert goodput.of(killed_once).wall_seconds == 64.0


def test_ranks_that_outlive_their_launcher_into_the_next_start_make_nothing_negative(tmp_path: Path) -> None:
    write(tmp_path / "attempts/0001/env.json", {"began": 100.0, "time": 101.0})
    write(tmp_path / "attempts/0002/env.json", {"began": 103.0, "time": 111.0})
    write(tmp_path / "events.jsonl", {"event": "training", "time": 101.0}, {"event": "training", "time": 112.0})
    write(tmp_path / "metrics.jsonl", step(1, 4.0, 105.0), step(2, 4.0, 109.0), step(3, 2.0, 114.0))
    spent = goodput.of(tmp_path, now=115.0)
    assert spent.productive_seconds == 10.0
    assert spent.lost_seconds["down"] == 0.0
    assert spent.lost_seconds["start"] == pytest.approx(1.0 + 3.0)
    assert spent.lost_seconds["other"] == pytest.approx(0.0 + 1.0)


def test_rows_that_a_later_attempt_cuts_count_for_the_one_that_made_them_and_once(tmp_path: Path) -> None:
    for number, began in (1, 0.0), (2, 100.0), (3, 200.0):
        write(tmp_path / f"attempts/{number:04d}/env.json", {"began": began, "time": began})
        write(tmp_path / "events.jsonl", {"event": "training", "time": began})
    write(tmp_path / "attempts/0002/metrics-redone.jsonl", step(1, 20.0, 20.0), step(2, 5.0, 105.0))
    write(tmp_path / "metrics.jsonl", step(1, 20.0, 220.0), step(2, 5.0, 105.0))
    spent = goodput.of(tmp_path, now=230.0)
    assert spent.lost_seconds["redone"] == 20.0, "step 2 was copied before an end, and stands"
    assert spent.productive_seconds == 25.0
    assert spent.lost_seconds["down"] == pytest.approx(80.0 + 95.0)


def test_a_run_without_attempts_has_no_time(tmp_path: Path) -> None:
    assert goodput.of(tmp_path).to_dict()["goodput"] is None


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.lists(st.floats(0.01, 3), max_size=8), st.booleans()), min_size=1, max_size=5
    )
)
def test_the_parts_always_add_up(tmp_path_factory: pytest.TempPathFactory, attempts: list) -> None:
    run = tmp_path_factory.mktemp("run")
    now = 1000.0
    for number, (gap, steps, lost) in enumerate(attempts, 1):
        now += gap
        write(run / f"attempts/{number:04d}/env.json", {"began": now})
        now += 1
        write(run / "events.jsonl", {"event": "start", "time": now}, {"event": "training", "time": now})
        for place, seconds in enumerate(steps, 1):
            now += seconds
            target = f"attempts/{number:04d}/metrics-redone.jsonl" if lost else "metrics.jsonl"
            write(run / target, step(place, seconds, now))
        now += 0.5
    spent = goodput.of(run, now=now)
    assert spent.productive_seconds + sum(spent.lost_seconds.values()) == pytest.approx(spent.wall_seconds, abs=1e-6)
    assert all(seconds > -1e-6 for seconds in spent.lost_seconds.values())
    assert spent.productive_seconds == pytest.approx(sum(sum(steps) for _, steps, lost in attempts if not lost))


# --- a clock that somebody sets


def test_a_clock_set_back_between_two_attempts_makes_no_time_negative(tmp_path: Path) -> None:
    """Attempt 1 from 1000 to 1030; then the clock goes back to 500, and attempt 2 redoes step 2 and makes step 3."""
    write(tmp_path / "attempts/0001/env.json", {"began": 1000.0, "time": 1004.0, "steps_done": 0})
    write(tmp_path / "attempts/0002/env.json", {"began": 500.0, "time": 502.0, "steps_done": 1})
    write(
        tmp_path / "events.jsonl",
        {"event": "start", "attempt": "0001", "time": 1004.0},
        {"event": "training", "time": 1010.0},
        {"event": "start", "attempt": "0002", "time": 502.0},
        {"event": "training", "time": 505.0},
    )
    write(tmp_path / "attempts/0001/metrics-redone.jsonl", step(2, 9.0, 1029.0))
    write(tmp_path / "metrics.jsonl", step(1, 9.0, 1020.0), step(2, 7.0, 512.0), step(3, 7.0, 519.0))
    write(tmp_path / "attempts/0001/exit.json", {"code": 137, "time": 1030.0})
    spent = goodput.of(tmp_path, now=520.0)
    assert spent.wall_seconds == 30.0 + 20.0
    assert spent.productive_seconds == 9.0 + 7.0 + 7.0
    assert spent.lost_seconds["redone"] == 9.0
    assert spent.lost_seconds["start"] == 10.0 + 5.0
    assert spent.lost_seconds["down"] == 0.0
    assert spent.to_dict()["goodput"] == pytest.approx(23 / 50)


def test_a_clock_set_back_within_an_attempt_of_old_records_leaves_goodput_between_0_and_1(tmp_path: Path) -> None:
    write(tmp_path / "attempts/0001/env.json", {"began": 1000.0, "time": 1001.0})
    write(tmp_path / "events.jsonl", {"event": "start", "time": 1001.0}, {"event": "training", "time": 990.0})
    write(tmp_path / "metrics.jsonl", step(1, 20.0, 1010.0), step(2, 20.0, 930.0), step(3, 20.0, 950.0))
    spent = goodput.of(tmp_path, now=960.0)
    assert spent.productive_seconds == 60.0
    assert spent.wall_seconds == 60.0
    assert spent.to_dict()["goodput"] == 1.0
    assert all(seconds >= 0 for seconds in spent.lost_seconds.values())


@given(st.lists(st.tuples(st.floats(-5000, 5000), st.lists(st.floats(0.01, 3), max_size=6)), min_size=1, max_size=5))
def test_whatever_the_clock_does_the_parts_add_up_and_none_is_negative(
    tmp_path_factory: pytest.TempPathFactory, attempts: list
) -> None:
    run, clock, done = tmp_path_factory.mktemp("run"), 1e6, 0
    for number, (jump, steps) in enumerate(attempts, 1):
        clock += jump
        name = f"{number:04d}"
        write(run / f"attempts/{name}/env.json", {"began": clock, "time": clock + 1, "steps_done": done})
        clock += 1
        write(run / "events.jsonl", {"event": "start", "attempt": name, "time": clock})
        write(run / "events.jsonl", {"event": "training", "time": clock})
        for seconds in steps:
            clock, done = clock + seconds, done + 1
            write(run / "metrics.jsonl", step(done, seconds, clock))
    spent = goodput.of(run, now=clock)
    total = spent.productive_seconds + sum(spent.lost_seconds.values())
    assert total == pytest.approx(spent.wall_seconds, abs=1e-6)
    assert all(seconds >= -1e-6 for seconds in spent.lost_seconds.values())
    assert spent.productive_seconds == pytest.approx(sum(sum(steps) for _, steps in attempts))
    assert 0 <= (spent.to_dict()["goodput"] or 0.0) <= 1


def test_records_that_are_damaged_count_for_nothing(tmp_path: Path) -> None:
    write(tmp_path / "attempts/0001/env.json", {"began": "yesterday", "time": 100.0, "steps_done": "many"})
    write(tmp_path / "attempts/0001/exit.json", {"code": 1, "time": 1e300})
    write(tmp_path / "events.jsonl", {"event": ["saved"], "time": 101.0}, {"event": "saved", "time": 102.0})
    write(tmp_path / "metrics.jsonl", {"step": [1], "step_seconds": "long", "time": 103.0}, step(2, -5.0, 104.0))
    (tmp_path / "attempts" / "0002").mkdir()
    spent = goodput.of(tmp_path, now=110.0)
    assert (spent.wall_seconds, spent.productive_seconds) == (10.0, 0.0)


def test_a_process_does_not_see_the_clock_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.launcher.system import clock

    before = clock.now()
    assert before == pytest.approx(time.time(), abs=60)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock.now() - before < 60
    assert clock.since_boot(time.clock_gettime(time.CLOCK_BOOTTIME)) == pytest.approx(clock.now(), abs=1)
