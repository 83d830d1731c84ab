"""Call a public door with a damaged input, and judge: refused in three lines, or read for what it says, and soon."""

import contextlib
import faulthandler
import io
import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import mutate

from halfstep.launcher.cli.main import main
from halfstep.launcher.errors import HalfstepError

SECONDS = 10
"""A case that takes longer hangs; the slowest take a tenth of it."""
_MEMORY = 4 << 30
"""More than this, beside what the process has, nothing may ask for."""
_MANY = 100
"""Of so many cases some leave a file as good as it was, or change what may be changed."""
_LABELS = (("error", "stopped"), ("from",), ("try",))


class Hang(BaseException):
    """A case took too long."""


@dataclass(kw_only=True)
class Outcome:
    """What a door did with a case."""

    value: Any = None
    refused: HalfstepError | None = None
    bare: BaseException | None = None
    where: str = ""
    """Of a bare exception, the innermost line of ours."""


@dataclass(kw_only=True)
class Case:
    """One damaged input: what was done to which file, or the words or variables themselves."""

    what: str
    apply: Callable[[], None] = lambda: None
    undo: Callable[[], None] = lambda: None
    given: Any = None
    """For doors that take no file."""


@dataclass(kw_only=True)
class Reader:
    """A door, what it is given, and what has to come of it."""

    name: str
    read: Callable[[Case], Any]
    """Call the door; returns what it says the input means."""
    cases: Callable[[random.Random], Case]
    """Draw one damaged input."""
    judge: Callable[[Case, Any], str | None] = lambda case, value: None
    """Return why a value that was accepted is wrong, by another reading of the same input; None where it is right."""
    count: int = 300
    """Cases in the whole; in the smaller part there are `some`."""
    some: int = 14


def run(door: Callable[[], Any], seconds: float = SECONDS) -> Outcome:
    """Call a door, quietly, with an end to its time and its memory."""

    def alarm(number: int, frame: object) -> None:
        raise Hang(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, alarm)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)  # where even a signal does not get through
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _bounded(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return Outcome(value=door())
    except HalfstepError as error:
        return Outcome(refused=error)
    except (Exception, Hang) as error:
        return Outcome(bare=error, where=_innermost(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def command(arguments: list[str]) -> int:
    """Run a verb and return its exit code; what it says has to be well said, and what nobody foresaw is raised."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = main(arguments)
    except SystemExit as end:  # argparse
        return end.code if isinstance(end.code, int) else 1
    if code == 1:
        main([*arguments, "--debug"])
        raise AssertionError("it fails, and does not when it is asked why")
    errors = said.getvalue().rstrip("\n")
    if code in (2, 3) and errors.startswith("error:") and (wrong := _bad_words(errors)):
        raise AssertionError(wrong)
    return code


def _innermost(error: BaseException) -> str:
    ours = [item for item in traceback.extract_tb(error.__traceback__) if "/launcher/" in item.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"


def failures(reader: Reader, count: int, *, first: int = 0, seed: int = 0) -> list[str]:
    """Put `count` cases to a reader, from number `first` on, and return what went wrong, a line each."""
    seen, accepted = [], 0
    for number in range(first, first + count):
        draw = random.Random(f"{seed}/{reader.name}/{number}")
        case = reader.cases(draw)
        case.apply()
        try:
            outcome = run(lambda case=case: reader.read(case))
            accepted += outcome.refused is None
            wrong = _wrong(reader, case, outcome)
        finally:
            case.undo()
        if wrong:
            seen.append(f"{reader.name} #{number} [{case.what}]: {wrong}")
    if not accepted and count >= _MANY:
        seen.append(f"{reader.name}: all {count} cases were refused, so that nothing was tried but the refusal")
    return seen


def _wrong(reader: Reader, case: Case, outcome: Outcome) -> str | None:
    if outcome.bare is not None:
        text = str(outcome.bare).splitlines() or [""]
        return f"{type(outcome.bare).__name__}: {text[0][:160]} ({outcome.where})"
    if outcome.refused is not None:
        return _bad_words(str(outcome.refused))
    try:
        return reader.judge(case, outcome.value)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"accepted, and to another reader it means nothing ({type(error).__name__}: {str(error)[:100]})"


def _bad_words(text: str) -> str | None:
    """Return what is wrong with an error's own words: three lines each, none empty, nothing that a terminal obeys."""
    lines = text.split("\n")
    if len(lines) % 3:
        return f"{len(lines)} lines of words: {text[:200]!r}"
    for place, line in enumerate(lines):
        label, _, rest = line.partition(":")
        if label.strip() not in _LABELS[place % 3] or not rest.strip():
            return f"an odd line of words: {line[:200]!r}"
        if any(ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000 for letter in line):
            return f"control characters in words: {line[:200]!r}"
        if len(line) > 8000:
            return f"{len(line)} letters of words: {line[:100]!r}"
    return None


def same(item: Any, other: Any) -> bool:
    """Compare two trees; what the second has beside the first does not count, 1 and 1.0 are one number."""
    if isinstance(item, dict) and isinstance(other, dict):
        return all(key not in other or same(value, other[key]) for key, value in item.items())
    if isinstance(item, list) and isinstance(other, list):
        return len(item) == len(other) and all(map(same, item, other))
    return item == other and isinstance(item, bool) == isinstance(other, bool)


def file_cases(
    *files: tuple[Path, Callable[[bytes, random.Random], mutate.Mutation]], kinds: bool = True
) -> Callable[[random.Random], Case]:
    """Return what draws one of several files, and damages it or puts something else in its place."""
    good = {file: file.read_bytes() for file, _ in files}

    def cases(draw: random.Random) -> Case:
        file, way = draw.choice(files)

        def undo() -> None:
            mutate.remove(file)
            file.write_bytes(good[file])

        if kinds and draw.random() < 0.06:
            kind = draw.choice(mutate.KINDS)
            return Case(what=f"{file.name} is {kind}", apply=lambda: mutate.put_kind(file, kind), undo=undo, given=None)
        what, content = way(good[file], draw)
        return Case(
            what=f"{file.name}: {what}",
            apply=lambda: file.write_bytes(content) and None,
            undo=undo,
            given=(file, content),
        )

    return cases
