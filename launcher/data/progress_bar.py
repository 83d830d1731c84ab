"""Say how far a long preparation is: a bar on a terminal, a line now and then in a file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LINE_EVERY_SECONDS = 10.0

Report = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes of text done, and the bytes in all where they are known."""


@contextlib.contextmanager
def reporter(progress: bool | Report) -> Iterator[Report]:
    """Give a function to report to: the caller's own, one that writes to stderr (True), or a silent one (False)."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _Lines()


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


class _Lines:
    """Says nothing at all about a preparation that is over before there is anything to wait for."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _LINE_EVERY_SECONDS

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LINE_EVERY_SECONDS
        share = f" of {total / 1e6:.1f}" if total else ""
        amount = f": {done / 1e6:.1f}{share} MB of text" if done else ""
        print(f"{stage}{amount}", file=sys.stderr, flush=True)
