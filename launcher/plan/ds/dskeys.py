"""Check a DeepSpeed configuration, key by key and at any depth, without importing DeepSpeed.

DeepSpeed silently ignores a key that it does not know (`gradient_cliping`), converts values of the wrong type ("2" is
2) and takes "auto" for "my default". The table of what it does know, `deepspeed_keys.json`, is read out of the
installed DeepSpeed by `python -m tools.dskeys_table --write`, and a test keeps it true.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from halfstep.launcher.config.dotted import unflatten
from halfstep.launcher.config.legal import shown
from halfstep.launcher.errors import RequestError, nearest
from halfstep.launcher.plan.ds import former_keys

Entry = dict[str, Any]
Origin = Callable[[str], str] | Mapping[str, str]
Finding = tuple[str, str, str]

_TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
DEEPSPEED_VERSION: str = _TABLE["deepspeed"]
KEYS: Mapping[str, Entry] = _TABLE["keys"]

_PARAMS: Mapping[str, Mapping[str, dict[str, Entry]]] = {
    "optimizer.params": _TABLE["optimizers"],
    "scheduler.params": _TABLE["schedulers"],
}
_ANY: Entry = {"type": "any", "default": None}
_PHRASES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "open": "a table",
    "section": "a section with keys of its own",
    "any": "a value that JSON has",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with one key."""

    path: str
    """Dotted path of the key, such as `zero_optimization.overlap_comm`."""
    sentence: str
    """What is wrong, to be read after the path and a colon."""
    suggestion: str
    """What to do about it."""
    where: str
    """Where the key came from."""


def problems(config: Mapping[str, Any], origin: Origin = MappingProxyType({})) -> list[Problem]:
    """Return everything that DeepSpeed would ignore, convert or refuse in `config`, in the order of its keys.

    `origin` says where a dotted path came from: a function, or a mapping from paths (or from sections) to a phrase.
    """
    broken = _walk(config, "", _members("", config), config)
    return [
        Problem(path=path, sentence=sentence, suggestion=suggestion, where=_whence(origin, path))
        for path, sentence, suggestion in broken
    ]


def entry(path: str, config: Mapping[str, Any]) -> Entry:
    """Return what is known of a key; of a parameter, in the optimizer or scheduler that the configuration chooses."""
    section, _, name = path.rpartition(".")
    if section in _PARAMS:
        return (_members(section, config) or {}).get(name, {})
    return KEYS.get(path, {})


def parameters(optimizer: object) -> Mapping[str, Entry] | None:
    """Return the parameters of an optimizer by its type, None where they are not known."""
    return _PARAMS["optimizer.params"].get(str(optimizer).lower())


