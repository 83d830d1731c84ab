"""What no value of a request may be, whoever wrote it: a secret, a number that is none, a control character, a maze."""

import math
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError

DEEPEST = 32
"""Levels of nesting; the deepest key of DeepSpeed has five."""
LARGEST_NUMBER = 2**63 - 1
"""What a whole number of any program that a request reaches may be."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes, on every file system of Linux."""
_LONGEST_KEY = 250
"""Characters of a dotted path, its sections included."""
_SHOWN = 80
"""Characters of a value that an error repeats."""

_SECRET = re.compile(r"(^|[._-])(key|apikey|token|password|passwd|passphrase|secret|credentials?|auth)$", re.IGNORECASE)
_NO_SECRETS = ("comet.experiment_key",)
"""Names that end like a secret's and are none."""
_HOLDS_SECRET = (
    re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]*@", re.IGNORECASE),
    re.compile(r"https?://[^/\s@]+@", re.IGNORECASE),
    re.compile(r"[?&#](\w*token|\w*key|password|secret|sig|x-amz-signature)=", re.IGNORECASE),
    re.compile(r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-ant-|sk-proj-|xox[abp]-)[A-Za-z0-9_-]{24,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
)
_VARIABLES = {"comet": "COMET_API_KEY", "wandb": "WANDB_API_KEY", "hf": "HF_TOKEN", "huggingface": "HF_TOKEN"}


def check(key: str, value: Any, origin: str, *, typed: bool, stored: bool = False) -> None:
    """Raise RequestError where a key or a value, or anything within it, cannot stand in a request.

    `typed`: a schema looks at the value later, and says more of its type. `stored`: what is secret lies there already.

    What a request holds is written into the run directory and every checkpoint, and shown: a secret is refused, and
    never repeated in the error.
    """
    _refuse_unprintable(key, "a key", origin)
    for path, leaf in leaves(key, value, origin, key.count(".")):
        if not stored:
            _refuse_secret(path, leaf, origin)
        if isinstance(leaf, str):
            _refuse_unprintable(leaf, path, origin)
        elif isinstance(leaf, float) and not math.isfinite(leaf) and not typed:
            raise RequestError(f"{path} is {leaf}, not a finite number", where=origin, fix="give a finite number")
        elif isinstance(leaf, int) and abs(leaf) > LARGEST_NUMBER:
            raise RequestError(
                f"{path} is a whole number of {leaf.bit_length()} bits",
                where=origin,
                fix=f"give at most {LARGEST_NUMBER}",
            )
        elif not typed and not isinstance(leaf, bool | int | float | None):
            raise RequestError(
                f"{path} is a {type(leaf).__name__}, which JSON does not have",
                where=origin,
                fix="give a number, a text, true or false, a list or a table",
            )


def leaves(path: str, value: Any, origin: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Return what lies within nested tables and lists, each by its path; an empty table has none.

    Raises RequestError beyond `DEEPEST` levels, and for a key that cannot be shown.
    """
    if len(path) > _LONGEST_KEY:
        raise RequestError(
            f"the key {shown(path)} has more than {_LONGEST_KEY} characters",
            where=origin,
            fix="check how it is written",
        )
    if depth > DEEPEST:
        raise RequestError(
            f"{shown(path)} is nested more than {DEEPEST} levels deep", where=origin, fix="check how it is nested"
        )
    if isinstance(value, dict):
        for name, leaf in value.items():
            _refuse_unprintable(name, f"a key of {path or 'the file'}", origin)
            yield from leaves(f"{path}.{name}" if path else name, leaf, origin, depth + 1)
    elif isinstance(value, list):
        for number, leaf in enumerate(value):
            yield from leaves(f"{path}[{number}]", leaf, origin, depth + 1)
    else:
        yield path, value


def absolute(key: str, value: str, base: Path, origin: str) -> str:
    """Return a path as it is from anywhere: taken from `base`, and `~` from who that is.

    Raises RequestError for a home that is not known, and for names longer than a file system takes.
    """
    try:
        path = os.path.abspath(base / Path(value).expanduser())
    except RuntimeError:
        user = Path(value).parts[0][1:]
        whose = f"a user {user!r}" if user else "this user"
        raise RequestError(
            f"{key}={shown(value)}: the home folder of {whose} is not known", where=origin, fix="write the path in full"
        ) from None
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        size, most = (longest, _LONGEST_NAME) if longest > _LONGEST_NAME else (len(os.fsencode(path)), _LONGEST_PATH)
        kind = "name" if longest > _LONGEST_NAME else "path"
        raise RequestError(
            f"{key}={shown(value)}: a {kind} of {size} bytes is longer than a file system takes ({most})",
            where=origin,
            fix=f"choose a shorter {kind}",
        )
    return path


def shown(value: object) -> str:
    """Return a value as an error repeats it: its first characters."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refuse_secret(path: str, value: Any, origin: str) -> None:
    key = re.sub(r"\[\d+\]", "", path).removeprefix("ds.")
    is_value = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
    if is_value and key not in _NO_SECRETS and any(_SECRET.search(part) for part in key.split(".")):
        tool = key.partition(".")[0].partition("_")[0].lower()
        variable = _VARIABLES.get(tool, "that its tool reads")
        raise RequestError(
            f"{path} is a secret, and a request is written into the run directory and every checkpoint",
            where=origin,
            fix=f"leave it out, and set the environment variable {variable}",
        )
    if isinstance(value, str) and any(pattern.search(value) for pattern in _HOLDS_SECRET):
        raise RequestError(
            f"{path} holds a password or a token, and a request is written into the run directory and every checkpoint",
            where=origin,
            fix="take it out; tools read theirs from the environment (HF_TOKEN, AWS_ACCESS_KEY_ID, ...)",
        )


def _refuse_unprintable(text: str, what: str, origin: str) -> None:
    """Refuse what a terminal or a script would act upon, and what no file can hold (a lone surrogate)."""
    odd = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")), None)
    if odd is not None:
        raise RequestError(
            f"{what} holds the character U+{ord(odd):04X}: {shown(text)!r}",
            where=origin,
            fix="take it out: no key, name or path of a request may have control characters or broken UTF-8",
        )
