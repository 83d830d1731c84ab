"""Read a request: run files, key=value words and flags into a RunSpec that knows where each key came from."""

import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from launcher.errors import RequestError, nearest
from launcher.spec.dotted import flatten, unflatten
from launcher.spec.schema import RunSpec, run_keys
from models.presets import PRESETS

PATH_KEYS = ("data", "out", "nvme_path", "ds_config")
_COMMAND_LINE = "the command line"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A RunSpec and, for every key that was given, the file or flag it came from."""

    spec: RunSpec
    origins: dict[str, str]


def load(words: Sequence[str], origin: str = _COMMAND_LINE) -> Request:
    """Read `[RUN.toml] key=value ... [--ds-config FILE]`; later words override earlier ones.

    `origin` is what an error names as the place where the words stand.

    Relative paths are taken from the current folder on the command line and from the file's own folder in a run file.
    Raises RequestError, naming every key that is wrong and the nearest right one.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--ds-config" or word.startswith("--ds-config="):
            path = word.partition("=")[2] or (remaining.pop(0) if remaining else "")
            _put(values, origins, "ds_config", path, origin, Path.cwd())
        elif word.endswith(".toml") and ("=" not in word or Path(word).is_file()):
            for key, value in _read_toml(Path(word)).items():
                _put(values, origins, key, value, word, Path(word).absolute().parent)
        elif "=" in word and not word.startswith("-"):
            key, _, text = word.partition("=")
            if not all(key.split(".")):
                raise RequestError(
                    f"{word!r} has no key before the =", where=origin, fix="write key=value, such as zero=2"
                )
            _put(values, origins, key.strip(), _literal(key, text), origin, Path.cwd())
        else:
            fix = "write key=value without spaces around the =, or name a file that ends in .toml"
            if word.startswith("-"):
                fix = "run keys have no dashes: zero=2, not --zero=2; `halfstep plan --help` lists keys and options"
            raise RequestError(f"{word!r} is neither key=value nor a run file", where=origin, fix=fix)
    return Request(spec=_validate(values, origins), origins=origins)


def _literal(key: str, text: str) -> Any:
    """Give `ds.*` values, which have no schema of ours, the type that JSON gives them."""
    if not key.strip().startswith("ds."):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(values: dict[str, Any], origins: dict[str, str], key: str, value: Any, origin: str, base: Path) -> None:
    key = "model.name" if key == "model" else key
    if isinstance(value, str) and value:
        if key in PATH_KEYS:
            value = os.path.abspath(base / Path(value).expanduser())
        elif key == "model.name" and value.startswith("hf:"):
            local = base / Path(value[3:]).expanduser()
            value = f"hf:{os.path.abspath(local)}" if local.exists() else value
    if value != "":  # `data=` with nothing behind it says nothing
        values[key], origins[key] = value, origin


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        return flatten(tomllib.loads(text))
    except FileNotFoundError:
        raise RequestError(
            f"the run file {path} does not exist",
            where=_COMMAND_LINE,
            fix="check the path, or give key=value words instead",
        ) from None
    except OSError as error:
        raise RequestError(
            f"the run file {path} cannot be read: {error.strerror}",
            where=_COMMAND_LINE,
            fix="check the file's permissions",
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the run file is not UTF-8 at byte {error.start}",
            where=str(path),
            fix="save the file as UTF-8, as TOML demands",
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RequestError(
            f"the run file is not valid TOML: {error}",
            where=str(path),
            fix='mend that line; strings take quotes (precision = "fp16"), tables take [brackets]',
        ) from None


def _validate(values: dict[str, Any], origins: dict[str, str]) -> RunSpec:
    try:
        tree = unflatten(values)
        return RunSpec.model_validate(tree)
    except KeyError as error:
        key = str(error.args[0])
        raise RequestError(
            f"{key} is given both as a value and as a section",
            where=origins.get(key, _COMMAND_LINE),
            fix=f"keep one of {key}=... and {key}.<key>=...",
        ) from None
    except ValidationError as error:
        problems = [_problem(detail, origins) for detail in error.errors()]
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
    shown = detail["input"]
    message = detail["msg"].removeprefix("Value error, ")
    # What a whole section contradicts is said in full by its validator.
    what = f"{key}={shown}: {message[:1].lower()}{message[1:]}" if key and not isinstance(shown, dict) else message
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
    "model.name": f"give model=NAME, one of {', '.join(PRESETS)}, or model=hf:PATH_OR_ID",
    "data": "give data=DIR; `halfstep data prepare --source stdlib --out DIR --vocab-size 4096` makes one",
}
