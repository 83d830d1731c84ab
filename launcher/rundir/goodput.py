"""Goodput: how much of a run's time, over all its attempts, made progress that stands, and what took the rest.

The parts add up to the time from the first attempt's start to now. Nothing has to be running for it: an attempt that
was killed left its rows and events, and what it did not leave is the time until the next one. Within an attempt time
only goes forward (launcher/system/clock.py); a clock that was set back between two of them makes that time zero.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.rundir import exits
from halfstep.launcher.rundir import run_reader as reader

CAUSES = ("start", "load", "evaluate", "save", "skipped", "redone", "down", "other")
"""What takes time and makes no progress.

start: joining, building, compiling; load: verifying and reading a checkpoint; save: the loop standing still for one;
skipped: steps that overflowed; redone: steps that a later attempt did again; down: no attempt was there; other: between
steps, and in the step that an end cut short.
"""
_FAR = 2.0**53
"""Seconds that no clock and no stopwatch shows."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Seconds of a run, all attempts together."""

    wall_seconds: float
    productive_seconds: float
    """In optimizer steps that stand."""
    lost_seconds: dict[str, float]
    """By cause."""

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as they stand in summary.json."""
        share = self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else None
        return {
            "wall_seconds": self.wall_seconds,
            "productive_seconds": self.productive_seconds,
            "lost_seconds": self.lost_seconds,
            "goodput": share,
        }


@dataclass(kw_only=True)
class _Attempt:
    """One attempt's own rows and events, and when it was there."""

    number: int
    began: float
    """Start of its first process."""
    held: float
    """Start of the attempt itself, after which no other one's rows are written."""
    ended: float
    steps_done: int | None
    """Steps that stood when it began; None in records that do not say."""
    standing: list[dict[str, Any]] = field(default_factory=list)
    gone: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def spent(self) -> dict[str, float]:
        """Return the seconds that are accounted for, by what they were spent on."""
        spent: dict[str, float] = dict.fromkeys(("productive", "skipped", "redone", "evaluate", "save", "load"), 0.0)
        for row in self.standing:
            spent["skipped" if row.get("overflow") else "productive"] += _seconds(row, "step_seconds")
        spent["redone"] += sum(_seconds(row, "step_seconds") for row in self.gone)
        names = {"saved": "save", "evaluated": "evaluate", "resumed": "load"}
        for event in self.events:
            if cause := names.get(str(event.get("event"))):
                spent[cause] += _seconds(event, "seconds") + _seconds(event, "verify_seconds")
        training = next((event["time"] for event in self.events if event.get("event") == "training"), self.ended)
        return {**spent, "start": max(0.0, training - self.began - spent["load"])}


def of(run: Path, now: float | None = None) -> Goodput:
    """Account for a run directory; `now` ends the present attempt, without it the last sign of each attempt does."""
    attempts = _attempts(run, now)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    productive = wall = 0.0
    for place, attempt in enumerate(attempts):
        spent = attempt.spent()
        # What was measured by a stopwatch counts where the clock says that there was less time.
        length = max(attempt.ended - attempt.began, sum(spent.values()))
        down = max(0.0, attempt.began - attempts[place - 1].ended) if place else 0.0
        lost["down"] += down
        lost["other"] += length - sum(spent.values())
        wall += down + length
        productive += spent.pop("productive")
        for cause, seconds in spent.items():
            lost[cause] += seconds
    return Goodput(wall_seconds=wall, productive_seconds=productive, lost_seconds=lost)


def _attempts(run: Path, now: float | None) -> list[_Attempt]:
    folders = reader.Run(run).attempts
    attempts = [begun for attempt in folders if (begun := _begun(attempt)) is not None]
    if not attempts:
        return []
    for row in _timed(run / "metrics.jsonl"):
        _maker(attempts, row).standing.append(row)
    gone: dict[tuple[Any, float], tuple[dict[str, Any], int]] = {}
    for attempt in folders:
        for file in sorted(attempt.folder.glob("metrics*.jsonl")):
            # An attempt may cut rows of several before it; an end between two writes leaves a row in both files.
            gone.update({_key(row): (row, attempt.number) for row in _timed(file)})
    kept = {_key(row) for attempt in attempts for row in attempt.standing}
    for key, (row, last) in gone.items():
        if key not in kept:
            _maker([attempt for attempt in attempts if attempt.number <= last] or attempts, row).gone.append(row)
    _deal_events(attempts, run / "events.jsonl")
    for place, attempt in enumerate(attempts):
        signs = [row["time"] for row in [*attempt.standing, *attempt.gone, *attempt.events]]
        before = attempts[place - 1].ended if place else attempt.began
        if attempt.held >= before:
            # Ranks may outlive their launcher by seconds, in which the next start is already waking up.
            attempt.began = max(attempt.began, before)
        attempt.ended = max([attempt.began, attempt.held, attempt.ended, *signs])
    if now is not None:
        attempts[-1].ended = max(now, attempts[-1].began)
    return attempts


def _begun(attempt: reader.Attempt) -> _Attempt | None:
    """Return an attempt without its rows; None for a folder in which nothing began."""
    if not (attempt.folder / "env.json").exists():
        return None
    # One value of a record that is damaged does not spoil the others.
    env, end = reader.record(attempt.folder / "env.json"), reader.record(attempt.folder / exits.EXIT)
    held = _time(env, "time", _time(env, "began", 0.0))
    done = env.get("steps_done")
    return _Attempt(
        number=attempt.number,
        began=_time(env, "began", held),
        held=held,
        ended=_time(end, "time", held),
        steps_done=done if isinstance(done, int) and not isinstance(done, bool) else None,
    )


def _maker(attempts: list[_Attempt], row: dict[str, Any]) -> _Attempt:
    """Return who made a row: of those that began before its step the last, since a start cuts what is beyond its own.

    Records that do not say where they began are told apart by the clock.
    """
    if any(attempt.steps_done is None for attempt in attempts) or not isinstance(row.get("step"), int):
        return _of_its_time(attempts, row)
    return next((attempt for attempt in reversed(attempts) if (attempt.steps_done or 0) < row["step"]), attempts[0])


def _deal_events(attempts: list[_Attempt], file: Path) -> None:
    """Give every event to the attempt whose start stands before it in the file."""
    by_name = {f"{attempt.number:04d}": attempt for attempt in attempts}
    current: _Attempt | None = None
    for event in _timed(file):
        if event.get("event") == "start":
            current = by_name.get(str(event.get("attempt"))) or _of_its_time(attempts, event)
        (current or _of_its_time(attempts, event)).events.append(event)


def _of_its_time(attempts: list[_Attempt], row: dict[str, Any]) -> _Attempt:
    return next((attempt for attempt in reversed(attempts) if attempt.held <= row["time"]), attempts[0])


def _key(row: dict[str, Any]) -> tuple[Any, float]:
    step = row.get("step")
    return step if isinstance(step, int) else None, row["time"]


def _timed(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that have a time; one that an end cut short has none."""
    return (row for row in reader.rows(file) if _number(row.get("time")) is not None)


def _seconds(row: dict[str, Any], key: str) -> float:
    return max(0.0, _number(row.get(key)) or 0.0)


def _time(record: dict[str, Any], key: str, otherwise: float) -> float:
    at = _number(record.get(key))
    return otherwise if at is None else at


def _number(value: Any) -> float | None:
    """Return a number that can be a time; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _FAR:
        return None
    return float(value) if math.isfinite(value) else None
