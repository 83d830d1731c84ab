"""Read a run directory: the one reader for whoever reports on a run, resumes it or looks at it while it is going.

What others may have changed is checked before it is believed, and Damaged says which file, or which line of it, is not
what was written. A line that is still being written, or that a killed attempt left half done, is passed over; so are
keys that a newer Halfstep added, and keys that an older one did not know have their defaults.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from halfstep.launcher.config.load import Request, load
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan, run_id_of
from halfstep.launcher.rundir import exits, layout, metric_rows, records, run_events
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.launcher.rundir.records import Damaged, damaged, unreadable
from halfstep.launcher.rundir.trust import beyond_request
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import reason

_Parsed = TypeVar("_Parsed")
_CHANGED_FIX = "start the run again with its key=value words, which write it again"


class Attempt:
    """One start of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def number(self) -> int:
        """Counted from 1."""
        return int(self.folder.name)

    @cached_property
    def environment(self) -> records.Environment | None:
        """On what it ran; None where nobody wrote it. Raises Damaged."""
        return records.read(self.folder / "env.json", records.Environment)

    @cached_property
    def exit(self) -> exits.Exit | None:
        """How it ended; None where nobody has written it so far. Raises Damaged."""
        return _exit(self.folder / exits.EXIT)


class Run:
    """A run directory as it is at the moment when its files are first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # what was asked and decided

    @cached_property
    def request(self) -> Request:
        """What was asked. Raises RequestError where there is nothing, and Damaged."""
        with self._of_a_run():
            origins = foreign.read_object(self.path / "origins.json")["request"]
            return Request(spec=load([str(self.path / "request.toml")], stored=True).spec, origins=dict(origins))

    @cached_property
    def plan(self) -> Plan:
        """What was decided. Raises RequestError where there is nothing, and Damaged."""
        with self._of_a_run():
            tree = foreign.read_object(self.path / "plan.json")
            plan, run_id = Plan.from_dict(tree), run_id_of(tree)
        if run_id != plan.run_id:
            raise self._changed("plan.json was changed after it was written: its run id does not fit")
        return plan

    def require_as_asked(self) -> tuple[Request, Plan]:
        """Return request and plan, for whoever runs them; raises RequestError where the plan does what nobody asked."""
        request, plan = self.request, self.plan
        if beyond := beyond_request(request.spec, plan):
            raise self._changed(f"plan.json does what request.toml does not ask for: {beyond}")
        return request, plan

    @cached_property
    def planned(self) -> records.Planned | None:
        """What is shown of the plan, quicker to read than the whole; None where there is none. Raises Damaged."""
        return records.read(self.path / "plan.json", records.Planned)

    # what was seen

    def steps(self) -> list[StepRecord]:
        """Return the optimizer steps that stand; raises Damaged."""
        return [row for row in self._metrics if isinstance(row, StepRecord)]

    def evaluations(self) -> list[EvaluationRecord]:
        """Return the evaluations that stand; raises Damaged."""
        return [row for row in self._metrics if isinstance(row, EvaluationRecord)]

    @cached_property
    def _metrics(self) -> list[StepRecord | EvaluationRecord]:
        return _parse(self.path / "metrics.jsonl", metric_rows.of_row)

    def events(self) -> list[run_events.Event]:
        """Return the events that stand: a start drops those of steps that it makes again. Raises Damaged."""
        return _parse(self.path / "events.jsonl", run_events.of_line)

    @cached_property
    def reached(self) -> records.Reached | None:
        """How far the run is, from the end of its metrics; None where it has made no step. Raises Damaged."""
        return records.reached(self.path / "metrics.jsonl")

    @cached_property
    def summary(self) -> records.Summary | None:
        """The result so far; None where there is none. Raises Damaged."""
        return records.read(self.path / "summary.json", records.Summary)

    @property
    def finished(self) -> records.Summary | None:
        """The summary of a run that is done, else None."""
        with contextlib.suppress(Damaged):
            return self.summary if self.summary is not None and self.summary.status == "done" else None
        return None

    # how it went

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Every start, oldest first."""
        return [Attempt(folder) for folder in layout.attempts(self.path)]

    @property
    def exit(self) -> exits.Exit | None:
        """How the last attempt ended; None where nobody has written it so far. Raises Damaged."""
        return self.attempts[-1].exit if self.attempts else None

    @property
    def newest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return layout.newest_checkpoint(self.path)

    @cached_property
    def proof(self) -> records.Proof | None:
        """What the parity gate said of its cell; None where it was not asked. Raises Damaged."""
        return records.read(self.path / "proof.json", records.Proof)

    def ending(self, name: str) -> exits.Exit | None:
        """Return what another record of an end says, like refused.json; None where there is none. Raises Damaged."""
        return _exit(self.path / name)

    def _changed(self, what: str) -> Damaged:
        return Damaged(what, where=f"run directory {self.path}", fix=_CHANGED_FIX)

    @contextlib.contextmanager
    def _of_a_run(self) -> Iterator[None]:
        """Say that this is no run directory where a file is missing, and that one is damaged where it is no record."""
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"{self.path} is not a run directory: {Path(str(error.filename)).name} cannot be read: {reason(error)}",
                where=f"--run {self.path}",
                fix="name a directory made by `halfstep run` or `launcher/train.py`",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._changed(f"plan.json or origins.json is damaged: {_first_sentence(error)}") from None


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield every object of a file of lines, whichever attempt wrote it; what cannot be read is passed over."""
    with contextlib.suppress(OSError):
        for line in foreign.lines(file):
            with contextlib.suppress(ValueError):
                row = foreign.loads(_from_start(line)[0])
                if isinstance(row, dict):
                    yield row


def record(file: Path) -> dict[str, Any]:
    """Return the object in a file, empty where it cannot be read: for whoever counts what can be counted."""
    try:
        return foreign.read_object(file)
    except (OSError, ValueError):
        return {}


def _exit(file: Path) -> exits.Exit | None:
    try:
        return exits.read(file)
    except OSError as error:
        raise unreadable(file, error) from None
    except ValueError as error:
        raise damaged(file, str(error)) from None


def _first_sentence(error: Exception) -> str:
    """Return an error's first sentence; a missing key is all that a KeyError says."""
    text = str(error).strip()
    if isinstance(error, KeyError):
        return f"it has no {text}"
    return " ".join(text.split())[:200] or type(error).__name__


