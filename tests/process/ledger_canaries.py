"""Canaries of the ledger of keys, one process without other ranks: what ends or breaks a run does, and what counts.

`test_key_canaries.py` runs them in its rank and says what they have to see.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from tools.canaries.bench import engine, loss

Look = Callable[[], Any]


def _ends(make: Look) -> str:
    """Return the error that something ends in."""
    try:
        return f"it goes on: {make()}"
    except Exception as error:  # DeepSpeed raises what it likes, a bare Warning among them
        return f"{type(error).__name__}: {error}"


def pair(looks: tuple[Look, Look]) -> list[Any]:
    """Return what is seen without a key and with it; twice the same error where that can be looked at no more."""
    try:
        return [look() for look in looks]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"] * 2


def _zenflow(name: str, value: Any) -> Look:
    """Set one key of ZenFlow beside an accumulation of 2, and let it configure itself as in an engine."""

    def look() -> str:
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.zenflow.engine import configure_zenflow

        zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {name: value}}
        made = DeepSpeedConfig(
            {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "zero_optimization": zero}
        )
        of = SimpleNamespace(zenflow_config=lambda: made.zero_config.zenflow, training_dataloader=None, _config=made)
        configure_zenflow(of)
        return f"an accumulation of {made.gradient_accumulation_steps} instead of 2"

    return lambda: _ends(look)


def _mixture() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    small = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return engine(1, model=MixtralForCausalLM(small), expert_parallel={"enabled": True, "preset_model": "mixtral"})


def _misplaced(on: bool) -> str:
    """Tell which weights have the master that DeepSpeed's own map gives them, dealt out as to two ranks."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import safe_get_full_fp32_param

    deal = DeepSpeedZeroOptimizer._round_robin_reorder
    model = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((2, 3), (3, 5), (5, 1))))
    with mock.patch.object(
        DeepSpeedZeroOptimizer, "_round_robin_reorder", lambda self, tensors, ranks: deal(self, tensors, 2)
    ):
        engine(2, model=model, zero_optimization={"round_robin_gradients": on})
    held = [safe_get_full_fp32_param(weight) for weight in model.parameters()]
    return f"{sum(torch.equal(*pair) for pair in zip(held, model.parameters(), strict=True))} of 3 masters in place"


def _steps_after_one_micro_batch() -> str:
    """Count the steps after the first of two micro-batches: Halfstep calls engine.step() after each."""
    made = engine(1, gradient_accumulation_steps=2, managed_gradient_accumulation=False)
    made.backward(loss(made))
    made.step()
    return f"{made.global_steps} steps"


def _superoffload() -> None:
    from deepspeed.runtime.superoffload.superoffload_stage3 import _validate_superoffload_accelerator

    _validate_superoffload_accelerator()


