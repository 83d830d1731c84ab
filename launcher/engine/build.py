"""Build the model and the DeepSpeed engine of a Plan, and check that DeepSpeed built what was planned."""

import contextlib
import dataclasses
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel

from halfstep.launcher.checkpoint.merged import opened
from halfstep.launcher.config import optimizers, precisions
from halfstep.launcher.engine.numerics import cpu_fp16
from halfstep.launcher.engine.numerics.repair import Repairs, repair
from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.engine.state import average
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.plan.construct import no_plain_head, unfit
from halfstep.launcher.plan.plan import Plan
from halfstep.models import network as model_build
from halfstep.models.fused_head import FusedHead
from halfstep.models.islands import keep_in_fp32
from halfstep.models.observe import Observed, blocks, leave_out_masks, observe

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PROGRAMS_OF_A_BLOCK = 8
"""For training and evaluation, for the rows of a last batch, and with documents in its rows or without."""


def build(plan: Plan) -> tuple[Engine, Repairs]:
    """Return an engine whose optimizer holds the planned parameters, and what had to be repaired in it.

    Raises RequestError for a model that cannot be built.
    """
    precision = precisions.of(plan.precision)
    cpu_fp16.prepare(precision.products, plan.topology.accelerator, compiled=plan.compile)
    set_matrix_precision(plan)
    model = _model(plan)
    seen = _observed(plan)
    if seen.plainly_causal:
        leave_out_masks(model)
    _keep_in_fp32(model, plan)
    if plan.fused_head:
        FusedHead(_plain_head(model, plan, seen), plan.model.vocabulary)
    if plan.zero == 3:
        _gather_blocks_at_once(model, seen)
        _gather_experts_at_once(model)
    names = _compiled_optimizer(plan)
    with contextlib.redirect_stdout(io.StringIO()):
        if names:
            # Torch's cannot keep masters in 16 bits (rules_deepspeed.py).
            otherwise = "take torch's own, ds.optimizer.params.torch_adam=true (masters in 16 bits have to go, then)"
            opcache.load_operators(names, otherwise=otherwise)
        # An optimizer built by DeepSpeed from the config, over our parameter groups.
        groups: Any = parameter_groups(model, plan)  # DeepSpeed's annotation says Module
        with _flat_at_stage_0(plan), _embeddings_left_to_adam(model):
            engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=plan.deepspeed)
    _check(engine, plan)
    repairs = repair(engine, plan)
    average.begin(engine, plan.ema_decay)
    if plan.compile:
        _compile_blocks(engine, plan, seen)
    return engine, repairs


def set_matrix_precision(plan: Plan) -> None:
    """Let a GPU multiply fp32 matrices in TF32 where that is asked for, in this process, and nowhere else."""
    torch.set_float32_matmul_precision("high" if precisions.of(plan.precision).products == "tf32" else "highest")


@contextlib.contextmanager
def _flat_at_stage_0(plan: Plan) -> Iterator[None]:
    """Let stage 0 wrap torch's fused Adam as it wraps DeepSpeed's: masters flat, not unscaled and normed one by one.

    It goes by the class alone (engine.py, _configure_fp16_optimizer).
    """
    module: Any = importlib.import_module("deepspeed.runtime.engine")
    own = module.FusedAdam
    if plan.deepspeed["optimizer"].get("params", {}).get("fused"):
        module.FusedAdam = (own, torch.optim.Adam, torch.optim.AdamW)
    try:
        yield
    finally:
        module.FusedAdam = own


@contextlib.contextmanager
def _embeddings_left_to_adam(model: PreTrainedModel) -> Iterator[None]:
    """Let Muon orthogonalize hidden matrices alone, for which it is made: embeddings and the head are Adam's.

    DeepSpeed knows them by `embed` and `lm_head` in their names (__init__.py, set_optimizer_flags); GPT-2's are `wte`
    and `wpe`.
    """
    module: Any = deepspeed
    own = module.set_optimizer_flags
    tables = [part for part in model.modules() if isinstance(part, torch.nn.Embedding)]

    def tag(config: Any, network: torch.nn.Module) -> None:
        own(config, network)
        for part in filter(None, (*tables, model.get_output_embeddings())):
            weight: Any = part.weight
            if hasattr(weight, "use_muon"):
                weight.use_muon = False

    module.set_optimizer_flags = tag
    try:
        yield
    finally:
        module.set_optimizer_flags = own


