"""Where records go: the `Sink` protocol, the sinks there are, and `of_run`, which lists those of a run.

A sink for a tracker would be a class beside `ConsoleSink`, and a line in `of_run`.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halfstep.launcher.errors import printable
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.system import files


class Sink(Protocol):
    """What takes the records of a run, on rank 0. Whoever inherits from it writes the methods that it has a use for."""

    def record(self, row: StepRecord | EvaluationRecord) -> None:
        """Take an optimizer step or an evaluation."""

    def event(self, row: dict[str, Any]) -> None:
        """Take what happened besides: its kind as `event`, its `time`, and what belongs to it."""

    def say(self, text: str) -> None:
        """Take a sentence for people."""

    def summary(self, tree: dict[str, Any]) -> None:
        """Take the result."""

    def sync(self) -> None:
        """Return when nothing that was taken can be lost any more."""

    def close(self) -> None:
        """Take nothing more."""


def of_run(where: RunDir, *, steps: int, every: int) -> list[Sink]:
    """Open the sinks of a run of so many steps, of which people see some; records go to them in this order."""
    return [FileSink(where), ConsoleSink(steps, every)]


class JsonLines:
    """A file of JSON objects, one a line; every line is handed to the kernel as it is written.

    Raises RefusedError where the operating system does not take a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._refusals():
            self._file: int | None = files.open_append(path)

    def write(self, row: StepRecord | EvaluationRecord | dict[str, Any]) -> None:
        """Append one row."""
        assert self._file is not None, f"{self._path} is closed"
        content = row if isinstance(row, dict) else asdict(row)
        with self._refusals():
            files.write_all(self._file, (json.dumps(content, allow_nan=False) + "\n").encode())

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        assert self._file is not None, f"{self._path} is closed"
        with self._refusals():
            os.fsync(self._file)

    def close(self) -> None:
        """Sync and close."""
        if self._file is not None:
            try:
                self.sync()
            finally:
                file, self._file = self._file, None
                with self._refusals():
                    os.close(file)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise files.explained(error, str(self._path)) from None


class FileSink(Sink):
    """The files of the run directory: metrics.jsonl, events.jsonl and summary.json."""

    def __init__(self, where: RunDir) -> None:
        self._summary = where.summary
        self._metrics, self._events = JsonLines(where.metrics), JsonLines(where.events)

    def record(self, row: StepRecord | EvaluationRecord) -> None:
        """Append it to metrics.jsonl."""
        self._metrics.write(row)

    def event(self, row: dict[str, Any]) -> None:
        """Append it to events.jsonl."""
        self._events.write(row)

    def summary(self, tree: dict[str, Any]) -> None:
        """Write summary.json."""
        files.write_json(self._summary, tree)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        self._metrics.sync()
        self._events.sync()

    def close(self) -> None:
        """Sync and close."""
        self._metrics.close()
        self._events.close()


class ConsoleSink(Sink):
    """What a person sees: a live bar and every step on a terminal, a plain line now and then in a file."""

    def __init__(self, steps: int, every: int) -> None:
        self._steps, self._every = steps, every
        self._live = sys.stdout is not None and sys.stdout.isatty()
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False, markup=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=steps)
        self._progress.start()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(printable(text, keep="\n"))

    def record(self, row: StepRecord | EvaluationRecord) -> None:
        """Show an optimizer step, as far as it is due, or an evaluation."""
        if isinstance(row, EvaluationRecord):
            self.say(f"eval {row.step:>6}/{self._steps}  {_evaluation_text(row)}")
            return
        text = _step_text(row)
        self._progress.update(self._task, completed=row.step, description=text)
        if not self._live and (row.step % self._every == 0 or row.step in (1, self._steps) or row.overflow):
            self.say(f"step {row.step:>6}/{self._steps}  {text}")

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()


def _evaluation_text(record: EvaluationRecord) -> str:
    loss = "not finite" if record.eval_loss is None else f"{record.eval_loss:.4f}"
    perplexity = "-" if record.perplexity is None else f"{record.perplexity:,.1f}"
    parts = [f"{Path(path).name} {_number(own, '.4f')}" for path, own in (record.eval_loss_by_part or {}).items()]
    text = f"validation loss {loss}  perplexity {perplexity}" + (f"  ({', '.join(parts)})" if parts else "")
    for name, metrics in (record.tasks or {}).items():
        text += f"  {name}: " + ", ".join(
            f"{metric} {'-' if value is None else format(value, '.4f')}" for metric, value in metrics.items()
        )
    return text


def _step_text(record: StepRecord) -> str:
    parts = [f"loss {_number(record.loss, '.4f')}", f"lr {record.lr:.2e}", f"norm {_number(record.grad_norm, '.3f')}"]
    if record.loss_scale is not None:
        parts.append(f"scale {record.loss_scale:g}" + (" SKIPPED" if record.overflow else ""))
    parts.append(f"{record.tokens_per_second:,.0f} tok/s")
    if record.mfu is not None:
        parts.append(f"MFU {100 * record.mfu:.1f}%")
    parts.append(f"{record.peak_memory_bytes / 2**30:.2f} GiB")
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
