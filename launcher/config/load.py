"""Read a request: run files, key=value words and flags into a RunSpec that knows where each key came from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from halfstep.launcher.config import legal, mixture
from halfstep.launcher.config.dotted import flatten, unflatten
from halfstep.launcher.config.schema import RunSpec, listed, run_keys
from halfstep.launcher.config.text_file import read_toml
from halfstep.launcher.errors import RequestError, nearest
from halfstep.models.presets import PRESETS

_SPELT = {"model": "model.name", "precision.name": "precision", "precision.keep_fp32": "keep_fp32",
          "data.documents": "documents"}  # fmt: skip
"""Run keys that have another spelling."""
PATH_KEYS = ("data", "out", "nvme_path", "ds_config")
TASKS = "eval.tasks"
"""A run key that holds paths, too, in a list."""
_COMMAND_LINE = "the command line"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A RunSpec and, for every key that was given, the file or flag it came from."""

    spec: RunSpec
    origins: dict[str, str]


def load(arguments: Sequence[str], origin: str = _COMMAND_LINE, *, data: bool = True, stored: bool = False) -> Request:
    """Read `[RUN.toml] key=value ... [--ds-config FILE]`; later words override earlier ones.

    `origin` is what an error names as the place where the words stand; `data`: whether the request has to name some;
    `stored`: a run directory holds it already, secrets and all, and resumes.

    Relative paths are taken from the current folder on the command line and from the file's own folder in a run file.
    Raises RequestError, naming every key that is wrong and the nearest right one.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    remaining = list(arguments)
    here = _current_folder()
    while remaining:
        word = remaining.pop(0)
        if word == "--ds-config" or word.startswith("--ds-config="):
            path = word.partition("=")[2] or (remaining.pop(0) if remaining else "")
            if not path:
                raise RequestError("--ds-config names no file", where=origin, fix="--ds-config FILE.json")
            _put(values, origins, "ds_config", path, origin, here)
        elif word.endswith(".toml") and ("=" not in word or _is_file(word)):
            for key, value in flatten(read_toml(Path(word), "the run file", origin)).items():
                _put(values, origins, key, value, word, (here / word).parent, stored)
        elif "=" in word and not word.startswith("-"):
            key, _, text = word.partition("=")
            if not all(key.split(".")):
                raise RequestError(
                    f"{legal.shown(word)!r} has no key before the =",
                    where=origin,
                    fix="write key=value, such as zero=2",
                )
            _put(values, origins, key.strip(" "), _literal(key, text, origin), origin, here)
        else:
            key, _, text = word.lstrip("-").partition("=")
            legal.check(key if text else "a word", text or key, origin, typed=True)  # before it is repeated
            fix = "write key=value without spaces around the =, or name a file that ends in .toml"
            if word.startswith("-"):
                fix = "run keys have no dashes: zero=2, not --zero=2; `halfstep plan --help` lists keys and options"
            raise RequestError(f"{legal.shown(word)!r} is neither key=value nor a run file", where=origin, fix=fix)
    return Request(spec=_validate(values, origins, data=data), origins=origins)


def extend(request: Request, more: Mapping[str, tuple[Any, str]]) -> Request:
    """Return a request with more run keys, each as (value, origin), checked as if somebody had written them."""
    values = flatten(request.spec.model_dump(by_alias=True, exclude_unset=True))
    values |= {key: value for key, (value, _) in more.items()}
    origins = {**request.origins, **{key: origin for key, (_, origin) in more.items()}}
    return Request(spec=_validate(values, origins, data=False), origins=origins)


class DuplicateKey(ValueError):
    """A key stands twice in one JSON object."""


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dictionary; raises DuplicateKey for one that stands there twice."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise DuplicateKey(f"the key {legal.shown(key)!r} stands there twice")
        tree[key] = value
    return tree


def local_model(name: str, base: Path, origin: str) -> str:
    """Return `hf:PATH` with its whole path where that exists, else the name as it is: a model of the hub.

    `run:PATH` is always a path.
    """
    if name.startswith("run:"):
        return f"run:{legal.absolute('model.name', name[4:], base, origin)}"
    meant_as_path = name[3:].startswith(("~", "/", "."))
    try:
        path = legal.absolute("model.name", name[3:], base, origin)
        return f"hf:{path}" if Path(path).exists() else name
    except RequestError:
        if meant_as_path:
            raise
    except OSError as error:
        if meant_as_path:
            raise RequestError(
                f"model={legal.shown(name)} cannot be read: {error.strerror}", where=origin, fix="check permissions"
            ) from None
    return name


def placed_files(value: Any, base: Path, origin: str) -> Any:
    """Return a list of files with their whole paths; what is no list of texts is left to the schema."""
    names = listed(value) if isinstance(value, str) and value else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        return value
    return [legal.absolute(TASKS, name, base, origin) for name in names]


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise RequestError(
            "the current folder was removed", where=_COMMAND_LINE, fix="change to a folder that exists"
        ) from None


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # too long to be one, or no path at all
        return False


def _literal(key: str, text: str, origin: str) -> Any:
    """Give `ds.*` values, which have no schema of ours, the type that JSON gives them."""
    if not key.strip().startswith("ds."):
        return text
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        return text
    except RecursionError:
        problem = f"is nested more than {legal.DEEPEST} levels deep"
    except ValueError as error:  # a key twice, or a number with more digits than Python reads
        problem = f"cannot be read: {error}"
    raise RequestError(f"{legal.shown(key)} {problem}", where=origin, fix="check how it is written")


def _put(
    values: dict[str, Any],
    origins: dict[str, str],
    key: str,
    value: Any,
    origin: str,
    base: Path,
    stored: bool = False,
) -> None:
    legal.check(key, value, origin, typed=not key.startswith("ds."), stored=stored)
    key = _SPELT.get(key, key)
    if key == "data" and (isinstance(value, list) or (isinstance(value, str) and value)):
        value = mixture.placed(value, base, origin)
    elif key == TASKS:
        value = placed_files(value, base, origin)
    elif isinstance(value, str) and value:
        if key in PATH_KEYS:
            value = legal.absolute(key, value, base, origin)
        elif key == "model.name" and value.startswith(("hf:", "run:")):
            value = local_model(value, base, origin)
    if value != "":  # `data=` with nothing behind it says nothing
        values[key], origins[key] = value, origin


def _validate(values: dict[str, Any], origins: dict[str, str], *, data: bool) -> RunSpec:
    problems = []
    try:
        spec = RunSpec.model_validate(unflatten(values))
        if spec.data is not None or not data:
            return spec
    except KeyError as error:
        key = str(error.args[0])
        raise RequestError(
            f"{key} is given both as a value and as a section",
            where=origins.get(key, _COMMAND_LINE),
            fix=f"keep one of {key}=... and {key}.<key>=...",
        ) from None
    except ValidationError as error:
        problems = [_problem(detail, origins) for detail in error.errors()]
    if data and "data" not in values:
        problems.append(RequestError("data is missing", where=_COMMAND_LINE, fix=_MISSING["data"]))
    raise problems[0].with_more(problems[1:])


def _problem(detail: ErrorDetails, origins: dict[str, str]) -> RequestError:
    key = ".".join(str(part) for part in detail["loc"])
    key = "model.name" if key == "model" else key
    origin = origins.get(key) or next((o for k, o in origins.items() if k.startswith(f"{key}.")), _COMMAND_LINE)
    known = run_keys()
    if detail["type"] == "extra_forbidden":
        full = next((given for given in origins if given == key or given.startswith(f"{key}.")), key)
        return RequestError(f"unknown run key {full!r}", where=origin, fix=_suggest_key(full, known))
    if detail["type"] == "missing":
        return RequestError(f"{key} is missing", where=_COMMAND_LINE, fix=_MISSING.get(key, f"give {key}=..."))
    if detail["type"] == "model_type":
        inside = ", ".join(name for name in known if name.startswith(f"{key}."))
        return RequestError(f"{key} is a section, not a value", where=origin, fix=f"set one of {inside}")
    given = detail["input"]
    message = detail["msg"].removeprefix("Value error, ")
    # What a whole section contradicts is said in full by its validator.
    message = f"{message[:1].lower()}{message[1:]}" if key and not isinstance(given, dict) else message
    what = f"{key}={legal.shown(given)}: {message}" if key and not isinstance(given, dict) else message
    fix = f"{key} is: {known[key].rstrip('.')}" if key in known else _see_section(key)
    return RequestError(what, where=origin, fix=fix)


def _see_section(key: str) -> str:
    inside = f" that begin with {key}." if key else ""
    return f"see `halfstep plan --help` for the run keys{inside}"


def _suggest_key(key: str, known: dict[str, str]) -> str:
    last = key.rpartition(".")[2]
    close = nearest(key, known) or [name for name in known if name.rpartition(".")[2] == last]
    close = close or [name for name in known if nearest(last, [name.rpartition(".")[2]])]
    if close:
        return "did you mean " + " or ".join(close[:3]) + "?"
    return "`halfstep plan --help` lists the run keys; DeepSpeed's own are set with ds.<key>=value"


_MISSING = {
    "model.name": f"give model=NAME, one of {', '.join(PRESETS)}, model=hf:PATH_OR_ID or model=run:DIR",
    "data": "give data=DIR; `halfstep data prepare --source stdlib --out DIR --vocab-size 4096` makes one",
}
