"""The study file: which runs are compared, over which axes and seeds, and with what."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.text_file import read_toml
from halfstep.launcher.errors import RequestError, nearest
from halfstep.launcher.study.axes import Axis, Pattern, absolute, axis, check_keys, chosen, literal, long_name, patterns

READY = Path(__file__).parent / "ready"
"""The studies that ship with Halfstep."""
_TABLES = ("base", "axes", "seeds", "compare", "limits", "prepare", "exclude", "only")
_COMPARE = ("reference", "within", "price", "currency")
_LIMITS = ("seconds",)
_PREPARE = ("makes", "run")
_LIKE = {
    "exclude": "exclude = [{ zero = 0 }, ...]",
    "only": "only = [{ zero = 0 }, ...]",
    "prepare": '[[prepare]] makes = "data/x", run = "data prepare --source x.txt --out data/x"',
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something that has to be there before the first cell runs."""

    makes: str
    """A file or folder; where it is there, the step is done."""
    run: tuple[str, ...]
    """Words of the `halfstep` command that makes it, in the folder in which the study was started."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as it was asked for."""

    name: str
    source: str
    """Its file."""
    base: dict[str, Any]
    """Run keys of every cell."""
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    reference: dict[str, str]
    """By axis, the value's label."""
    within: str | None
    """An axis whose values are not compared with each other: of each value, the reference cell with that value."""
    prepare: tuple[Step, ...]
    """What is made before the cells, in this order."""
    exclude: tuple[Pattern, ...]
    """Cells that match one of these are left out."""
    only: tuple[Pattern, ...]
    """If there are any, cells have to match one."""
    price: float | None
    """Of a device for an hour."""
    currency: str
    limit: float
    """Seconds that a cell may take, here; 0 = no limit."""
    overrides: tuple[str, ...]
    """What the command line said beside the file."""


def ready() -> list[str]:
    """Return the names of the studies that ship with Halfstep."""
    return sorted(file.stem for file in READY.glob("*.toml"))


def read(name: str, overrides: Sequence[str] = ()) -> Study:
    """Read a study by the name of a ready one or by its file; `overrides` replace keys of [base], or an axis's values.

    Raises RequestError, three lines, for whatever is wrong with it.
    """
    file = _file(name)
    tree = read_toml(file, "the study file", "the command line")
    unknown = [key for key in tree if key not in _TABLES]
    if unknown:
        close = nearest(unknown[0], _TABLES) or list(_TABLES)
        raise RequestError(
            f"a study has no [{unknown[0]}]", where=str(file), fix=f"did you mean [{'] or ['.join(close)}]?"
        )
    for key in ("exclude", "only", "prepare"):
        if not isinstance(tree.get(key, []), list) or not all(isinstance(table, dict) for table in tree.get(key, [])):
            raise RequestError(f"{key} is no list of tables", where=str(file), fix=_LIKE[key])
    base = {long_name(key): value for key, value in flatten(_table(tree, "base", file)).items()}
    # What a study that ships names is made where it is started.
    home = Path.cwd() if file.parent == READY else file.absolute().parent
    base = {key: absolute(key, value, home) for key, value in base.items()}
    given = flatten(_table(tree, "axes", file))
    axes = {long_name(name): axis(name, values, file, home) for name, values in given.items()}
    seeds_table = _table(tree, "seeds", file)
    _only_these(seeds_table, ("values",), "seeds", file)
    seeds = seeds_table.get("values", [0])
    for word in overrides:
        key, value = _word(word)
        if key == "out":
            raise RequestError(
                "out names the directory of one run, and a study has many",
                where=f"{word} on the command line",
                fix=f"--out {shlex.quote(str(value))}, for the study's folder",
            )
        if key == "seed":
            seeds = [_number(number) for number in str(value).split(",")]
        elif key in axes:
            axes[key] = chosen(axes[key], value)
        else:
            base[key] = absolute(key, value, Path.cwd())
    _check_base(base, file)
    check_keys(base, axes, file)
    compare, limits = _table(tree, "compare", file), _table(tree, "limits", file)
    _only_these(compare, _COMPARE, "compare", file)
    _only_these(limits, _LIMITS, "limits", file)
    return Study(
        name=file.stem,
        source=str(file.absolute()),
        base=base,
        axes=tuple(axes.values()),
        seeds=_seeds(seeds, file),
        reference=_reference(compare, axes, file),
        within=_within(compare.get("within"), axes, file),
        prepare=tuple(_step(table, home, file) for table in tree.get("prepare", [])),
        exclude=patterns(tree.get("exclude", []), axes, f"exclude in {file}"),
        only=patterns(tree.get("only", []), axes, f"only in {file}"),
        price=price(compare.get("price"), f"compare.price in {file}"),
        currency=str(compare.get("currency", "USD")),
        limit=_limit(limits.get("seconds", 0), file),
        overrides=tuple(overrides),
    )