def learn_gathering_anew(engine: Engine) -> None:
    """Let stage 3 forget the order of the forward passes so far; call where training begins. Other stages have none.

    What may be given back after a module is worked out once and kept for the process, whatever becomes of the order
    that it was worked out from (partitioned_param_coordinator.py, __params_to_release, an lru_cache). Of a forward pass
    alone nothing is needed again, so that after an evaluation every weight would be gathered twice in all later
    micro-steps, where a model as small as `stage3_max_live_parameters` can stay for its backward pass.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    coordinator: Any = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    # Another version may have no such cache; one that has it wraps it in what measures.
    kept = getattr(type(coordinator), "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(kept, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def is_compiled(engine: Engine) -> bool:
    """Tell whether the engine's blocks are compiled."""
    return any(hasattr(block.forward, "_torchdynamo_orig_callable") for block in blocks(engine.module).values())


def _compile_blocks(engine: Engine, plan: Plan, seen: Observed) -> None:
    """Compile each block by itself: the compiler makes one program for all blocks of a kind, however many there are.

    What is compiled is `forward` alone. DeepSpeed's hooks stay outside of it, which at stage 3 fetch a block's weights
    before and give them back after (zero/parameter_offload.py, _register_deepspeed_module): there it must be a leaf.
    """
    kinds = {name: block for name, block in blocks(engine.module).items() if plan.zero < 3 or name in seen.whole_blocks}
    if not kinds:
        which, way_out = (" that stage 3 gathers whole", " or zero=2") if plan.zero == 3 else ("", "")
        raise RefusedError(
            f"of {plan.model.name} no block can be compiled{which}",
            where="compile=true",
            fix=f"take compile=false{way_out}",
        )
    torch._dynamo.reset()  # programs of an engine that this process had before would count against the limit
    # Where blocks differ in a number, each is a kind of its own; beyond the limit torch would run the rest uncompiled.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _PROGRAMS_OF_A_BLOCK * len(kinds))
    for block in kinds.values():
        block.forward = torch.compile(block.forward)


def _keep_in_fp32(model: PreTrainedModel, plan: Plan) -> None:
    """Let autocast leave alone what the plan names; raises RequestError where that is no module, or fused."""
    if not plan.keep_fp32:
        return
    where = f"keep_fp32={','.join(plan.keep_fp32)}"
    try:
        kept = keep_in_fp32(model, plan.keep_fp32, plan.topology.accelerator)
    except ValueError as error:
        raise RequestError(f"{plan.model.name} has other modules: {error}", where=where, fix="correct it") from None
    head = model.get_output_embeddings()
    if plan.fused_head and any(model.get_submodule(name) is head for name in kept):
        raise RequestError(
            "a fused head has no forward pass of its own that could stay in fp32",
            where=f"fused_head=true and {where}",
            fix="take fused_head=false, or leave the head out of keep_fp32",
        )


def _plain_head(model: PreTrainedModel, plan: Plan, seen: Observed) -> torch.nn.Linear:
    """Return the head whose products are the model's logits."""
    head = model.get_output_embeddings()
    if not seen.plain_head or not isinstance(head, torch.nn.Linear):
        raise no_plain_head(f"model={plan.model.name}")
    return head


def _gather_blocks_at_once(model: PreTrainedModel, seen: Observed) -> None:
    """Let stage 3 fetch a block as a whole: with two hooks a block instead of two for each module in it.

    Its gradients are reduced together, by a hook of torch's on the block (stage3.py, reduce_leaf_module_grads), which
    sees positional tensors alone and fires at every call.
    """
    for name in seen.whole_blocks:
        deepspeed.utils.set_z3_leaf_module(model.get_submodule(name), True)


