"""Modules that stay in fp32 where torch.autocast multiplies the rest of a model in 16 bits."""

import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def keep_in_fp32(model: nn.Module, patterns: Sequence[str], device_type: str) -> list[str]:
    """Let every module that a pattern names compute in fp32, with all that is inside it, and return their names.

    A pattern is a module's name or the end of one, with `*` and `?` as in a shell: `ln_f`, `*.mlp`, `lm_head`. What
    comes in in 16 bits is widened. Raises ValueError, one sentence, for a pattern that names no module.
    """
    modules = dict(model.named_modules())
    kept = [name for name in modules if name and any(names(pattern, name) for pattern in patterns)]
    idle = [pattern for pattern in patterns if not any(names(pattern, name) for name in kept)]
    if idle:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in modules if name)
        ends = ", ".join(kind for kind in kinds if not kind.isdigit())
        raise ValueError(f"no module is called {idle[0]}; names end in {ends}")
    for name in kept:
        modules[name].forward = _widened(modules[name].forward, device_type)
    return kept


def names(pattern: str, name: str) -> bool:
    """Tell whether a pattern is a module's name or the end of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _widened(forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_fp32(*arguments: Any, **options: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            wide, named = tree_map_only(Tensor, _wide, (arguments, options))
            return forward(*wide, **named)

    return in_fp32


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
