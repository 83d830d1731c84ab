"""The axes of a study: what changes from cell to cell, and patterns that name cells by it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config import legal, mixture
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.load import PATH_KEYS, TASKS, local_model, placed_files
from halfstep.launcher.config.schema import run_keys
from halfstep.launcher.errors import RequestError, nearest

Pattern = dict[str, tuple[str, ...]]
"""By axis, the labels of the values that match."""
_NO_AXIS = {
    "out": "the study gives every run a directory of its own",
    "seed": "seeds have a table of their own: [seeds] values = [0, 1]",
    "ds_config": "set single keys instead: ds.<key>",
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of an axis: how it is called, and the run keys it sets."""

    label: str
    keys: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What changes from cell to cell: a run key, or several that change together."""

    name: str
    values: tuple[Value, ...]


def label(value: Any) -> str:
    """Return a value as it is called in tables and folder names."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def word_of(key: str, value: Any) -> str:
    """Return a run key as a word of a command line."""
    if key.startswith("ds."):
        return f"{key}={json.dumps(value)}"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def axis(name: str, values: Any, where: object, base: Path | None = None) -> Axis:
    """Return the axis that a file gives a list of values; raises RequestError where it is none."""
    if not isinstance(values, list):
        raise RequestError(f"axis {name} is no list", where=f"[axes] in {where}", fix=f"{name} = [{values!r}, ...]")
    if not values:
        raise RequestError(
            f"axis {name} has no values", where=f"[axes] in {where}", fix="name at least one, or drop the axis"
        )
    checked = [
        value if isinstance(value, Value) else _value(name, value, where, base or Path.cwd()) for value in values
    ]
    labels = [value.label for value in checked]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise RequestError(f"axis {name} has {twice} twice", where=f"[axes] in {where}", fix="name every value once")
    return Axis(name=long_name(name), values=tuple(checked))


def _value(name: str, value: Any, where: object, base: Path) -> Value:
    if name == "data" and isinstance(value, list):
        return Value(label=mixture.text_of(value, str(where)), keys={name: absolute(name, value, base)})
    if not isinstance(value, dict):
        if not isinstance(value, str | int | float):
            raise RequestError(
                f"{value!r} is no value of axis {name}",
                where=f"[axes] in {where}",
                fix="a text, a number, true or false",
            )
        return Value(label=label(value), keys={long_name(name): absolute(long_name(name), value, base)})
    keys = {
        long_name(key): absolute(long_name(key), setting, base)
        for key, setting in flatten(value).items()
        if key != "name"
    }
    if not isinstance(value.get("name"), str) or not keys:
        raise RequestError(
            f"a value of axis {name} that sets several keys needs a name, and keys",
            where=f"[axes] in {where}",
            fix=f'{name} = [{{ name = "static", "fp16.scale" = 1024 }}, ...]',
        )
    if not value["name"].isprintable():
        raise RequestError(
            f"{value['name']!r} is no name", where=f"[axes] in {where}", fix="letters that can be printed"
        )
    return Value(label=value["name"], keys=keys)


def chosen(old: Axis, given: Any) -> Axis:
    """Return an axis with the values that a word of a command line names: its own by their labels, and new ones."""
    own = {value.label: value for value in old.values}
    named = [own.get(label, label) for label in _listed(old, given)]
    plain = all(list(value.keys) == [old.name] for value in old.values)
    unknown = next((choice for choice in named if isinstance(choice, str)), None)
    if unknown is not None and (not plain or not unknown):
        raise RequestError(
            f"axis {old.name} has no value {unknown!r}", where="the command line", fix=f"one of {', '.join(own)}"
        )
    return axis(
        old.name,
        [choice if isinstance(choice, Value) else literal(old.name, choice) for choice in named],
        "the command line",
    )


def _listed(old: Axis, given: Any) -> list[str]:
    """Return the values of an axis that a command line names: A,B, or a JSON list; a mixture is one value."""
    values = literal(old.name, given) if isinstance(given, str) and given.startswith("[") else given
    if isinstance(values, list):
        tables = any(isinstance(value, dict) for value in values)
        return [_text(old.name, value) for value in ([values] if tables else values)]
    if given in [value.label for value in old.values] or (old.name == "data" and mixture.parts(str(given))):
        return [given]
    return str(given).split(",")