def require(leaves: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raise RequestError with everything that is wrong with a configuration, given by dotted path."""
    try:
        config = unflatten(dict(leaves))
    except KeyError as error:
        key = str(error.args[0])
        raise RequestError(
            f"{key} is given both as a value and as a section",
            where=origins.get(key, "the DeepSpeed config"),
            fix="keep one of the two",
        ) from None
    errors = [
        RequestError(f"{problem.path}: {problem.sentence}", where=problem.where, fix=problem.suggestion)
        for problem in problems(config, origins)
    ]
    if errors:
        raise errors[0].with_more(errors[1:])


def _walk(
    block: Mapping[str, Any], path: str, members: Mapping[str, Entry] | None, config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check the keys of one section; `members` None means that any key may stand there."""
    for name, value in block.items():
        here = f"{path}.{name}" if path else name
        entry = _ANY if members is None else members.get(name)
        if here in _TABLE["removed"]:
            yield _removed(here)
        elif entry is None:
            yield _unknown(here, name, members or {})
        else:
            other = str(entry.get("same_as", ""))
            if other and other.rpartition(".")[2] in block:
                yield here, f"it and {other} are two spellings of one setting", f"keep {other} only"
            yield from _check(here, value, entry, config)


def _check(path: str, value: Any, entry: Entry, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check one value against its entry, and what lies below it."""
    kind = entry["type"]
    if entry.get("deprecated"):
        fix = f"use {entry['successor']} instead" if value not in (False, None) else f"remove {path}"
        yield path, f"it is deprecated in DeepSpeed {DEEPSPEED_VERSION}", fix
    if value == "auto":
        yield _auto(path)
    elif kind == "object":
        yield path, "it takes a Python object, which no file or command line can hold", f"remove {path}"
    elif value is None and entry["default"] is None:
        return
    elif kind in ("section", "open") and isinstance(value, Mapping):
        here = entry.get("same_as", path)
        yield from _walk(value, path, _members(here, config), config)
    elif kind == "enum":
        yield from _check_choice(path, value, entry)
    elif not any(_fits(value, word, entry) for word in kind.split("|")):
        yield _mistyped(path, value, entry)
    elif isinstance(value, list):
        yield from _check_list(path, value, entry)
    elif isinstance(value, Mapping):
        yield from _walk(value, path, None, config)
    elif isinstance(value, int | float):
        yield from _check_range(path, value, entry)


def _check_choice(path: str, value: Any, entry: Entry) -> Iterator[Finding]:
    former = former_keys.FORMER_OPTIMIZERS.get(str(value).lower()) if path == "optimizer.type" else None
    if former:
        yield path, f"DeepSpeed {DEEPSPEED_VERSION} has {value} no longer", f"use {former}, which compresses nothing"
        return
    exact = any(type(value) is type(choice) and value == choice for choice in entry.get("values", ()))
    if exact or (isinstance(value, str) and value.lower() in entry.get("any_case", ())):
        return
    choices = [str(choice) for choice in (*entry.get("any_case", ()), *entry.get("values", ())) if choice != "auto"]
    close = [] if len(choices) < 8 else [name for name in nearest(str(value), choices) if _alike(str(value), name)]
    yield path, f"{_shown(value)} is none of its values", f"use {_either(close or choices)}"


def _check_list(path: str, value: list[Any], entry: Entry) -> Iterator[Finding]:
    for index, item in enumerate(value):
        yield from _check(f"{path}[{index}]", item, _ANY, {})
        if item != "auto" and item not in entry.get("items", value):
            yield path, f"{_shown(item)} is none of its values", f"use {_either(entry['items'])}"


def _check_range(path: str, value: float, entry: Entry) -> Iterator[Finding]:
    limits = {
        "minimum": (value >= entry.get("minimum", value), "at least"),
        "above": (value > entry.get("above", -math.inf), "more than"),
        "maximum": (value <= entry.get("maximum", value), "at most"),
        "below": (value < entry.get("below", math.inf), "less than"),
    }
    for word, (holds, phrase) in limits.items():
        if word in entry and not holds:
            yield path, f"{value} is out of its range", f"use a number that is {phrase} {entry[word]}"


def _fits(value: Any, word: str, entry: Entry) -> bool:
    """Say whether a value is of a type as it stands, without DeepSpeed's conversions."""
    if word == "bool" or isinstance(value, bool):
        return word in ("bool", "any") and (word == "any" or isinstance(value, bool))
    if word == "int" and isinstance(value, float):  # 5e8 is how DeepSpeed's own documents write a bucket size
        return value.is_integer() and not entry.get("exact")
    types = {"int": int, "float": int | float, "str": str, "list": list, "any": object}
    return isinstance(value, types.get(word, ())) and not (isinstance(value, float) and not math.isfinite(value))


def _mistyped(path: str, value: Any, entry: Entry) -> Finding:
    kind = entry["type"]
    wanted = " or ".join(_PHRASES[word] for word in kind.split("|"))
    fix = f"give {path} {wanted}"
    meant = _typed(value, entry) if isinstance(value, str) else value
    if meant is not value and any(_fits(meant, word, entry) for word in kind.split("|")):
        fix = f"write {shown(json.dumps(meant))} without quotes"
    elif isinstance(value, float) and value.is_integer() and kind == "int":
        fix = f"write {int(value)}"
    elif kind == "bool" and value in (0, 1):
        fix = f"write {'true' if value else 'false'}"
    return path, f"it takes {wanted}, not {_shown(value)}", fix


def _unknown(path: str, name: str, siblings: Mapping[str, Entry]) -> Finding:
    """Name the right key: the same name in another section, then a similar one here, then a similar one anywhere."""
    if known := former_keys.fix(path):
        return path, f"DeepSpeed {DEEPSPEED_VERSION} has no such key", known
    parent = path.rpartition(".")[0]
    # A key is not a misspelling of the section that it stands in.
    everywhere = [key for key in KEYS if key != parent]
    everywhere += [f"optimizer.params.{param}" for param in _TABLE["optimizers"]["adamw"]]
    elsewhere = [
        other for other in everywhere if other.rpartition(".")[2] == name and "same_as" not in KEYS.get(other, ())
    ]
    close = [f"{parent}.{other}" if parent else other for other in nearest(name, siblings)]
    leaves = {other.rpartition(".")[2]: other for other in sorted(everywhere, reverse=True)}
    guesses = (elsewhere if len(elsewhere) <= 3 else []) + close or [
        leaves[leaf] for leaf in nearest(name, leaves) if _alike(name, leaf)
    ]
    fix = f"did you mean {_either(guesses[:3])}?" if guesses else f"remove {path}"
    return path, f"DeepSpeed {DEEPSPEED_VERSION} has no such key", fix


def _removed(path: str) -> Finding:
    return path, f"DeepSpeed {DEEPSPEED_VERSION} refuses it: {_TABLE['removed'][path]}", former_keys.instead(path)


def _auto(path: str) -> Finding:
    sentence = '"auto" is for another program to fill in; DeepSpeed would take its own default or fail'
    return path, sentence, f"write the value you want, or remove {path}"


def _members(path: str, config: Mapping[str, Any]) -> Mapping[str, Entry] | None:
    """Return the keys that may stand under `path`, or None where any may."""
    if path in _PARAMS:
        section = config.get(path.partition(".")[0])
        chosen = section.get("type") if isinstance(section, Mapping) else None
        return _PARAMS[path].get(str(chosen).lower())
    if path and KEYS[path]["type"] == "open":
        return None
    prefix = f"{path}." if path else ""
    return {
        key[len(prefix) :]: entry
        for key, entry in KEYS.items()
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    }


def _typed(text: str, entry: Entry) -> Any:
    """Read a text as the first of the entry's types that it fits; as itself where it fits none."""
    kind = entry["type"]
    if text == "null":
        return None
    if kind == "enum":
        return next((choice for choice in entry.get("values", ()) if str(choice) == text), text)
    for word in kind.split("|"):
        if word == "str":
            return text
        if word == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if word == "int" and text.lstrip("+-").isdecimal():
            return int(text)
        try:
            value = float(text) if word in ("int", "float") else json.loads(text)
        except ValueError:
            continue
        if word == "int":
            return int(value) if value.is_integer() else value
        if word in ("float", "any") or isinstance(value, list if word == "list" else dict):
            return value
    return text


def _whence(origin: Origin, path: str) -> str:
    if not isinstance(origin, Mapping):
        return origin(path)
    key = path.partition("[")[0]
    while key and key not in origin:
        key = key.rpartition(".")[0]
    below = (phrase for other, phrase in origin.items() if other.startswith(f"{path}."))
    return origin[key] if key else next(below, "the DeepSpeed configuration")


def _alike(word: str, other: str) -> bool:
    """Tell whether one was meant for the other: OneBitAdam is no misspelt NAdam."""
    return difflib.SequenceMatcher(None, word.lower(), other.lower()).ratio() > 0.75


def _shown(value: Any) -> str:
    return f"the text {json.dumps(shown(value))}" if isinstance(value, str) else shown(json.dumps(value, default=str))


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