def _parse(file: Path, convert: Callable[[dict[str, Any]], _Parsed]) -> list[_Parsed]:
    """Return the rows that stand, each converted; nothing where there is no file. Raises Damaged for the others.

    A start resumes after the steps it names (`steps_done`, else none): what came before about later steps, or about no
    step, is of a series that is gone. `convert` raises ValueError for a row that is none.
    """
    standing: list[tuple[int, bytes, dict[str, Any] | None]] = []
    for number, line, is_start in _lines(file):
        try:
            row = foreign.loads(line)
        except ValueError:
            row = None
        if is_start:
            done = _steps_done(file, number, row)
            standing = [entry for entry in standing if entry[2] is not None and 0 < _step(entry[2]) <= done]
        standing.append((number, line, row))
    parsed = []
    for number, line, row in standing:
        try:
            tree = foreign.loads(line) if row is None else row
            if not isinstance(tree, dict):
                raise ValueError("it is no object")
            parsed.append(convert(tree))
        except ValueError as error:
            raise damaged(file, str(error), number) from None
    return parsed


def _steps_done(file: Path, number: int, row: Any) -> int:
    done = row.get("steps_done", 0) if isinstance(row, dict) else 0
    if not isinstance(done, int) or isinstance(done, bool) or done < 0:
        raise damaged(file, f"steps_done = {done!r} is no number of steps", number)
    return done


def _step(row: dict[str, Any]) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else 0


def _lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (line number, line, whether it is an attempt's start); not a last line that is still being written."""
    try:
        for number, content in enumerate(foreign.lines(file), 1):
            line = content.removesuffix(b"\n")
            if line == content:
                try:
                    foreign.loads(line)
                except ValueError:
                    return
            yield number, *_from_start(line)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise unreadable(file, error) from None


def _from_start(line: bytes) -> tuple[bytes, bool]:
    """Return a line and whether it is an attempt's start, which may stand behind half a line of one that was killed."""
    start = re.search(rb'\{"event": ?"start"', line)
    return line[start.start() :] if start else line, start is not None
