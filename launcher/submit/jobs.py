"""Runs as a user of a cluster sees them: what SLURM says of their jobs, and their directories of their progress."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import RequestError
from launcher.submit import slurm
from launcher.submit.job import LOG
from launcher.watch.exits import read_exit

_TAIL = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    run: str
    job: str | None
    state: str
    """SLURM's, in small letters, while it has a job; else `done`, `ended` or `lost`."""
    reason: str
    """Why it waits, on which nodes it runs, or how it ended."""
    step: int | None
    steps: int
    loss: float | None
    tokens_per_second: float | None
    checkpoint: int | None
    """The step of the newest."""
    attempts: int
    left: str | None
    """Of the job's time limit."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def submitted(run: Path) -> list[str]:
    """Return the jobs that `halfstep submit` sent for a run, oldest first."""
    return [str(row["job"]) for row in _lines(run / "jobs.jsonl")]


def alive(run: Path, queued: Sequence[slurm.Queued] | None = None) -> list[slurm.Queued]:
    """Return the jobs of a run or of an array's folder that wait or run, whoever submitted them, oldest first."""
    wanted = run.absolute()
    found = []
    for one in slurm.queue() if queued is None else queued:
        named = Path(one.run)
        if (wanted == named.parent and named.suffix == ".txt") or wanted in runs_of(one):
            found.append(one)
    return sorted(found, key=lambda one: [int(part) for part in one.job.split("_")])


def survey(places: Iterable[Path]) -> list[Row]:
    """Return a row for every run in these folders, or, where none is named, for all jobs and the runs under runs/."""
    queued = slurm.queue()
    named = [run for place in places for run in _runs(place)]
    if not named:
        named = [run for one in queued for run in runs_of(one)]
        named += [run for run in _runs(Path("runs")) if submitted(run)]
    return [_row(run, alive(run, queued)) for run in dict.fromkeys(run.absolute() for run in named)]


def find(word: str) -> tuple[Path, list[str]]:
    """Return the run directory, or an array's folder, and the living jobs that a directory or a job's number names.

    Raises RequestError where it names neither.
    """
    path = Path(word)
    if path.is_dir():
        return path.absolute(), [one.job for one in alive(path)]
    found = slurm.queue(word) if word.replace("_", "").isdigit() else []
    if not found:
        raise RequestError(
            f"{word} is neither a run directory nor a job of a run",
            where="the command line",
            fix="`halfstep jobs` lists both",
        )
    runs = runs_of(found[0])
    one_run = len(found) == 1 and len(runs) == 1
    return (runs[0] if one_run else Path(found[0].run).parent), [one.job for one in found]


def log_of(run: Path) -> Path:
    """Return the log of a run's jobs: its own, or that of its task in an array."""
    own = run / LOG
    rows = _lines(run / "jobs.jsonl")
    if not own.exists() and rows and "_" in str(rows[-1]["job"]):
        own = Path(rows[-1]["script"]).parent / f"task-{str(rows[-1]['job']).partition('_')[2]}.log"
    if not own.exists():
        raise RequestError(
            f"{run} has no log yet", where=str(own), fix="`halfstep jobs` says whether its job has started"
        )
    return own


def follow(log: Path, out: TextIO, *, lines: int, follow: bool, poll: float = 0.5) -> None:
    """Print the last lines of a log and, if asked, what is added to it until the reader interrupts."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        out.writelines(file.readlines()[-lines:] if lines else [])
        out.flush()
        while follow:
            if text := file.read():
                out.write(text)
                out.flush()
            else:
                time.sleep(poll)


def _runs(place: Path) -> Iterator[Path]:
    if (place / "plan.json").is_file():
        yield place
    elif place.is_dir():
        yield from sorted(one.parent for one in place.glob("*/plan.json"))


def runs_of(job: slurm.Queued) -> list[Path]:
    """Return the run directories that a job is about: one, or those of a whole array."""
    listed = Path(job.run)
    if listed.suffix != ".txt" or not listed.is_file():
        return [listed]
    runs = [Path(line) for line in listed.read_text("utf-8").splitlines()]
    task = job.job.partition("_")[2]
    return [runs[int(task)]] if task.isdigit() and int(task) < len(runs) else runs


def _row(run: Path, living: list[slurm.Queued]) -> Row:
    job = living[0] if living else None
    attempts = sorted(one for one in (run / "attempts").glob("[0-9]*") if one.is_dir())
    last = last_step(run / "metrics.jsonl")
    state, reason = (job.state.lower(), job.reason) if job else _ending(run, attempts)
    return Row(
        run=_short(run),
        job=job.job if job else None,
        state=state,
        reason="" if reason == "None" else reason,
        step=last.get("step"),
        steps=_json(run / "plan.json").get("steps", 0),
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
        checkpoint=max((_number(one.parent) for one in run.glob("checkpoints/step-*/manifest.json")), default=None),
        attempts=len(attempts),
        left=job.left if job and not job.waits else None,
    )


def _ending(run: Path, attempts: list[Path]) -> tuple[str, str]:
    if _json(run / "summary.json").get("status") == "done":
        return "done", ""
    if not attempts:
        return "ended", "before its ranks began"
    found = read_exit(attempts[-1])
    return ("ended", f"{found['cause']} ({found['code']})") if found else ("lost", "nobody wrote how it ended")


def last_step(metrics: Path) -> dict[str, Any]:
    """Return the newest row of a step, from the file's end."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return {}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _short(run: Path) -> str:
    here = Path.cwd()
    return str(run.relative_to(here)) if run.is_relative_to(here) else str(run)
