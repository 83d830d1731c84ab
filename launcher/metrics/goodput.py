"""Goodput: how much of a run's time, over all its attempts, made progress that stands, and what took the rest.

The parts add up to the time from the first attempt's start to now. Nothing has to be running for it: an attempt that
was killed left its rows and events, and what it did not leave is the time until the next one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAUSES = ("start", "load", "evaluate", "save", "skipped", "redone", "down", "other")
"""What takes time and makes no progress.

start: joining, building, compiling; load: verifying and reading a checkpoint; save: the loop standing still for one;
skipped: steps that overflowed; redone: steps that a later attempt did again; down: no attempt was there; other: between
steps, and in the step that an end cut short.
"""


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

    began: float
    """Start of its first process."""
    held: float
    """Start of the attempt itself, after which no other one's rows are written."""
    ended: float
    standing: list[dict[str, Any]] = field(default_factory=list)
    gone: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def spent(self) -> dict[str, float]:
        """Return the seconds that are accounted for, by what they were spent on."""
        found: dict[str, float] = dict.fromkeys(("productive", "skipped", "redone", "evaluate", "save", "load"), 0.0)
        for row in self.standing:
            found["skipped" if row.get("overflow") else "productive"] += row.get("step_seconds", 0.0)
        found["redone"] += sum(row.get("step_seconds", 0.0) for row in self.gone)
        names = {"saved": "save", "evaluated": "evaluate", "resumed": "load"}
        for event in self.events:
            if cause := names.get(event.get("event", "")):
                found[cause] += event["seconds"] + event.get("verify_seconds", 0.0)
        training = next((event["time"] for event in self.events if event.get("event") == "training"), self.ended)
        return {**found, "start": training - self.began - found["load"]}


def of(run: Path, now: float | None = None) -> Goodput:
    """Account for a run directory; `now` ends the present attempt, without it the last sign of each attempt does."""
    attempts = _attempts(run, now)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    if not attempts:
        return Goodput(wall_seconds=0.0, productive_seconds=0.0, lost_seconds=lost)
    productive = 0.0
    for number, one in enumerate(attempts):
        spent = one.spent()
        lost["down"] += one.began - attempts[number - 1].ended if number else 0.0
        lost["other"] += one.ended - one.began - sum(spent.values())
        productive += spent.pop("productive")
        for cause, seconds in spent.items():
            lost[cause] += seconds
    wall = attempts[-1].ended - attempts[0].began
    return Goodput(wall_seconds=wall, productive_seconds=productive, lost_seconds=lost)


def _attempts(run: Path, now: float | None) -> list[_Attempt]:
    folders = sorted(one for one in (run / "attempts").glob("[0-9]*") if (one / "env.json").exists())
    found = []
    for folder in folders:
        env = _json(folder / "env.json")
        held = float(env.get("time", env.get("began", 0.0)))
        ended = float(_json(folder / "exit.json").get("time", held))
        found.append(_Attempt(began=float(env.get("began", held)), held=held, ended=ended))
    if not found:
        return []
    for row in _rows(run / "metrics.jsonl"):
        _of_its_time(found, row).standing.append(row)
    gone = {}
    for file in (run / "attempts").glob("*/metrics*.jsonl"):
        # An attempt may cut rows of several before it; an end between two writes leaves a row in both files.
        gone.update({(row.get("step"), row["time"]): row for row in _rows(file)})
    kept = {(row.get("step"), row["time"]) for one in found for row in one.standing}
    for key, row in gone.items():
        if key not in kept:
            _of_its_time(found, row).gone.append(row)
    for event in _rows(run / "events.jsonl"):
        _of_its_time(found, event).events.append(event)
    for number, one in enumerate(found):
        # Ranks may outlive their launcher by seconds, in which the next start is already waking up.
        one.began = max(one.began, found[number - 1].ended) if number else one.began
        signs = [row["time"] for row in [*one.standing, *one.gone, *one.events]]
        one.ended = max([one.began, one.held, one.ended, *signs])
    if now is not None:
        found[-1].ended = max(now, found[-1].began)
    return found


def _of_its_time(attempts: list[_Attempt], row: dict[str, Any]) -> _Attempt:
    return next((one for one in reversed(attempts) if one.held <= row["time"]), attempts[0])


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = file.read_text("utf-8", errors="replace")
    except OSError:
        return
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by an end
        if isinstance(row, dict) and isinstance(row.get("time"), int | float):
            yield row


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
