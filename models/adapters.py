"""Puts low-rank adapters into a model with peft, initialised the same at every ZeRO stage and number of ranks."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfstep.models.draw import seed_of, shape_of
from halfstep.models.hf_config import Unfit
from halfstep.models.lora import Linear, Lora, is_named

NAME = "default"
"""What peft calls the one adapter: it stands in the names of its parameters."""
_A, _B = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"


def insert(model: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Freeze a model and give the targeted layers adapters in the type of its weights, the only ones that are trained.

    A is drawn in fp32 from the seed and its layer's name alone, uniformly within 1 / sqrt(inputs) as peft does; B is 0.
    At stage 3 every rank makes all adapters whole, and DeepSpeed cuts them up with its own. The caller's random state
    is changed. Raises Unfit where a target is no linear layer of the model.
    """
    from peft import inject_adapter_in_model

    layers = targeted(model, lora)
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():  # of layers of both orientations
        warnings.simplefilter("ignore")
        inject_adapter_in_model(configuration(model, lora, [layer.name for layer in layers]), model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if not is_adapter(name):
            continue
        with torch.no_grad():
            parameter.data = (drawn(name, parameter, seed) if name.endswith(_A) else torch.zeros_like(parameter)).to(
                dtype
            )
    # A block whose input has no gradient ends its backward pass for torch's hooks before it has begun, and stage 3
    # reduces a block's gradients in such a hook (stage3.py, reduce_leaf_module_grads).
    model.get_input_embeddings().register_forward_hook(_require_gradient)


def configuration(model: nn.Module, lora: Lora, targets: list[str]) -> Any:
    """Return peft's LoraConfig for some layers, by their names."""
    from peft import LoraConfig, TaskType

    kinds = [type(module) for name, module in model.named_modules() if is_named(name, targets)]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=Conv1D in kinds,
    )


def linear_layers(model: nn.Module) -> tuple[Linear, ...]:
    """Return the layers of a model that may have an adapter, in its order."""
    return tuple(
        Linear(name, *_sizes(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    )


def targeted(model: nn.Module, lora: Lora) -> tuple[Linear, ...]:
    """Return the layers that adapters are for; raises Unfit where a target is none or another kind of module."""
    layers = tuple(layer for layer in linear_layers(model) if is_named(layer.name, lora.targets))
    names = {layer.name for layer in layers}
    for name, _ in model.named_modules():
        if is_named(name, lora.targets) and name not in names:
            raise Unfit(f"{name} is no linear layer, and has no low-rank adapter", "correct lora.targets")
    if len(layers) != lora.layers:
        raise Unfit(f"{len(layers)} layers have the names in lora.targets, planned were {lora.layers}")
    return layers


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is one of an adapter's, by its name."""
    return name.endswith((_A, _B))


def layer_of(name: str) -> str:
    """Return the name of the layer that has an adapter's parameter."""
    return name.removesuffix(_A).removesuffix(_B)


def drawn(name: str, parameter: Tensor, seed: int) -> Tensor:
    """Return the first values of A, (rank, inputs) in fp32 on the CPU."""
    shape = shape_of(parameter)
    random = torch.Generator().manual_seed(seed_of(f"{seed}:{name}"))
    return torch.empty(shape, dtype=torch.float32).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=random)


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inputs, outputs = shape_of(module.weight)  # pyright: ignore[reportArgumentType]
    return inputs, outputs


def _require_gradient(module: nn.Module, given: Any, made: Any) -> None:
    if torch.is_grad_enabled() and isinstance(made, Tensor) and not made.requires_grad:
        made.requires_grad_(True)
