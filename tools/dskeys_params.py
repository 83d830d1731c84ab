"""Describe DeepSpeed's keys from annotations and defaults, and the parameters of its optimizers and schedulers."""

import enum
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

ABSENT = inspect.Parameter.empty
_WORDS = {bool: "bool", int: "int", float: "float", str: "str", list: "list", tuple: "list", dict: "open", Path: "str"}


def described(annotation: Any, default: Any) -> Entry:
    """Describe one key by its annotation, else by its default."""
    default = None if default is ABSENT else default.value if isinstance(default, enum.Enum) else default
    default = (
        int(default) if type(default).__name__ == "pp_int" else list(default) if isinstance(default, tuple) else default
    )
    entry: Entry = {"default": default}
    if annotation in (ABSENT, Any):
        return entry | {"type": _WORDS.get(type(default), "any")}
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    options = tuple(option for option in options or (annotation,) if option is not type(None))
    values: list[Any] = []
    spellings: list[str] = []
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            values += typing.get_args(option)
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            values += [member.value for member in origin]
        elif origin in _WORDS:
            spellings.append(_WORDS[origin])
            inner = [value for value in typing.get_args(option) if typing.get_origin(value) is typing.Literal]
            entry |= {"items": list(typing.get_args(inner[0]))} if inner else {}
    if values:
        return entry | {"type": "enum", "values": values}
    return (
        entry | {"type": "|".join(spellings)} if spellings else {"type": "object", "default": None}
    )  # no spelling in a file


def _signature(*makers: Callable[..., Any]) -> dict[str, Entry]:
    """Describe the parameters of one optimizer or scheduler, given every class DeepSpeed may build for it."""
    entries: dict[str, Entry] = {}
    for maker in makers:
        for name, parameter in inspect.signature(maker).parameters.items():
            if (
                name in ("params", "model_params", "optimizer", "max_grad_norm")
                or parameter.kind is parameter.VAR_KEYWORD
            ):
                continue
            annotation = ABSENT if isinstance(parameter.annotation, str) else parameter.annotation
            entry = described(annotation, parameter.default)
            entry |= {"exact": True} if entry["type"] == "int" else {}
            if name not in entries or (entries[name]["type"] == "int" and entry["type"] == "float"):
                entries[name] = entry
    return entries


def optimizers() -> tuple[dict[str, dict[str, Entry]], Entry]:
    """Return the parameters of each optimizer, and the entry of `optimizer.type` (runtime/engine.py, 2476-2550)."""
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, TORCH_ADAM_PARAM
    from deepspeed.runtime.engine import DeepSpeedEngine

    of_torch = {
        name: maker
        for name, maker in vars(torch.optim).items()
        if isinstance(maker, type) and issubclass(maker, torch.optim.Optimizer) and maker is not torch.optim.Optimizer
    }
    parameters = {
        name.lower(): _signature(maker) for name, maker in of_torch.items() if name.lower() not in DEEPSPEED_OPTIMIZERS
    }
    adam = _signature(torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam) | {
        TORCH_ADAM_PARAM: {"type": "bool", "default": False},
    }
    adam.pop("adamw_mode")  # DeepSpeed sets it itself, from adam_w_mode
    own = ("_MUON_HALF_KEYS", "_ADAM_HALF_KEYS")
    muon = {
        key: adam.get(key, {"type": "any", "default": None})
        for half in own
        for key in getattr(DeepSpeedEngine, half, ())
    }
    muon |= {key: adam[key] for key in ("adam_w_mode", "fp32_optimizer_states", TORCH_ADAM_PARAM)}
    muon |= {  # zero/muon/original_muon.py, MuonWithAuxAdam: its Adam has other defaults than Adam
        "betas": {"type": "list", "default": [0.9, 0.95]},
        "eps": {"type": "float", "default": 1e-10},
        "momentum": {"type": "float", "default": 0.95},
        "ns_method": {"type": "str", "default": "gram"},
        "weight_decay": {"type": "float", "default": 0.0},
    }
    parameters |= {
        "adam": adam,
        "adamw": adam,
        "adagrad": _signature(torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        "lamb": _signature(FusedLamb),
        "lion": _signature(FusedLion, DeepSpeedCPULion),
        "muon": muon | {key: {"type": "float", "default": None} for key in ("muon_lr", "adam_lr")},
    }
    exact = sorted(name for name in of_torch if name.lower() not in DEEPSPEED_OPTIMIZERS)
    return parameters, {"type": "enum", "values": exact, "any_case": sorted(DEEPSPEED_OPTIMIZERS), "default": None}


def schedulers() -> tuple[dict[str, dict[str, Entry]], Entry]:
    """Return the parameters of DeepSpeed's schedulers, and the entry of `scheduler.type` (runtime/engine.py, 1923)."""
    import torch
    from deepspeed.runtime import lr_schedules

    of_torch = [
        name for name, maker in vars(torch.optim.lr_scheduler).items() if isinstance(maker, type) and "LR" in name
    ]
    parameters = {name: _signature(getattr(lr_schedules, name)) for name in lr_schedules.VALID_LR_SCHEDULES}
    values = sorted({*parameters, *(name for name in of_torch if not name.startswith(("_", "LRScheduler")))})
    return {name.lower(): params for name, params in parameters.items()}, {
        "type": "enum",
        "values": values,
        "default": None,
    }


def dtype_entries() -> dict[str, Entry]:
    """Return the keys that name a dtype in any of the spellings of runtime/config.py:DtypeEnum."""
    from deepspeed.runtime.config import DtypeEnum

    members: Any = DtypeEnum  # which gives every member an attribute of its own
    spellings = [spelling for member in members for spelling in member._all_values if isinstance(spelling, str)]
    paths = ("torch_autocast.dtype", *(f"data_types.{kind}_dtype" for kind in ("grad_accum", "param", "buffer")))
    return {path: {"type": "enum", "values": spellings, "default": None} for path in paths}


def expert_parallel() -> dict[str, Entry]:
    """Return the keys of the section that module_inject/auto_ep_config.py reads into a dataclass of the same names."""
    try:
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    except ImportError:  # before 0.19
        return {}

    hints = typing.get_type_hints(AutoEPConfig)
    return {
        f"expert_parallel.{name}": described(
            hints[name], default if isinstance(default, bool | int | float | str) else None
        )
        | ({"exact": True} if hints[name] is int else {})
        for name, default in vars(AutoEPConfig()).items()
        if not name.startswith("_")
    } | {"expert_parallel.expert_w3": {"type": "str", "default": None}}
