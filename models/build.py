"""Turns a transformers configuration into a causal language model, initialised the same at every ZeRO stage."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

Owned = tuple[nn.Module, PreTrainedModel]
"""A module and the (sub-)model whose `_init_weights` knows how to initialise it."""


def build(
    config: dict[str, Any],
    *,
    seed: int,
    zero3: dict[str, Any] | None = None,
    weights: str | None = None,
    activation_checkpointing: bool = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the causal language model of a transformers configuration, in training mode, without a key-value cache.

    `zero3` is the DeepSpeed configuration when the stage is 3, else None: with it the model is made under `zero.Init`
    in that configuration's precision and is never whole on any rank; `torch.distributed` and LOCAL_RANK must be set up,
    and every rank must call. Otherwise `dtype` (fp32 by default) is the parameters' type. `weights` is the path or hub
    id of a checkpoint to load; without it, every parameter is drawn in fp32 from `seed`, by the architecture's own
    initialisation, and then rounded: bitwise the same at every stage, world size and rank. The caller's random state is
    left as it was. With `trust_remote_code`, code named in `auto_map` is read from `weights` or else from the
    configuration's `_name_or_path`.

    Raises ValueError, one sentence, for a configuration that makes no model, a parameter without elements, and a
    checkpoint that is missing or does not fit.
    """
    configuration = _configuration(config, weights, trust_remote_code)
    if zero3 is not None:
        dtype = _zero3_dtype(zero3)
    options: dict[str, Any] = {"dtype": dtype or torch.float32, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(devices=[]):  # everything is drawn on the CPU
        if weights is None:
            with _construction(zero3):
                model = AutoModelForCausalLM.from_config(configuration, **options)
            model.tie_weights()
            _refuse_empty(model)
            _initialise(model, seed)
        else:
            model = _load(weights, configuration, zero3, options)
            _refuse_empty(model)
    if activation_checkpointing:
        # Not reentrant: the other kind needs an input that requires gradients, and gathers once more at stage 3.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def count_parameters(config: dict[str, Any], *, trust_remote_code: bool = False) -> int:
    """Count the parameters of any transformers causal language model on the meta device, tied ones once.

    Raises ValueError, one sentence, for a configuration that makes no model.
    """
    configuration = _configuration(config, None, trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration, trust_remote_code=trust_remote_code)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Nothing is allocated here, so what the constructor objects to is the configuration.
        raise ValueError(f"the configuration makes no {configuration.model_type} model: {_one_line(error)}") from error
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def initial_statistics(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """Return (mean, standard deviation) of the input embedding and of every matrix of the last block, by name.

    They tell whether initialisation really happened. At stage 3 one parameter is gathered at a time: every rank must
    call.
    """
    blocks = [name for name, modules in _units(model) if _is_block(model, name) and modules]
    embedding = model.get_input_embeddings().weight
    statistics = {}
    for name, parameter in model.named_parameters():
        in_last_block = bool(blocks) and name.startswith(f"{blocks[-1]}.")
        if parameter is embedding or (in_last_block and len(_shape(parameter)) > 1):
            with _gathered([parameter]):
                values = parameter.detach().float()
                statistics[name] = (values.mean().item(), values.std().item())
    return statistics


def _configuration(config: dict[str, Any], weights: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    values, model_type = {**config, "use_cache": False}, config.get("model_type")
    try:
        if trust_remote_code and "AutoConfig" in config.get("auto_map", {}):
            source = weights or config.get("_name_or_path")
            if not source:
                raise ValueError("a configuration with code of its own must say in _name_or_path where that code is")
            return AutoConfig.from_pretrained(source, trust_remote_code=True, **values)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"transformers knows no model_type {model_type!r}")
        return CONFIG_MAPPING[model_type].from_dict(values)
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"the configuration makes no {model_type} model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _zero3_dtype(zero3: dict[str, Any]) -> torch.dtype:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    enabled = [dtype for key, dtype in half.items() if zero3.get(key, {}).get("enabled")]
    return enabled[0] if enabled else torch.float32


@contextmanager
def _construction(zero3: dict[str, Any] | None) -> Iterator[None]:
    """Make modules without initialising them, partitioned as they appear when the stage is 3.

    `zero.Init` is entered here and not by transformers (`_from_config` does it when a HfDeepSpeedConfig lives), because
    transformers would then initialise the model with rank 0's global random state, stage 3 alone.
    """
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if zero3 is not None:
            import deepspeed
            from transformers.integrations.deepspeed import prevent_arange_dtype_change

            stack.enter_context(prevent_arange_dtype_change())  # zero.Init would make rotary frequencies 16-bit
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero3))
        yield


