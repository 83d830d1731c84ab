"""Turns a transformers configuration into a causal language model, initialised the same at every ZeRO stage."""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from halfstep.models import adapters
from halfstep.models import hf_weights as pretrained
from halfstep.models.draw import Kind, gathered, initialise, shape_of, units_of
from halfstep.models.hf_config import Unfit, configuration, one_line, quiet
from halfstep.models.hf_weights import Values
from halfstep.models.lora import Lora


def build(
    config: dict[str, Any],
    *,
    seed: int,
    zero3: dict[str, Any] | None = None,
    weights: str | Values | None = None,
    source: str | None = None,
    activation_checkpointing: bool = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
) -> PreTrainedModel:
    """Return the causal language model of a transformers configuration, in training mode, without a key-value cache.

    `zero3` is the DeepSpeed configuration when the stage is 3, else None: with it the model is made under `zero.Init`
    in that configuration's precision and is never whole on any rank; `torch.distributed` and LOCAL_RANK must be set up,
    and every rank must call. Otherwise `dtype` (fp32 by default) is the parameters' type. `weights` is the path or hub
    id of a checkpoint to load, or what gives values by name (at stage 3 to rank 0, whole); without it, every parameter
    is drawn in fp32 from `seed`, by the architecture's own initialisation, and then rounded: bitwise the same at every
    stage, world size and rank.
    The caller's random state is left as it was. With `lora`, adapters are put in and all else is frozen. With
    `trust_remote_code`, code named in `auto_map` is read from `source`, or else from `weights` or the configuration's
    `_name_or_path`.

    Raises Unfit, one sentence, for a configuration that makes no model, a parameter without elements, and a checkpoint
    that is missing, damaged or not of this model.
    """
    home = weights if isinstance(weights, str) else None
    made = configuration(config, source=source or home, trust_remote_code=trust_remote_code)
    if zero3 is not None:
        dtype = _zero3_dtype(zero3)
    options: dict[str, Any] = {"dtype": dtype or torch.float32, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(devices=[]):  # everything is drawn on the CPU
        if weights is not None and zero3 is None:
            model = pretrained.load(weights, made, options)
        else:
            with _construction(zero3):
                model = AutoModelForCausalLM.from_config(made, **options)
            model.tie_weights()
            if zero3 is not None:
                _restore_constants(model, made, options)
        _refuse_empty(model)
        _train_padding(model)
        if weights is None:
            initialise(model, seed, lambda kind, number: _constructed(made, trust_remote_code, kind, number))
        elif zero3 is not None:
            pretrained.scatter(model, weights, made, options)
        if lora is not None:
            adapters.insert(model, lora, seed)
    if activation_checkpointing:
        # Not reentrant: the other kind needs an input that requires gradients, and gathers once more at stage 3.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def skeleton(config: dict[str, Any], *, source: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return any transformers causal language model on the meta device, with nothing in it.

    Raises Unfit, one sentence, for a configuration that makes no model, and one with a parameter without elements.
    """
    with quiet():
        made = configuration(config, source=source, trust_remote_code=trust_remote_code)
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except ImportError as error:
        what = f"a {made.model_type} model needs a package that is not here: {one_line(error)}"
        raise Unfit(what, "install it, where the ranks will run too") from error
    except Exception as error:  # nothing is allocated here, so what any constructor objects to is the configuration
        raise Unfit(f"the configuration makes no {made.model_type} model: {one_line(error)}", _advice(made)) from error
    _refuse_empty(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Unfit(f"no parameter of this {made.model_type} model is trained")
    return model


def count_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of a model, tied ones once, whole or partitioned."""
    return sum(math.prod(shape_of(parameter)) for parameter in model.parameters())


def initial_statistics(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """Return (mean, standard deviation) of the input embedding and of every matrix of the last block, by name.

    They tell whether initialisation really happened. At stage 3 one parameter is gathered at a time: every rank must
    call.
    """
    blocks = [name for name, modules in units_of(model) if _is_block(model, name) and modules]
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    statistics = {}
    for name, parameter in model.named_parameters():
        in_last_block = bool(blocks) and name.startswith(f"{blocks[-1]}.")
        if parameter is embedding or (in_last_block and len(shape_of(parameter)) > 1):
            with gathered([parameter]):
                values = parameter.detach().float()
                statistics[name] = (values.mean().item(), values.std().item())
    return statistics


def _zero3_dtype(zero3: dict[str, Any]) -> torch.dtype:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    enabled = [dtype for key, dtype in half.items() if zero3.get(key, {}).get("enabled")]
    return enabled[0] if enabled else torch.float32


def _advice(made: PreTrainedConfig) -> str | None:
    """Return what to change where a known mistake keeps a model from being made."""
    text = made.get_text_config(decoder=True)
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        return f"pad_token_id={padding} is no token of a vocabulary of {rows}: set it to null or below, in config.json"
    return None


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


def _restore_constants(model: PreTrainedModel, made: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Give a model made under `zero.Init` the buffers and plain tensors that it has at every other stage.

    `zero.Init` makes every tensor of a constructor in the run's precision, whatever type the constructor asks for
    (partition_parameters.py, get_new_tensor_fn_for_dtype): RecurrentGemma's normaliser has other digits then.
    """
    with no_init_weights(), _keeping(None):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(made), **options)
    for module, twin in zip(model.modules(), plain.modules(), strict=True):
        for own, others in ((module._buffers, twin._buffers), (vars(module), vars(twin))):
            for name, value in others.items():
                kept = own.get(name)
                if isinstance(value, Tensor) and isinstance(kept, Tensor) and not value.is_meta:
                    own[name] = value.to(kept.device)


def _constructed(made: PreTrainedConfig, trust_remote_code: bool, kind: Kind, seed: int) -> dict[str, Tensor]:
    """Return what the constructors give to one kind of parameters, in fp32, nan where they give nothing."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    whole, init_weights = copy.deepcopy(made), PreTrainedModel.init_weights
    torch.random.default_generator.manual_seed(seed)  # pyright: ignore[reportPrivateImportUsage]
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not set with nan
        PreTrainedModel.init_weights = lambda self: None
        with _keeping(kind):
            model = AutoModelForCausalLM.from_config(whole, dtype=torch.float32, trust_remote_code=trust_remote_code)
    finally:
        PreTrainedModel.init_weights = init_weights
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.is_meta}


@contextmanager
def _keeping(kind: Kind | None) -> Iterator[None]:
    """Move every parameter of another kind to the meta device as it appears, so that hardly any memory is needed."""
    register = nn.Module.register_parameter

    def register_and_move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and (type(module), name) != kind:
            moved = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = moved

    nn.Module.register_parameter = register_and_move  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _refuse_empty(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if math.prod(shape_of(parameter)) == 0:
            # At stage 3 DeepSpeed ends in an AssertionError about a parameter that is NOT_AVAILABLE.
            raise Unfit(f"parameter {name} has no elements (shape {tuple(shape_of(parameter))}); DeepSpeed needs one")


def _train_padding(model: PreTrainedModel) -> None:
    """Let the row of the padding token be drawn and trained like any other: training sequences have no padding.

    torch gives it neither a gradient nor, in transformers, a first value; and it often is the token that ends a text.
    Tables of positions are left alone: some models count positions from the padding's number on.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" not in name:
            module.padding_idx = None


def _is_block(model: PreTrainedModel, name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    return bool(name) and isinstance(model.get_submodule(parent), nn.ModuleList)
