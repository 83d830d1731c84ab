"""A rule on what may not be combined: what it looks at, and how it names the culprit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a rule looks at."""

    spec: RunSpec
    topology: Topology
    leaves: dict[str, Any]
    """The composed DeepSpeed config by dotted path."""
    origins: dict[str, str]
    demanded: dict[str, tuple[Any, str]]
    """What the run keys say the config must hold."""
    asked: Mapping[str, str]
    """The run keys that somebody set, and where."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One rule that a request breaks."""

    rule: str
    sentence: str
    where: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A combination that does not work, why, and what to do instead."""

    name: str
    sentence: str
    broken: Callable[[Case], bool]
    where: Callable[[Case], str]
    fix: str


def keys(*names: str) -> Callable[[Case], str]:
    """Name run keys with their values."""
    return lambda case: " ".join(f"{name}={getattr(case.spec, name)}" for name in names)


def set_by(*paths: str) -> Callable[[Case], str]:
    """Name those of some DeepSpeed keys that are set, each with where it comes from."""
    return lambda case: ", ".join(f"{path} from {case.origins[path]}" for path in paths if path in case.origins)


def offload(case: Case, what: str) -> str | None:
    """Return where the composed config moves `param` or `optimizer` to, or None where they stay."""
    device = case.leaves.get(f"zero_optimization.offload_{what}.device")
    return None if device == "none" else device


def offloaded(what: str) -> Callable[[Case], str]:
    """Name the stage, and where `param` or `optimizer` goes."""
    path = f"zero_optimization.offload_{what}.device"
    return lambda case: f"zero={case.spec.zero} and {path}={case.leaves[path]} from {case.origins[path]}"
