"""Which DeepSpeed keys need a package that DeepSpeed imports only when it meets them, and whether it is here."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.rules import Violation

RULE = "package-is-installed"


@dataclass(frozen=True, kw_only=True)
class Need:
    """A key, the value with which DeepSpeed imports a package, and how that is installed."""

    key: str
    wanted: Callable[[Any], bool]
    module: str
    requirement: str
    """As pip takes it."""


def _is(*values: str) -> Callable[[Any], bool]:
    return lambda value: str(value).lower() in values


_NEEDS = (
    Need(key="tensorboard.enabled", wanted=bool, module="tensorboard", requirement="tensorboard"),
    Need(key="wandb.enabled", wanted=bool, module="wandb", requirement="wandb"),
    Need(key="comet.enabled", wanted=bool, module="comet_ml", requirement="comet_ml>=3.41.0"),
    Need(key="expert_parallel.comm_backend", wanted=_is("deepep"), module="deep_ep", requirement="deep_ep"),
    Need(
        key="tensor_parallel.vocab_parallel_ce_backend",
        wanted=_is("liger"),
        module="liger_kernel",
        requirement="liger-kernel>=0.8.1",
    ),
)
"""monitor/utils.py, runtime/engine.py, module_inject/auto_ep_comm.py, sequence/cross_entropy.py of DeepSpeed 0.19.8."""


def missing(deepspeed: Mapping[str, Any], origins: Mapping[str, str]) -> list[Violation]:
    """Return the keys whose package is not installed in this Python, as broken rules.

    This is a fact of the machine and not of the plan: who plans for this host asks, and every rank does before it
    builds anything.
    """
    leaves = flatten(dict(deepspeed))
    violations = []
    for need in _NEEDS:
        if not need.wanted(leaves.get(need.key)) or _is_here(need):
            continue
        # A quoted requirement is what a shell takes as one word.
        install = f"'{need.requirement}'" if re.search(r"[<>=]", need.requirement) else need.requirement
        violations.append(
            Violation(
                rule=RULE,
                sentence=f"{need.key} needs the package {need.module}, which is not installed here",
                where=f"{need.key} from {origins.get(need.key, 'the DeepSpeed config')}",
                fix=f"pip install {install}, or remove {need.key.partition('.enabled')[0]}",
            )
        )
    return violations


def require(deepspeed: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raise RequestError where a key's package is not installed."""
    problems = [
        RequestError(f"{rule.sentence} (rule {rule.rule})", where=rule.where, fix=rule.fix)
        for rule in missing(deepspeed, origins)
    ]
    if problems:
        raise problems[0].with_more(problems[1:])


def _is_here(need: Need) -> bool:
    """Tell whether the module can be imported, in the version that is asked for, without importing it."""
    if importlib.util.find_spec(need.module) is None:
        return False
    name, _, least = need.requirement.partition(">=")
    if not least:
        return True
    try:
        return _numbers(importlib.metadata.version(name)) >= _numbers(least)
    except importlib.metadata.PackageNotFoundError:
        return True  # it is there by another way, and only its import can say in which version


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]
