"""Build the model and the DeepSpeed engine of a Plan, and check that DeepSpeed built what was planned."""

import contextlib
import io
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from transformers import PreTrainedModel

from launcher.engine import half, opcache
from launcher.engine.repair import Repairs, repair
from launcher.errors import RefusedError, RequestError
from launcher.plan.plan import Plan
from models import build as model_build

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build(plan: Plan) -> tuple[DeepSpeedEngine, Repairs]:
    """Return an engine whose optimizer holds the planned parameters, and what had to be mended in it.

    Raises RequestError for a model that cannot be built.
    """
    half.prepare(plan.precision, plan.topology.accelerator, compiled=plan.compile)
    model = _model(plan)
    names = _compiled_optimizer(plan)
    with contextlib.redirect_stdout(io.StringIO()):
        if names:
            opcache.load_operators(names)
        # An optimizer built by DeepSpeed from the config, over our parameter groups.
        engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model, plan), config=plan.deepspeed
        )
    _check(engine, plan)
    repairs = repair(engine, plan)
    if plan.compile:
        engine.compile()
    return engine, repairs


def _compiled_optimizer(plan: Plan) -> list[str]:
    """Return the operator that DeepSpeed will compile for the optimizer (engine.py, _configure_basic_optimizer)."""
    optimizer = plan.deepspeed["optimizer"]
    if optimizer["type"].lower() not in ("adam", "adamw") or optimizer.get("params", {}).get("torch_adam", False):
        return []
    offloaded = plan.deepspeed["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    return ["CPUAdamBuilder" if offloaded or plan.topology.accelerator == "cpu" else "FusedAdamBuilder"]


def _model(plan: Plan) -> PreTrainedModel:
    try:
        return model_build.build(
            plan.model.config,
            seed=plan.seed,
            zero3=plan.deepspeed if plan.zero == 3 else None,
            weights=plan.model.weights,
            activation_checkpointing=plan.activation_checkpointing,
            dtype=_DTYPES[plan.precision],
            trust_remote_code=plan.trust_remote_code,
        )
    except (ValueError, OSError) as error:
        raise RequestError(
            f"the model cannot be built: {str(error).splitlines()[0]}",
            where=f"model={plan.model.name}",
            fix="check the model's config and weights",
        ) from error


def count_parameters(config: dict[str, Any], trust_remote_code: bool) -> int:
    """Count a model's parameters on the meta device, for families the formulas do not know."""
    try:
        return model_build.count_parameters(config, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise RequestError(
            f"transformers does not know this model: {str(error).splitlines()[0]}",
            where=f"model_type={config.get('model_type')!r} in its config",
            fix="name a causal language model that this version of transformers has",
        ) from error


def parameter_groups(model: torch.nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Split the parameters into decayed matrices and undecayed vectors (biases, norms).

    Decaying a norm's gain towards zero is not regularisation; matrices and embeddings are what GPT-3 decays.
    """
    decay = plan.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        # Under zero.Init a parameter's own shape is empty; ds_shape is the real one.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        groups[dimensions >= 2].append(parameter)
    return [
        {"params": members, "weight_decay": decay if is_matrix else 0.0}
        for is_matrix, members in groups.items()
        if members
    ]


def _check(engine: DeepSpeedEngine, plan: Plan) -> None:
    """Compare what DeepSpeed built with what was planned: it accepts what it does not understand (T6)."""
    built = {
        "stage": (engine.zero_optimization_stage(), plan.zero),
        "accumulation": (engine.gradient_accumulation_steps(), plan.batch.accumulation),
        "global batch": (engine.train_batch_size(), plan.batch.global_),
        "clipping": (float(engine.gradient_clipping()), plan.clip),
        "weights": (next(engine.module.parameters()).dtype, _DTYPES[plan.precision]),
    }
    for what, (actual, planned) in built.items():
        if actual != planned:
            raise RefusedError(
                f"DeepSpeed built {what} {actual}, planned was {planned}",
                where="the engine that deepspeed.initialize returned",
                fix="check ds.* keys and --ds-config, and run `halfstep doctor` for the tested versions",
            )