def _load(
    weights: str, configuration: PreTrainedConfig, zero3: dict[str, Any] | None, options: dict[str, Any]
) -> PreTrainedModel:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers finds it through a weak reference and loads under zero.Init, rank 0 reading; it lives until then.
    live = HfDeepSpeedConfig(zero3) if zero3 is not None else None
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            weights, config=configuration, output_loading_info=True, **options
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the weights of {weights} cannot be loaded: {_one_line(error)}") from error
    finally:
        del live
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"the weights of {weights} lack {len(missing)} parameters of the model, such as {missing[0]}")
    return model


def _refuse_empty(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if math.prod(_shape(parameter)) == 0:
            # At stage 3 DeepSpeed ends in an AssertionError about a parameter that is NOT_AVAILABLE.
            raise ValueError(
                f"parameter {name} has no elements (shape {tuple(_shape(parameter))}); DeepSpeed needs one"
            )


def _initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter in fp32 on the CPU, unit by unit, each unit from its own seed, and round it into the model.

    What a unit gets depends on the seed and its name alone, so any rank can draw any unit: at stage 3 the ranks draw
    one each at the same time, and no more than one is gathered at once. Parameters are tied before and drawn once.
    """
    units = list(_units(model))
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if partitioned else (0, 1)
    drawn: set[int] = set()
    undrawn: list[str] = []
    for first in range(0, len(units), world_size):
        values = []
        for drawer, (name, modules) in enumerate(units[first : first + world_size]):
            values.append(_draw(name, modules, seed, skip=drawn, real=drawer == rank))
            drawn.update(id(parameter) for parameter, _ in values[-1])
        for drawer, pairs in enumerate(values):
            with torch.no_grad(), _gathered([parameter for parameter, _ in pairs], modifier_rank=drawer):
                if drawer == rank:
                    for parameter, value in pairs:
                        parameter.copy_(value)
                    undrawn += [units[first + drawer][0] for _, value in pairs if not value.isfinite().all()]
    if partitioned:  # a rank that stopped alone would leave the others waiting
        gathered: list[list[str]] = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(gathered, undrawn)
        undrawn = [where for part in gathered for where in part]
    if undrawn:
        where = undrawn[0] or "the outermost module"
        raise ValueError(f"{type(model).__name__}._init_weights leaves parameters of {where} without a value")


def _draw(
    name: str, modules: list[Owned], seed: int, *, skip: set[int], real: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the unit's parameters that are not in `skip` and their values, on the meta device when not `real`.

    transformers' own `_init_weights` does the drawing, on stand-ins put in the parameters' place; what it forgets stays
    nan. Parameters in `skip` get stand-ins on the meta device, which cost nothing and forget what is written. Buffers
    (rotary frequencies) are set in place, and therefore on every rank.
    """
    stand_ins: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    places = [(module, key, p) for module, _ in modules for key, p in module._parameters.items() if p is not None]
    for _, _, parameter in places:
        device = "cpu" if real and id(parameter) not in skip else "meta"
        value = torch.full(_shape(parameter), math.nan, dtype=torch.float32, device=device)
        stand_ins.setdefault(id(parameter), (parameter, nn.Parameter(value, requires_grad=False)))
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    torch.random.default_generator.manual_seed(int.from_bytes(digest))
    try:
        for module, key, parameter in places:
            module._parameters[key] = stand_ins[id(parameter)][1]
        with torch.no_grad(), guard_torch_init_functions():
            for module, owner in modules:
                owner._init_weights(module)
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
    return [pair for identity, pair in stand_ins.items() if identity not in skip]


def _units(model: PreTrainedModel) -> Iterator[tuple[str, list[Owned]]]:
    """Yield (name, modules, children first) of the pieces that are gathered and initialised together.

    A unit is a transformer block (an entry of an outermost ModuleList), or a module above the blocks with its children
    that have no blocks: a parent's `_init_weights` may write its children's parameters, as GPT-2's blocks do.
    """

    def subtree(module: nn.Module, owner: PreTrainedModel) -> list[Owned]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        below = [pair for child in module.children() for pair in subtree(child, owner)]
        return [*below, (module, owner)]

    def walk(name: str, module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[str, list[Owned]]]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        rest: list[Owned] = []
        for key, child in module.named_children():
            path = f"{name}.{key}".lstrip(".")
            if isinstance(module, nn.ModuleList):
                yield path, subtree(child, owner)
            elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
                yield from walk(path, child, owner)
            else:
                rest += subtree(child, owner)
        yield name, [*rest, (module, owner)]

    yield from walk("", model, model)


def _is_block(model: PreTrainedModel, name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    return bool(name) and isinstance(model.get_submodule(parent), nn.ModuleList)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # a partitioned parameter itself has the shape (0,)


def _gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)