def price(given: Any, where: str) -> float | None:
    """Return a price per device-hour; raises RequestError for what is none."""
    if given is None:
        return None
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(given, bool) or not 0 <= number < float("inf"):
        raise RequestError(f"{given!r} is no price", where=where, fix="a number: of one device for one hour")
    return number


def _file(name: str) -> Path:
    shipped = READY / f"{name}.toml"
    if shipped.is_file():
        return shipped
    file = Path(name)
    if file.suffix == ".toml" and file.is_file():
        return file
    close = nearest(name, ready()) or ready()
    what = f"the study file {name} does not exist" if file.suffix == ".toml" else f"there is no study {name!r}"
    raise RequestError(what, where="the command line", fix=f"name a file, or one of {', '.join(close)}")


def _table(tree: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    table = tree.get(name, {})
    if not isinstance(table, dict):
        raise RequestError(f"{name} is a table, not a value", where=str(file), fix=f"write [{name}] above its keys")
    return table


def _only_these(table: dict[str, Any], known: Sequence[str], name: str, file: Path) -> None:
    for key in table:
        if key not in known:
            close = nearest(key, known) or list(known)
            raise RequestError(f"[{name}] has no {key!r}", where=str(file), fix=f"did you mean {' or '.join(close)}?")


def _word(word: str) -> tuple[str, Any]:
    key, given, text = word.partition("=")
    if not given or not key or word.startswith("-"):
        raise RequestError(f"{word!r} is no key=value", where="the command line", fix="write model=gpt2-124m, say")
    return long_name(key), literal(key, text) if key.startswith("ds.") else text


def _check_base(base: dict[str, Any], file: Path) -> None:
    for key, fix in (
        ("seed", "[seeds] values = [0, 1]"),
        ("out", "--out DIR says where the study goes; every run has a directory of its own in it"),
    ):
        if key in base:
            raise RequestError(f"{key} is no base key of a study", where=f"[base] in {file}, or a word", fix=fix)


def _seeds(given: Any, file: Path) -> tuple[int, ...]:
    whole = isinstance(given, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in given)
    if not whole or not given or min(given) < 0 or len(set(given)) < len(given):
        raise RequestError(
            f"seeds are different whole numbers from 0, not {given!r}", where=str(file), fix="[seeds] values = [0, 1]"
        )
    return tuple(given)


def _number(text: str) -> Any:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else text


def _reference(compare: dict[str, Any], axes: dict[str, Axis], file: Path) -> dict[str, str]:
    """Return the reference cell; where the file names none, the first value of every axis."""
    given = compare.get("reference", {})
    if not isinstance(given, dict):
        raise RequestError(
            "a reference names its value on the axes",
            where=f"[compare] in {file}",
            fix='reference = { zero = 1, precision = "fp32" }',
        )
    (pattern,) = patterns([given], axes, f"compare.reference in {file}")
    reference = {}
    for name, there in axes.items():
        labels = pattern.get(name, (there.values[0].label,))
        if len(labels) != 1:
            raise RequestError(
                f"the reference has {len(labels)} values of {name}",
                where=f"compare.reference in {file}",
                fix=f"reference = {{ {name} = {there.values[0].label} }}",
            )
        value = labels[0]
        if value not in [allowed.label for allowed in there.values]:
            has = ", ".join(allowed.label for allowed in there.values)
            raise RequestError(
                f"the reference {name}={value} is not in the grid",
                where=f"compare.reference in {file}",
                fix=f"{name} has {has}",
            )
        reference[name] = value
    return reference


def _within(given: Any, axes: dict[str, Axis], file: Path) -> str | None:
    if given is None:
        return None
    name = long_name(str(given))
    if name not in axes:
        raise RequestError(
            f"{given!r} is no axis of this study",
            where=f"compare.within in {file}",
            fix=f"its axes: {', '.join(axes)}",
        )
    return name


def _step(table: dict[str, Any], home: Path, file: Path) -> Step:
    _only_these(table, _PREPARE, "[prepare]", file)
    makes, run = (table.get(key) for key in _PREPARE)
    if not isinstance(makes, str) or not isinstance(run, str) or not makes or not run.strip():
        raise RequestError("a step of [[prepare]] needs makes and run", where=str(file), fix=_LIKE["prepare"])
    try:
        return Step(makes=str(home / makes), run=tuple(shlex.split(run)))
    except ValueError as error:
        raise RequestError(f"run = {run!r} is no command: {error}", where=str(file), fix="close its quotes") from None


def _limit(given: Any, file: Path) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
        raise RequestError(f"{given!r} is no time", where=f"limits.seconds in {file}", fix="seconds; 0 = no limit")
    return float(given)