def _gather_experts_at_once(model: PreTrainedModel) -> None:
    """Let stage 3 look at no module inside a layer's experts: which of them run, and how often, differs by rank.

    It compares the order in which modules run over all ranks, and ends where the orders differ
    (partitioned_param_coordinator.py, reset_step).
    """
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf != "experts":
            continue
        if isinstance(module, torch.nn.ModuleList):
            deepspeed.utils.set_z3_leaf_module(model.get_submodule(parent), True)
        elif not any(list(child.parameters()) for child in module.children()):
            # JetMoE calls what its experts are made of one by one: nothing would gather that.
            deepspeed.utils.set_z3_leaf_module(module, True)


def _compiled_optimizer(plan: Plan) -> list[str]:
    """Return the operator that DeepSpeed will compile for the optimizer (engine.py, _configure_basic_optimizer)."""
    optimizer = plan.deepspeed["optimizer"]
    operators = optimizers.of(optimizer["type"]).operators
    if operators is None or optimizer.get("params", {}).get("torch_adam", False):
        return []
    offloaded = plan.deepspeed["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    on_host, on_device = operators
    return [on_host if offloaded or plan.topology.accelerator == "cpu" else on_device]


def _model(plan: Plan) -> PreTrainedModel:
    try:
        return model_build.build(
            plan.model.config,
            seed=plan.seed,
            zero3=plan.deepspeed if plan.zero == 3 else None,
            weights=opened(plan.model.weights, plan.model.weights_digest),
            source=_home(plan.model.name),
            activation_checkpointing=plan.activation_checkpointing,
            dtype=_DTYPES[precisions.of(plan.precision).weights],
            trust_remote_code=plan.trust_remote_code,
            lora=plan.lora,
        )
    except (ValueError, OSError) as error:
        raise unfit(error, f"model={plan.model.name}", "the model cannot be built") from error


def _observed(plan: Plan) -> Observed:
    """Return what the model does in a pass; weights on NVMe come through few buffers, which no whole block fits."""
    own, source = plan.trust_remote_code, _home(plan.model.name)
    seen = observe(model_build.skeleton(plan.model.config, source=source, trust_remote_code=own))
    on_nvme = plan.deepspeed["zero_optimization"].get("offload_param", {}).get("device") == "nvme"
    return dataclasses.replace(seen, whole_blocks=()) if on_nvme else seen


def _home(name: str) -> str | None:
    """Return where the code of an `hf:` model's own would be: its folder or hub id."""
    if not name.startswith("hf:"):
        return None
    path = Path(name[3:])
    return str(path.parent if path.is_file() else path)


def parameter_groups(model: torch.nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Split the parameters into the groups of the optimizer's row: decayed matrices, undecayed biases and norms."""
    row = optimizers.of(plan.deepspeed["optimizer"]["type"])
    decay = plan.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)
    groups: dict[optimizers.Group, list[torch.nn.Parameter]] = {group: [] for group in row.groups}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue  # DeepSpeed ends in an IndexError over a group in which nothing is trained
        # Under zero.Init a parameter's own shape is empty; ds_shape is the real one.
        groups[row.group_of(len(getattr(parameter, "ds_shape", parameter.shape)))].append(parameter)
    return [
        {"params": members, "weight_decay": decay if group.decayed else 0.0}
        for group, members in groups.items()
        if members
    ]


def _check(engine: Engine, plan: Plan) -> None:
    """Compare what DeepSpeed built with what was planned: it accepts what it does not understand (T6)."""
    built = {
        "stage": (engine.zero_optimization_stage(), plan.zero),
        "accumulation": (engine.gradient_accumulation_steps(), plan.batch.accumulation),
        "global batch": (engine.train_batch_size(), plan.batch.global_),
        "clipping": (float(engine.gradient_clipping()), plan.clip),
        "weights": (next(engine.module.parameters()).dtype, _DTYPES[precisions.of(plan.precision).weights]),
        "parameters": (
            model_build.count_parameters(engine.module),
            plan.model.parameters + (plan.lora.parameters if plan.lora else 0),
        ),
    }
    for what, (actual, planned) in built.items():
        if actual != planned:
            raise RefusedError(
                f"DeepSpeed built {what} {actual}, planned was {planned}",
                where="the engine that deepspeed.initialize returned",
                fix="check ds.* keys and --ds-config, and run `halfstep doctor` for the tested versions",
            )