def _text(name: str, value: Any) -> str:
    """Return an element of a JSON list as it is called; of data a list of tables is a mixture."""
    if name == "data" and isinstance(value, list):
        return mixture.text_of(value, "the command line")
    if not isinstance(value, str | int | float):
        raise RequestError(
            f"{json.dumps(value)} is no value of axis {name}",
            where="the command line",
            fix="a text, a number, true or false",
        )
    return label(value)


def literal(key: str, text: str) -> Any:
    """Return what a word of a command line says, typed as JSON has it."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_keys(base: Mapping[str, Any], axes: Mapping[str, Axis], file: object) -> None:
    """Raise RequestError where an axis is no run key, or is one of the base too."""
    known = run_keys()
    problems = []
    for name, axis in axes.items():
        for key in dict.fromkeys(key for value in axis.values for key in value.keys):
            where = f"[axes] in {file}"
            if key in _NO_AXIS:
                problems.append(RequestError(f"{key} is no axis", where=where, fix=_NO_AXIS[key]))
            elif key not in known and not key.startswith("ds."):
                close = nearest(key, known) or ["a run key of `halfstep plan --help`"]
                problems.append(
                    RequestError(f"axis {name}: {key!r} is no run key", where=where, fix=f"did you mean {close[0]}?")
                )
            elif key in base:
                fix = f"drop one of the two; on the command line {key}=A,B names an axis's values"
                problems.append(RequestError(f"{key} is an axis and a base key", where=str(file), fix=fix))
    owners: dict[str, str] = {}
    for name, axis in axes.items():
        for key in {key for value in axis.values for key in value.keys}:
            if owners.setdefault(key, name) != name:
                fix = "let one axis decide it"
                problems.append(RequestError(f"axes {owners[key]} and {name} both set {key}", where=str(file), fix=fix))
    if not axes:
        problems.append(
            RequestError("a study needs an axis", where=str(file), fix='[axes] precision = ["fp32", "bf16"]')
        )
    if problems:
        raise problems[0].with_more(problems[1:])


def patterns(given: list[dict[str, Any]], axes: Mapping[str, Axis], where: str) -> tuple[Pattern, ...]:
    """Return tables of a file that name cells by their values; raises RequestError for a key that is no axis."""
    names = list(axes)
    parsed = []
    for tree in given:
        pattern = {long_name(key): value for key, value in flatten(tree).items()}
        for key in pattern:
            if key not in names:
                close = nearest(key, names) or names
                raise RequestError(
                    f"{key!r} is no axis of this study", where=where, fix=f"its axes: {', '.join(close)}"
                )
        for key, value in pattern.items():
            has = [value.label for value in axes[key].values]
            for wanted in value if isinstance(value, list) else [value]:
                if label(wanted) not in has:
                    raise RequestError(
                        f"{key} has no value {label(wanted)}", where=where, fix=f"{key} has {', '.join(has)}"
                    )
        parsed.append(
            {
                key: tuple(label(item) for item in (value if isinstance(value, list) else [value]))
                for key, value in pattern.items()
            }
        )
    return tuple(parsed)


def long_name(key: str) -> str:
    """Return a run key without the short form that `model` has."""
    return "model.name" if key == "model" else key


def absolute(key: str, value: Any, folder: Path) -> Any:
    """Take a relative path from the folder of whoever wrote it."""
    where = "the study, or the command line"
    if key == "data" and (isinstance(value, list) or (isinstance(value, str) and value)):
        return mixture.placed(value, folder, where)
    if key == TASKS:
        return placed_files(value, folder, where)
    if isinstance(value, str) and value and key in PATH_KEYS:
        return legal.absolute(key, value, folder, where)
    if key == "model.name" and isinstance(value, str) and value.startswith(("hf:", "run:")):
        return local_model(value, folder, where)
    return value
