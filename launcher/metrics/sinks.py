"""Where records go: JSON lines that survive a crash, and a console for a terminal or a file."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halfstep.launcher.errors import printable
from halfstep.launcher.metrics.record import EvaluationRecord, StepRecord
from halfstep.launcher.system import clock, files


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

    def event(self, kind: str, **details: Any) -> None:
        """Append one event."""
        self.write({"event": kind, **details, "time": clock.now()})

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


class Screen:
    """What a person sees: a live bar and every step on a terminal, a plain line now and then in a file."""

    def __init__(self, steps: int, every: int, *, quiet: bool) -> None:
        self._steps, self._every, self._quiet = steps, every, quiet
        live = not quiet and sys.stdout is not None and sys.stdout.isatty()
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False, markup=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not live,
        )
        self._task = self._progress.add_task("", total=steps)
        self._live = live

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(printable(text, keep="\n"))

    def step(self, record: StepRecord) -> None:
        """Show one optimizer step."""
        text = _step_text(record)
        self._progress.update(self._task, completed=record.step, description=text)
        if not self._live and (record.step % self._every == 0 or record.step in (1, self._steps) or record.overflow):
            self.say(f"step {record.step:>6}/{self._steps}  {text}")

    def evaluation(self, record: EvaluationRecord) -> None:
        """Show one evaluation."""
        loss = "not finite" if record.eval_loss is None else f"{record.eval_loss:.4f}"
        perplexity = "-" if record.perplexity is None else f"{record.perplexity:,.1f}"
        self.say(f"eval {record.step:>6}/{self._steps}  validation loss {loss}  perplexity {perplexity}")


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
