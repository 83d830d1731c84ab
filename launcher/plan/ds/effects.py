"""What setting a DeepSpeed key does in a run: the ledger `deepspeed_effects.json`, one row for each key.

A row holds for any value but DeepSpeed's default, and its cases for stages, precisions, values and other keys first.
Each names the line of DeepSpeed that reads the key, or shows that none does; `docs/deepspeed-keys.md` is made of it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config import precisions
from halfstep.launcher.plan.ds import dskeys
from halfstep.launcher.topology import Topology

Row = Mapping[str, Any]

NUMERICS, SPEED, MEMORY, REPORT = "numerics", "speed", "memory", "report"
INERT, OWNED, FATAL, UNKNOWN = "inert", "owned", "fatal", "unknown"
MEANINGS = {
    NUMERICS: "changes what is trained, and needs proof",
    SPEED: "the same numbers in another time",
    MEMORY: "the same numbers in other memory",
    REPORT: "prints, logs or measures",
    INERT: "does nothing",
    OWNED: "Halfstep decides it",
    FATAL: "ends a run or breaks it",
    UNKNOWN: "not known",
}
"""The classes of keys."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one key does with one value in one setting."""

    path: str
    kind: str
    """One of MEANINGS."""
    because: str
    """One sentence; empty for a value that is DeepSpeed's default."""
    reads: str
    """File, line and function of DeepSpeed 0.19.8."""
    instead: str
    """What to do, an imperative; empty where nothing is to be done."""
    always: bool = False
    """Whether it is the same in every setting."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an effect depends on, beside the key and its value."""

    zero: int
    precision: str
    topology: Topology
    leaves: Mapping[str, Any]
    """The whole DeepSpeed config by dotted path."""

    def offloaded(self, what: str) -> str:
        """Return where `param` or `optimizer` is moved to."""
        return str(self.leaves.get(f"zero_optimization.offload_{what}.device") or "none")

    def value(self, path: str) -> Any:
        """Return what a key holds, said or by default."""
        return self.leaves.get(path, default(path))


@functools.cache
def rows() -> Mapping[str, Row]:
    """Return the ledger by key."""
    text = Path(__file__).with_name("deepspeed_effects.json").read_text("utf-8")
    return json.loads(text)["rows"]


def row_of(path: str) -> Row | None:
    """Return the row of a key; of a parameter of an optimizer and of what stands in an open table, its section's."""
    return rows().get(row_path(path))


def row_path(path: str) -> str:
    """Return the key whose row holds for a key: itself, or the section that it stands in; empty where there is none."""
    known = rows()
    while path and path not in known:
        path, _, _ = path.rpartition(".")
    return path


def default(path: str) -> Any:
    """Return DeepSpeed's default for a key."""
    return dskeys.KEYS.get(path, {}).get("default")


def of(path: str, setting: Setting) -> Effect:
    """Return what a key does with the value that it has in a setting."""
    row, value = row_of(path), setting.value(path)
    if row is None:
        return Effect(path=path, kind=UNKNOWN, because="the ledger has no row for it", reads="", instead="")
    kind = row["effect"]
    case = next((case for case in row.get("cases", ()) if _holds(case["when"], value, setting)), {})
    if path in dskeys.KEYS and value == default(path) and "value" not in case.get("when", ()):
        return Effect(path=path, kind=INERT if kind == FATAL else kind, because="", reads=row["reads"], instead="")
    said = {**row, **case}
    return Effect(
        path=path,
        kind=said["effect"],
        because=said["because"],
        reads=said["reads"],
        instead=said.get("instead", ""),
        always=not row.get("cases"),
    )


def said(setting: Setting, origins: Mapping[str, str]) -> Iterator[tuple[Effect, str, bool]]:
    """Yield what each key that a user has set does, where it is set, and whether that is a file."""
    for path in setting.leaves:
        origin = origins.get(path, "")
        in_a_file = origin.startswith("--ds-config")
        if in_a_file or origin.startswith("ds."):
            yield of(path, setting), origin, in_a_file


def left_out(setting: Setting, origins: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a file that would break this run and change no number, each with what to say of it.

    Files that thousands share hold them; the run that they ask for is made without.
    """
    return {
        effect.path: f"{effect.path} from {origin} is left out, which changes no number. With it: {effect.because}"
        for effect, origin, in_a_file in said(setting, origins)
        if in_a_file and is_left_out(effect.path, setting)
    }


def is_left_out(path: str, setting: Setting) -> bool:
    """Tell whether a key breaks a run with these settings, and is left out of files."""
    return bool((row_of(path) or {}).get("left_out")) and of(path, setting).kind == FATAL


def make_no_other_run(keys: Iterable[str], old: Mapping[str, Any], setting: Setting) -> list[str]:
    """Return those of some changed `ds.` keys of a run's identity that do nothing in it: they may come and go."""
    pointless = []
    for key in keys:
        path = key.removeprefix("ds.")
        then = dataclasses.replace(setting, leaves={**setting.leaves, path: old.get(key, setting.value(path))})
        if path != key and of(path, then).kind == INERT and of(path, setting).kind == INERT:
            pointless.append(key)
    return pointless


def _holds(when: Mapping[str, Any], value: Any, setting: Setting) -> bool:
    return all(_met(name, wanted, value, setting) for name, wanted in when.items())


def _met(name: str, wanted: Any, value: Any, setting: Setting) -> bool:
    match name:
        case "zero":
            return setting.zero in wanted
        case "precision":
            return precisions.of(setting.precision).weights in wanted
        case "scaled":
            return precisions.of(setting.precision).scaled == wanted
        case "accelerator":
            return setting.topology.accelerator == wanted
        case "ranks":
            return setting.topology.ranks.data == wanted
        case "value":
            return any(_same(value, other) for other in wanted)
        case "offload_optimizer" | "offload_param":
            return setting.offloaded(name.removeprefix("offload_")) in wanted
        case "keys":
            return all(any(_same(setting.value(path), other) for other in values) for path, values in wanted.items())
    raise AssertionError(f"the ledger has a condition that is not known: {name}")


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def conditions(row: Row) -> Iterator[str]:
    """Return the cases of a row in words, for the page."""
    for case in row.get("cases", ()):
        yield f"{_words(case['when'])}: {case['effect']}. {case['because']}"


def _words(when: Mapping[str, Any]) -> str:
    parts = []
    for name, wanted in when.items():
        if name == "keys":
            parts += [f"{path} {_either(values)}" for path, values in wanted.items()]
        elif name == "scaled":
            parts.append("loss scaling" if wanted else "no loss scaling")
        else:
            label = {"zero": "stage", "ranks": "ranks", "value": "value"}.get(name, name.replace("_", " "))
            parts.append(f"{label} {_either(wanted if isinstance(wanted, list) else [wanted])}")
    return ", ".join(parts)


def _either(values: list[Any]) -> str:
    return " or ".join(value if isinstance(value, str) and value else json.dumps(value) for value in values)
