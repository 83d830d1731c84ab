"""What Halfstep says when it stops: three lines for a person and an exit code for a program."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

EXIT_REQUEST = 2
EXIT_REFUSED = 3
EXIT_STOPPED = 75
EXIT_NUMERICS = 76
EXIT_STALLED = 77

_LONGEST = 1000
"""Letters of an unforeseen exception's own text: some carry a stack of another language."""
_LONGEST_LINE = 4000
"""Letters of a line: what is wrong may be a word of a million."""
# Control characters (also the 8-bit ones, which terminals obey too), what breaks or turns a line around, and halves of
# characters, which no terminal takes.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class HalfstepError(Exception):
    """Stop with a sentence on what is wrong, where that came from, and what to do about it."""

    exit_code = EXIT_REQUEST
    heading = "error"

    def __init__(self, what: str, *, where: str, fix: str, reported: bool = False) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix
        self.reported = reported
        """Whether another rank reports it, so that this one need not."""
        self.more: tuple[HalfstepError, ...] = ()

    def with_more(self, others: Sequence["HalfstepError"]) -> Self:
        """Report other problems together with this one, so that a user fixes them all at once."""
        self.more = tuple(others)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Rank 0 sends its errors to the others, and an exception's own pickling knows no keyword arguments.
        return _rebuild, (type(self), self.what, self.where, self.fix, self.more)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON carries it from rank to rank."""
        more = [error.to_dict() for error in self.more]
        return {"kind": type(self).__name__, "what": self.what, "where": self.where, "fix": self.fix, "more": more}

    @staticmethod
    def from_dict(tree: dict[str, Any], *, reported: bool = False) -> "HalfstepError":
        """Rebuild an error that `to_dict` wrote; `reported` by the rank that wrote it."""
        kind = {kind.__name__: kind for kind in _kinds(HalfstepError)}[tree["kind"]]
        more = [HalfstepError.from_dict(error) for error in tree["more"]]
        return kind(tree["what"], where=tree["where"], fix=tree["fix"], reported=reported).with_more(more)

    def __str__(self) -> str:
        # Whatever a file, a path or another program put into them: three lines, and nothing that a terminal obeys.
        what, where, fix = (_cut(printable(text), _LONGEST_LINE) for text in (self.what, self.where, self.fix))
        return "\n".join([f"{self.heading}: {what}\n from: {where}\n  try: {fix}", *map(str, self.more)])


def _kinds(kind: type[HalfstepError]) -> list[type[HalfstepError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds(child))]


def _rebuild(
    kind: type[HalfstepError], what: str, where: str, fix: str, more: tuple[HalfstepError, ...]
) -> HalfstepError:
    return kind(what, where=where, fix=fix).with_more(more)


class RequestError(HalfstepError):
    """The request is wrong: exit code 2."""


class TopologyError(RequestError):
    """The ranks that were started are not the ranks that were planned: exit code 2."""


class RefusedError(HalfstepError):
    """The request is well formed but cannot work: exit code 3."""

    exit_code = EXIT_REFUSED


class OutOfDeviceMemory(RefusedError):
    """It does not fit into a device: exit code 3."""


class OutOfHostMemory(RefusedError):
    """It does not fit into the host's memory: exit code 3."""


class DiskFull(RefusedError):
    """No space is left to write to: exit code 3."""


class NumericsError(HalfstepError):
    """The run cannot make progress: exit code 76."""

    exit_code = EXIT_NUMERICS


class Stopped(HalfstepError):
    """Stopped early on request, with nothing lost: exit code 75, start the same command again."""

    exit_code = EXIT_STOPPED
    heading = "stopped"


class Stalled(HalfstepError):
    """A rank stopped moving: exit code 77."""

    exit_code = EXIT_STALLED


class Interrupted(HalfstepError):
    """Somebody pressed Ctrl-C: exit code 130, as a shell has it."""

    exit_code = 130


class Fault(HalfstepError):
    """Something went wrong that nobody foresaw: exit code 1."""

    exit_code = 1

    @classmethod
    def of(cls, error: BaseException, where: str) -> Self:
        """Wrap an unforeseen exception; `where` may be the log that has its traceback."""
        said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        kind, said = type(error).__name__, _cut(said, _LONGEST)
        return cls(f"{kind}: {said}" if said else kind, where=where, fix="--debug shows the traceback")


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Return the choices that `word` most likely stood for, best first, possibly none."""
    known = list(choices)
    folded = {choice.lower(): choice for choice in reversed(known)}
    matches = difflib.get_close_matches(word.lower(), folded, n=count, cutoff=0.6)
    score = {match: difflib.SequenceMatcher(None, match, word.lower()).ratio() for match in matches}
    # Far behind the best one, a match only shares a prefix (`optimizer.`) and would mislead.
    return [folded[match] for match in matches if score[match] > score[matches[0]] - 0.1]


def printable(text: str, keep: str = "") -> str:
    """Return text with every character that a terminal would obey written out, such as \\x1b; those in `keep` stay."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _written_out(match[0]), text)


def _written_out(letter: str) -> str:
    # JSON knows \\u009b and no \\x9b; what JSON itself escapes is written as people know it.
    return _SHORT.get(letter) or (f"\\x{ord(letter):02x}" if ord(letter) < 32 else f"\\u{ord(letter):04x}")
