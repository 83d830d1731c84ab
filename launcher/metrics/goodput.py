"""Goodput: how much of a run's time, over all its attempts, made progress that stands, and what took the rest.

The parts add up to the time from the first attempt's start to now. Nothing has to be running for it: an attempt that
was killed left its rows and events, and what it did not leave is the time until the next one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
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
    began: float
    ended: float
    spent: dict[str, float]


def of(run: Path, now: float | None = None) -> Goodput:
    """Account for a run directory; `now` ends the present attempt, without it the last sign of each attempt does."""
    attempts = _attempts(run, now)
    if not attempts:
        return Goodput(wall_seconds=0.0, productive_seconds=0.0, lost_seconds=dict[str, float].fromkeys(CAUSES, 0.0))
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    productive = 0.0
    for before, one in zip([None, *attempts], attempts, strict=False):
        lost["down"] += one.began - before.ended if before else 0.0
        lost["other"] += one.ended - one.began - sum(one.spent.values())
        for cause, seconds in one.spent.items():
            if cause == "productive":
                productive += seconds
            else:
                lost[cause] += seconds
    wall = attempts[-1].ended - attempts[0].began
    return Goodput(wall_seconds=wall, productive_seconds=productive, lost_seconds=lost)


def _attempts(run: Path, now: float | None) -> list[_Attempt]:
    folders = sorted(one for one in (run / "attempts").glob("[0-9]*") if (one / "env.json").exists())
    begins = [_json(folder / "env.json") for folder in folders]
    found = []
    for number, (folder, env) in enumerate(zip(folders, begins, strict=True)):
        last = number + 1 == len(begins)
        limit = now if last else _start(begins[number + 1])
        found.append(_account(run, folder, _start(env), limit, last=last and now is not None))
    return found


def _start(env: dict[str, Any]) -> float:
    return float(env.get("began", env.get("time", 0.0)))


def _account(run: Path, folder: Path, began: float, limit: float | None, *, last: bool) -> _Attempt:
    """Add up one attempt's rows and events; those of `limit` and later are another's."""

    def own(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if began <= row.get("time", 0.0) and (limit is None or row["time"] < limit)]

    spent: dict[str, float] = dict.fromkeys(
        ("productive", "skipped", "redone", "evaluate", "save", "load", "start"), 0.0
    )
    standing = own(_rows(run / "metrics.jsonl"))
    gone = own(_rows(folder / "metrics-redone.jsonl")) + own(_rows(folder / "metrics.jsonl"))
    events = own(_rows(run / "events.jsonl"))
    for row in standing:
        spent["skipped" if row.get("overflow") else "productive"] += row.get("step_seconds", 0.0)
    spent["redone"] += sum(row.get("step_seconds", 0.0) for row in gone)
    for event in events:
        if event.get("event") == "saved":
            spent["save"] += event["seconds"]
        elif event.get("event") == "evaluated":
            spent["evaluate"] += event["seconds"]
        elif event.get("event") == "resumed":
            spent["load"] += event["seconds"] + event["verify_seconds"]
    signs = [float(row["time"]) for row in [*standing, *gone, *events]]
    signs.append(float(_json(folder / "exit.json").get("time", began)))
    ended = limit if last and limit is not None else max(began, *signs)
    if limit is not None:
        ended = min(ended, limit)
    training = next((event["time"] for event in events if event.get("event") == "training"), ended)
    spent["start"] = training - began - spent["load"]
    return _Attempt(began=began, ended=ended, spent=spent)


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
