"""Which cases of the gate prove a plan: all that changes its numbers is in them, or the plan stays unproved.

What is asked is the difference between the plan's DeepSpeed config and that of the gate's own case for the same stage,
precision, offload and optimizer. Keys that change no number are left out by the ledger of keys (plan/ds/effects.py).
For the model of an `hf:` run stands a nano model that is made of its own config.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.config.digest import canonical
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.parity.case_plan import plan_of
from halfstep.launcher.parity.cases import (
    GRID,
    MOST_RANKS,
    OPTIMIZERS,
    VARIED,
    VOCABULARY,
    Case,
    cases_of,
)
from halfstep.launcher.plan.ds import effects
from halfstep.launcher.plan.plan import Plan

_FAMILIES = ("gpt2", "llama")
_PARAMS = "optimizer.params."
_ITS_OWN = tuple(
    f"{_PARAMS}{name}" for name in ("lr", "muon_lr", "adam_lr", "betas", "eps", "weight_decay", "momentum")
)
"""Numbers of an optimizer that a run chooses for itself; the gate has its own, which no tiny model amplifies."""
_WHO_STEPS = tuple(f"{_PARAMS}{name}" for name in ("torch_adam", "adam_w_mode", "fused", "foreach"))
"""Which implementation steps the same Adam: the gate composes it for this machine as the plan does."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the gate is asked about a plan."""

    cases: tuple[Case, ...]
    """What has to hold; none where something is not known to the gate."""
    unknown: tuple[str, ...] = ()
    """What the gate does not know, in words."""


def question_of(plan: Plan, node: topology.Topology | None = None) -> Question:
    """Return the cases that prove a plan's cell on a node, or what of it no case has; `node`: unset, this one."""
    if node is None:
        here = topology.default_ranks_per_node()
        node = topology.describe(here, here)
    offload = offload_of(plan)
    kind = _optimizer(plan)
    family = str(plan.model.config.get("model_type"))
    unknown = [] if kind in OPTIMIZERS else [f"the optimizer {plan.deepspeed['optimizer']['type']}"]
    config, why = _nano_config(plan)
    unknown += [] if config or (family in _FAMILIES and not why) else [f"the model family {family}{why}"]
    if unknown:
        return Question(cases=(), unknown=tuple(unknown))
    varied: dict[str, Any] = {
        "optimizer": kind,
        "compile": plan.compile,
        "fused_head": plan.fused_head,
        "keep_fp32": tuple(plan.keep_fp32),
        "documents": "masked" if plan.documents_apart else "plain",
        "lora": _lora(plan),
        "activation_checkpointing": plan.activation_checkpointing,
        "family": family,
        "config": config,
        "router_loss": plan.router_loss if config else None,
    }
    base = Case(zero=plan.zero, precision=plan.precision, offload=offload, optimizer=kind, **_ANY)
    varied["keys"] = _keys(plan, base, _of(node, 1))
    ranks = node.ranks_per_node
    if _is_plain(plan.precision, varied, offload):
        cases = [case for case in cases_of(plan.zero, plan.precision, "none") if case.world_size <= ranks]
        return Question(cases=tuple(cases))
    cases, refused = [], ""
    for row in (*VARIED, {**VARIED[0], "world_size": MOST_RANKS}):
        case = Case(zero=plan.zero, precision=plan.precision, offload=offload, **{**row, **varied})
        if case.world_size > ranks or (cases and case.world_size == MOST_RANKS):
            continue  # a whole node is for what fewer ranks cannot have: hpZ over eight
        try:
            plan_of(case, _of(node, case.world_size), repairs=True)
            cases.append(case)
        except HalfstepError as error:
            refused = error.what
    what = ", ".join(varied["keys"]) or (f"the model family {family}" if config else f"offload={offload}")
    return Question(cases=tuple(cases), unknown=() if cases else (f"{what}: {refused}",))


def _lora(plan: Plan) -> tuple[str, ...]:
    """Return the run keys of a plan's adapters; dropout is no part of the gate, as the model's own is none."""
    lora = plan.lora
    if lora is None:
        return ()
    return (f"lora.rank={lora.rank}", f"lora.alpha={lora.alpha:g}", f"lora.targets={canonical(lora.targets)}")


def _nano_config(plan: Plan) -> tuple[str, str]:
    """Return the config of a nano model of an `hf:` run's family, else why there is none; empty for a preset."""
    if not plan.model.name.startswith(("hf:", "run:")):
        return "", ""
    if plan.trust_remote_code and plan.model.config.get("auto_map"):
        return "", " (its code is its own: trust_remote_code)"
    from halfstep.models.nano import nano  # loads transformers, which planning a preset does without

    try:
        return canonical(nano(plan.model.config, VOCABULARY)), ""
    except ValueError as error:
        return "", f" (no nano model can be made of it: {error})"


def _optimizer(plan: Plan) -> str:
    """Return an optimizer's name in the table of cases; DeepSpeed's Adam is AdamW unless it is told otherwise."""
    section = plan.deepspeed["optimizer"]
    kind = str(section["type"]).lower()
    return "adamw" if kind == "adam" and section.get("params", {}).get("adam_w_mode", True) else kind


def offload_of(plan: Plan) -> str:
    """Return the value of the run key `offload` that a plan's DeepSpeed config stands for."""
    where = {
        what: plan.deepspeed["zero_optimization"].get(f"offload_{what}", {}).get("device", "none")
        for what in ("optimizer", "param")
    }
    if "nvme" in where.values():
        return "nvme"
    return "none" if where["optimizer"] == "none" else "optimizer-cpu" if where["param"] == "none" else "cpu"


_ANY: dict[str, Any] = {"accumulation": 1, "clip": 0.0, "world_size": 1, "family": "gpt2"}


def _is_plain(precision: str, varied: dict[str, Any], offload: str) -> bool:
    """Tell whether a cell is one of the gate's default subset, which has both optimizers, families and recomputing."""
    return (
        offload == "none"
        and precision in GRID
        and varied["optimizer"] in ("adamw", "sgd")
        and varied["documents"] == "plain"
        and not any(varied[name] for name in ("compile", "fused_head", "lora", "keys", "config"))
    )


def _of(node: topology.Topology, ranks: int) -> topology.Topology:
    """Return some ranks of a node by themselves."""
    return dataclasses.replace(node, world_size=ranks, ranks_per_node=ranks)


def _keys(plan: Plan, base: Case, alone: topology.Topology) -> tuple[str, ...]:
    """Return the keys that change a plan's numbers beside its cell, as words of a command line."""
    composed = plan_of(base, alone, repairs=True, for_the_reference=True)
    leaves, own = flatten(plan.deepspeed), flatten(composed.deepspeed)
    setting, asked = plan.setting(), []
    for path in sorted({*leaves, *own}):
        value = leaves.get(path, effects.default(path))
        if path in ("optimizer.type", *_ITS_OWN, *_WHO_STEPS) or value == own.get(path, effects.default(path)):
            continue
        if effects.of(path, setting).kind in (effects.NUMERICS, effects.UNKNOWN):
            asked.append(f"ds.{path}={json.dumps(value)}")
    return tuple(asked)