def _packed() -> str:
    """Tell how many elements zero.Init leaves of a weight of 64 x 64, over which Halfstep draws."""
    import deepspeed

    section = {"num_bits": 8, "group_size": 64, "group_dim": 0, "symmetric": False}
    config = {
        "train_batch_size": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "weight_quantization": {"quantized_initialization": section},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Linear(64, 64, bias=False)
    return f"{model.weight.ds_numel} of {64 * 64} elements"


_ZENFLOW = {
    "auto_ratio": 0.5,
    "full_warm_up_rounds": 1,
    "offload": True,
    "overlap_step": True,
    "pt_reserved_cores_perc": 0.25,
    "select_interval": 4,
    "select_strategy": "step",
    "steps_per_epoch": 4,
    "topk_ratio": 0.2,
    "update_interval": 4,
}

FATAL: dict[str, tuple[Look, str]] = {
    "data_types.param_dtype": (
        lambda: _ends(lambda: engine(1, "bf16", data_types={"param_dtype": "fp16"})),
        "AssertionError: ",
    ),
    "expert_parallel.enabled": (lambda: _ends(_mixture), "KeyError: 'name'|TypeError: "),
    "expert_parallel.load_balance_coeff": (
        lambda: _ends(lambda: engine(0, expert_parallel={"load_balance_coeff": 0.1})),
        "ValueError: .*load_balance_coeff",
    ),
    "managed_gradient_accumulation": (
        _steps_after_one_micro_batch,
        "^1 steps",
    ),
    "zero_optimization.legacy_stage1": (
        lambda: _ends(lambda: engine(1, zero_optimization={"legacy_stage1": True})),
        "Exception: .*ZeRO Stage 1 is not supported",
    ),
    "zero_optimization.offload_optimizer.ratio": (  # the case of stages 0 to 2
        lambda: _ends(lambda: engine(2, zero_optimization={"offload_optimizer": {"device": "cpu", "ratio": 0.5}})),
        "ValidationError: .*Partial offloading only supported for ZeRO Stage 3",
    ),
    "zero_optimization.offload_optimizer.super_offload": (  # the case of CPU ranks
        lambda: _ends(_superoffload),
        "AssertionError: SuperOffload only supports NVIDIA CUDA GPUs",
    ),
    "zero_optimization.round_robin_gradients": (
        lambda: f"{_misplaced(False)}, and with it {_misplaced(True)}",
        "3 of 3 masters in place, and with it [0-2] of 3",
    ),
    "weight_quantization.quantized_initialization": (_packed, "2[0-9]{3} of 4096 elements"),
    **{
        f"zero_optimization.zenflow.{name}": (
            _zenflow(name, value),
            "an accumulation of [^2]|Warning: |ValueError: ",
        )
        for name, value in _ZENFLOW.items()
    },
}
"""Keys that end or break a run: how to see it, and a pattern of what is seen."""

GPU_ONLY = {
    "zero_optimization.offload_optimizer.ratio": "that the share on the GPU keeps the peak learning rate needs a GPU",
    "zero_optimization.offload_optimizer.super_offload": "that its process keeps the moments to itself needs a GPU",
}
"""What breaks a run on GPUs alone; CPU ranks show another case of these keys."""


def _dtype_of_a_buffer(**data_types: Any) -> str:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("table", torch.ones(1))
    return str(engine(0, "bf16", model, data_types=data_types).module.table.dtype)


def _reduced(op: str) -> list[float]:
    """Reduce a gradient of 1 as if with one other rank, whose gradient is 0."""
    made = engine(0, gradient_allreduce_op=op)
    return made.allreduce_bucket([torch.ones(1)], torch.distributed.group.WORLD, dp_world_size=2).tolist()


def _scale(consecutive: bool) -> list[float]:
    """Return DeepSpeed's loss scale and Halfstep's after an overflow, a clean step and an overflow."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from halfstep.launcher.engine.numerics.loss_scale import LossScale

    theirs = DynamicLossScaler(8.0, 1000, 1.0, delayed_shift=2, consecutive_hysteresis=consecutive)
    ours = LossScale(value=8.0, dynamic=True, hysteresis=2, consecutive_hysteresis=consecutive)
    for overflow in (True, False, True):
        theirs.update_scale(overflow)
        ours.update(overflow)
    return [theirs.cur_scale, ours.value]


def _reduced_in(**more: Any) -> str:
    """Return the type in which the gradient of a Linear is reduced under autocast."""
    from deepspeed.runtime import torch_autocast

    section = {"enabled": True, "dtype": "bfloat16", **more}
    weight = next(engine(1, torch_autocast=section).module.parameters())
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    return str(getattr(weight, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, None))


CHANGED: dict[str, tuple[Look, Look]] = {
    "data_types.buffer_dtype": (_dtype_of_a_buffer, lambda: _dtype_of_a_buffer(buffer_dtype="bf16")),
    "data_types.keep_in_fp32_modules": (
        lambda: _dtype_of_a_buffer(buffer_dtype="bf16"),
        lambda: _dtype_of_a_buffer(buffer_dtype="bf16", keep_in_fp32_modules=["table"]),
    ),
    "fp16.consecutive_hysteresis": (lambda: _scale(False), lambda: _scale(True)),
    "gradient_allreduce_op": (lambda: _reduced("mean"), lambda: _reduced("sum")),
    "torch_autocast.lower_precision_safe_modules": (
        _reduced_in,
        lambda: _reduced_in(lower_precision_safe_modules=["torch.nn.Embedding"]),
    ),
}
"""Keys that change what is trained: what is seen without and with them."""
