"""Runs as a user of a cluster sees them: what SLURM says of their jobs, and their directories of their progress."""

import codecs
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.launcher.rundir.exits import Exit
from halfstep.launcher.rundir.records import Damaged
from halfstep.launcher.rundir.run_reader import Attempt, Run
from halfstep.launcher.submit import slurm
from halfstep.launcher.submit.job import LOG
from halfstep.launcher.system import foreign
from halfstep.launcher.system.fields import Finite, Text, checked
from halfstep.launcher.system.files import reason

_TAIL = 64 * 1024
_LIST_BYTES = 1 << 24
"""Of an array's list of run directories."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    run: str
    job: str | None
    state: str
    """SLURM's, in small letters, while it has a job; else `done`, `ended`, `lost` or `damaged`."""
    reason: str
    """Why it waits, on which nodes it runs, how it ended, or what of its records cannot be read."""
    step: int | None
    steps: int | None
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


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A line of jobs.jsonl: a job that was sent for a run."""

    job: Text
    script: Text = ""
    time: Finite = 0.0


def sent(run: Path) -> list[Sent]:
    """Return what `halfstep submit` wrote of the jobs for a run, oldest first; lines that are none are left out."""
    lines = []
    for row in foreign.objects(run / "jobs.jsonl"):
        try:
            line = checked(Sent, row)
        except ValueError:
            continue
        if slurm.is_job(line.job):
            lines.append(line)
    return lines


def submitted(run: Path) -> list[str]:
    """Return the jobs that `halfstep submit` sent for a run, oldest first."""
    return [line.job for line in sent(run)]


def alive(run: Path, queued: Sequence[slurm.Queued] | None = None) -> list[slurm.Queued]:
    """Return the jobs of a run or of an array's folder that wait or run, whoever submitted them, oldest first."""
    wanted = run.absolute()
    living = []
    for job in slurm.queue() if queued is None else queued:
        named = Path(job.run)
        if (wanted == named.parent and named.suffix == ".txt") or wanted in runs_of(job):
            living.append(job)
    return sorted(living, key=lambda job: [int(part) for part in re.findall(r"[0-9]+", job.job)])


def survey(places: Iterable[Path]) -> list[Row]:
    """Return a row for every run in these folders, or, where none is named, for all jobs and the runs under runs/."""
    queued = slurm.queue()
    try:
        named = [run for place in places for run in _runs(place)]
    except OSError as error:
        raise RequestError(
            f"a folder cannot be read: {reason(error)}", where=str(error.filename), fix="check its permissions"
        ) from None
    if not named:
        named = [run for job in queued for run in runs_of(job)]
        named += [run for run in _runs(Path("runs")) if submitted(run)]
    return [_row(run, alive(run, queued)) for run in dict.fromkeys(run.absolute() for run in named)]


def find(word: str) -> tuple[Path, list[str]]:
    """Return the run directory, or an array's folder, and the living jobs that a directory or a job's number names.

    Raises RequestError where it names neither.
    """
    path = Path(word)
    if path.is_dir():
        return path.absolute(), [job.job for job in alive(path)]
    queued = slurm.queue(word) if slurm.is_job(word) else []
    if not queued:
        raise RequestError(
            f"{word} is neither a run directory nor a job of a run",
            where="the command line",
            fix="`halfstep jobs` lists both",
        )
    runs = runs_of(queued[0])
    one_run = len(queued) == 1 and len(runs) == 1
    return (runs[0] if one_run else Path(queued[0].run).parent), [job.job for job in queued]


def log_of(run: Path) -> Path:
    """Return the log of a run's jobs: its own, or that of its task in an array."""
    own, jobs = run / LOG, sent(run)
    if not own.exists() and jobs and "_" in jobs[-1].job:
        own = Path(jobs[-1].script).parent / f"task-{jobs[-1].job.partition('_')[2]}.log"
    if not own.exists():
        raise RequestError(
            f"{run} has no log yet", where=str(own), fix="`halfstep jobs` says whether its job has started"
        )
    return own


def follow(log: Path, show: Callable[[str], None], *, lines: int, follow: bool, poll: float = 0.5) -> None:
    """Show the last lines of a log and, if asked, what is added to it until the reader interrupts.

    Raises RequestError for a log that is no regular file, or cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = io.IncrementalNewlineDecoder(decoder, translate=True)  # a bar that draws itself again is many lines
    try:
        with foreign.open_regular(log) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            last = text.decode(file.read(2 * _TAIL)).splitlines(keepends=True)
            show("".join(last[-lines:]) if lines > 0 else "")
            while follow:
                if added := file.read(_TAIL):
                    show(text.decode(added))
                else:
                    time.sleep(poll)
    except OSError as error:
        raise RequestError(
            f"the log cannot be read: {reason(error)}", where=str(log), fix="check what it is, and its permissions"
        ) from None


def _runs(place: Path) -> Iterator[Path]:
    if (place / "plan.json").is_file():
        yield place
    elif place.is_dir():
        yield from sorted(plan.parent for plan in place.glob("*/plan.json"))


def runs_of(job: slurm.Queued) -> list[Path]:
    """Return the run directories that a job is about: one, or those of a whole array."""
    listed = Path(job.run)
    if listed.suffix != ".txt":
        return [listed]
    try:
        runs = [Path(line) for line in foreign.read_text(listed, _LIST_BYTES).splitlines() if line]
    except (OSError, ValueError):
        return [listed]
    task = job.job.partition("_")[2]
    return [runs[int(task)]] if re.fullmatch("[0-9]{1,9}", task) and int(task) < len(runs) else runs


def _row(path: Path, living: list[slurm.Queued]) -> Row:
    job = living[0] if living else None
    run, damage = Run(path), []

    def read(what: str) -> Any:
        try:
            return getattr(run, what)
        except Damaged as error:
            damage.append(error.what)
            return None

    last, plan, summary = read("reached"), read("planned"), read("summary")
    if job:
        state, why = job.state.lower(), job.reason
    elif summary is not None and summary.status == "done":
        state, why = "done", ""
    else:
        state, why = _ending(run.attempts, read("exit"))
    if damage:
        state, why = state if job else "damaged", "; ".join(damage)
    return Row(
        run=_short(path),
        job=job.job if job else None,
        state=state,
        reason="" if why == "None" else why,
        step=last.step if last else None,
        steps=plan.steps if plan else None,
        loss=last.loss if last else None,
        tokens_per_second=last.tokens_per_second if last else None,
        checkpoint=run.newest_checkpoint,
        attempts=len(run.attempts),
        left=job.left if job and not job.waits else None,
    )


def _ending(attempts: Sequence[Attempt], end: Exit | None) -> tuple[str, str]:
    if not attempts:
        return "ended", "before its ranks began"
    return ("ended", f"{end.cause} ({end.code})") if end else ("lost", "nobody wrote how it ended")


def _short(run: Path) -> str:
    here = Path.cwd()
    return str(run.relative_to(here)) if run.is_relative_to(here) else str(run)
