"""What every canary needs: an engine over a model of one weight, steps on it, and numbers to read.

A model of one weight has a gradient that is chosen, so that every number can be checked in the head.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.launcher.engine.numerics import cpu_fp16

# DeepSpeed is imported inside functions everywhere here: it prints while it is imported, and takes seconds.
Engine = Any
Seen = tuple[bool, str]
"""Whether DeepSpeed did what is documented, and what was seen, in one line."""
STAGES, SHARDED = (0, 1, 2, 3), (1, 2, 3)
HALF = ("fp16", "bf16")
SCALE = 2.0**10


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One behaviour of DeepSpeed that something in Halfstep rests on."""

    name: str
    sentence: str
    """What DeepSpeed does."""
    trap: str
    """The group it belongs to in docs/deepspeed.md."""
    reference: str
    """Where it is in DeepSpeed 0.19.8, or the issue or pull request."""
    look: Callable[[], Seen]
    changed: str
    """What to do in Halfstep when DeepSpeed does something else."""


def one_weight(value: float = 0.0) -> nn.Linear:
    """Return a model that multiplies its input by one weight."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def adamw(lr: float, decay: float = 0.0) -> dict[str, Any]:
    """Return the config section of torch's AdamW, which needs no compiled operator."""
    return {"type": "AdamW", "params": {"lr": lr, "weight_decay": decay, "torch_adam": True}}


def engine(
    zero: int, precision: str = "fp32", model: nn.Module | None = None, *, first: bool = True, **config: Any
) -> Engine:
    """Return an engine over `one_weight()` or `model`, with SGD at rate 1, no clipping and a loss scale of 1024.

    Keywords are sections of the DeepSpeed config, merged into ours; None takes a key out. `first=False` lets it be what
    it is in a process that had engines before: torch_autocast leaves a mark on the process (see `process_wide`).
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast

    # Whether this CPU has fp16 instructions is no behaviour of DeepSpeed; what it computes is left as it is.
    accelerator: Any = get_accelerator()
    cpu_fp16.prepare(precision, accelerator.device_name(), compiled=True)
    if first:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    whole: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    if precision != "fp32":
        whole[precision] = {"enabled": True} | ({"initial_scale_power": 10} if precision == "fp16" else {})
    for key, value in config.items():
        whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    whole = {key: value for key, value in whole.items() if value is not None}
    model = model or one_weight()
    parameters: Any = list(model.parameters())  # DeepSpeed's annotation says Module
    made, _, _, _ = deepspeed.initialize(model=model, model_parameters=parameters, config=whole)
    return made


def loss(of: Engine, gradient: float = 1.0) -> Tensor:
    """Return a loss whose gradient is `gradient`."""
    return of(torch.ones(1, 1, dtype=next(of.module.parameters()).dtype)).float().sum() * gradient


def weight(of: Engine) -> float:
    """Return the weight, gathered where it is sharded."""
    import deepspeed

    (parameter,) = of.module.parameters()
    gather = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter]) if gather else contextlib.nullcontext():
        return float(parameter)


def step(of: Engine, gradient: float = 1.0, *, by_hand: float = 1.0) -> float:
    """Train one micro-step with the loss multiplied `by_hand`; return how far the weight went against the gradient."""
    before = weight(of)
    of.backward(loss(of, gradient) * by_hand)
    of.step()
    return before - weight(of)


def near(measured: Iterable[float], wanted: Iterable[float]) -> bool:
    """Tell whether all numbers are as wanted, to one part in a hundred."""
    pairs = zip(measured, wanted, strict=True)
    return all(math.isclose(value, other, rel_tol=1e-2, abs_tol=1e-9) for value, other in pairs)


def said(numbers: Iterable[float | None]) -> str:
    """Return numbers as a list to read."""
    return ", ".join("none" if number is None else f"{number:.3g}" for number in numbers)


def raised(call: Callable[[], Any]) -> str:
    """Return the first sentence of what a call raises, or nothing."""
    try:
        call()
    except Exception as error:  # whatever DeepSpeed raises is what is looked at
        return f"{type(error).__name__}: {str(error).splitlines()[0].partition('. ')[0]}"
    return ""
