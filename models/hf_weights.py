"""Loads trained weights, and refuses those that are not the configuration's: nothing is made up or left out."""

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from halfstep.models.collective import broadcast, gather_texts
from halfstep.models.draw import gathered
from halfstep.models.hf_config import Unfit, one_line, quiet

_COMPARED_ELEMENTS = 1 << 24
_SAVE_AGAIN = (
    "correct the config; or, if the file has more than is wanted, load it with transformers and save it to another "
    "folder with save_pretrained"
)


Values = Callable[[str], Tensor]
"""Returns the value of a parameter or a persistent buffer by its name; raises KeyError for one that it has not."""


def load(weights: str | Values, configuration: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a configuration with the weights of a folder or hub id, whole, on the CPU.

    Raises Unfit where the files are missing or damaged, and for every parameter that one of the two has and the other
    has not, that has another shape, or that one of the two ties to another and the other does not.
    """
    if not isinstance(weights, str):
        return _filled(weights, configuration, options)
    model, report = _from_pretrained(weights, configuration, options)
    _check_names(model, report, weights)
    untied = [pair for pair in ties(model).items() if model.get_parameter(pair[0]) is not model.get_parameter(pair[1])]
    if untied:
        raise _untied(weights, *untied[0])
    _freeze(model, configuration, options)
    return model


@torch.no_grad()
def _filled(values: Values, configuration: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(configuration), **options)
    model.tie_weights()
    kept = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in kept:
            continue  # a buffer that is worked out again
        try:
            value = values(name)
        except KeyError:
            raise Unfit(f"the weights lack {name} of the model", "start from an export of it instead") from None
        if value.numel() != tensor.numel():
            raise Unfit(f"{name} has {value.numel()} elements in the weights and {tensor.numel()} in the model")
        tensor.copy_(value.view(tensor.shape))
    return model


def check(weights: str, configuration: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Do what `load` does on the meta device: names and shapes are read, and no values but those of tied parameters."""
    model, report = _from_pretrained(weights, configuration, {**options, "device_map": "meta"})
    _check_names(model, report, weights)
    for target, source in ties(model).items():
        if _differ(weights, target, source):
            raise _untied(weights, target, source)


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return which parameters the configuration ties to which others, by name."""
    return model.get_expanded_tied_weights_keys(all_submodels=True)


def scatter(
    model: PreTrainedModel, weights: str | Values, configuration: PreTrainedConfig, options: dict[str, Any]
) -> None:
    """Fill a model that stage 3 has partitioned with what rank 0 loads as any other stage does. A collective call.

    transformers' own loader for stage 3 reports no names that are left over and ties what the file does not tie
    (integrations/deepspeed.py, _load_state_dict_into_zero3_model).
    """
    whole, problem = None, ""
    if torch.distributed.get_rank() == 0:
        try:
            whole = load(weights, configuration, options)
        except Unfit as error:
            problem = f"{error}\n{error.fix or ''}"
    what, _, fix = gather_texts(problem)[0].partition("\n")
    if what:
        raise Unfit(what, fix or None)
    values = dict(whole.named_parameters()) if whole else {}
    for name, parameter in model.named_parameters():
        with torch.no_grad(), gathered([parameter], modifier_rank=0):
            if whole:
                value = values.pop(name)
                parameter.copy_(value)
                value.data = value.new_empty(0)  # what has been handed out need not lie here any longer
    buffers = dict(whole.named_buffers()) if whole else {}
    for name, buffer in model.named_buffers():
        # The others learn the type from rank 0: transformers keeps some in fp32 that were made in 16 bits.
        dtype = gather_texts(str(buffers[name].dtype) if whole else "")[0].removeprefix("torch.")
        value = buffers[name] if whole else torch.empty_like(buffer, dtype=getattr(torch, dtype))
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = broadcast(value).to(buffer.device)


def _from_pretrained(
    weights: str, configuration: PreTrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                weights, config=configuration, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
            return loaded
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a file, or what it was written by, makes torch and safetensors raise
        if "DefaultCPUAllocator" in str(error):
            raise
        file = _damaged(weights)
        raise Unfit(
            f"the weights of {file or weights} cannot be loaded: {one_line(error)}",
            "fetch or copy that file again" if file else "fetch them again, or save them again with transformers",
        ) from error


def _freeze(model: PreTrainedModel, configuration: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Freeze what a constructor froze: a loader makes every parameter again (transformers, core_model_loading.py)."""
    with quiet(), torch.device("meta"):
        made = AutoModelForCausalLM.from_config(copy.deepcopy(configuration), **options)
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def _check_names(model: PreTrainedModel, report: dict[str, Any], weights: str) -> None:
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    wrong = sorted(report["mismatched_keys"])
    if missing and unexpected and len(missing) + 2 >= len(dict(model.named_parameters())):
        there, wanted = unexpected[0], missing[0]
        raise Unfit(
            f"the weights of {weights} have other names than the model's: {there} is there, {wanted} is not",
            "take the config.json that belongs to them, or save them again with transformers",
        )
    if missing == [_head(model)] and not ties(model):
        raise Unfit(
            f"the weights of {weights} lack {missing[0]}, and the config does not tie it to the input embedding",
            "set tie_word_embeddings to true in config.json if the weights were trained so; a model without a head "
            "cannot be trained",
        )
    if missing:
        raise Unfit(f"the weights of {weights} lack {_several(missing)} of the model", _SAVE_AGAIN)
    if unexpected:
        raise Unfit(f"the weights of {weights} have {_several(unexpected)} that the config's model lacks", _SAVE_AGAIN)
    if wrong:
        name, there, here = wrong[0]
        raise Unfit(
            f"{name} is {list(there)} in {_file_of(name, weights)} and {list(here)} in the config's model"
            + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""),
            "take the config.json that belongs to the weights",
        )


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} parameters, such as {names[0]},"


def _head(model: PreTrainedModel) -> str | None:
    weight = getattr(model.get_output_embeddings(), "weight", None)
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    return names.get(id(weight))


def _untied(weights: str, target: str, source: str) -> Unfit:
    return Unfit(
        f"the weights of {weights} have a {target} of their own, and the config ties it to {source}",
        "set tie_word_embeddings to false in config.json, or remove that tensor from the file",
    )


def _differ(weights: str, target: str, source: str) -> bool:
    """Tell whether a folder has two tensors of these names that differ; False where it has not both."""
    places = {name: file for file in sorted(Path(weights).glob("*.safetensors")) for name in _names(file)}
    if target not in places or source not in places:
        return False
    with safe_open(places[target], framework="pt") as tied, safe_open(places[source], framework="pt") as own:
        left, right = tied.get_slice(target), own.get_slice(source)
        if left.get_shape() != right.get_shape():
            return True
        rows = max(1, _COMPARED_ELEMENTS // max(1, left.get_shape()[-1]))
        starts = range(0, left.get_shape()[0], rows)
        return not all(torch.equal(left[at : at + rows], right[at : at + rows]) for at in starts)


def _file_of(name: str, weights: str) -> str:
    """Return the file of a folder that has a tensor of this name, or else the folder."""
    return next((str(file) for file in sorted(Path(weights).glob("*.safetensors")) if name in _names(file)), weights)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as content:
        return list(content.keys())


def _damaged(weights: str) -> Path | None:
    """Return the file of a folder that is cut short or damaged, where that can be told."""
    for file in sorted(Path(weights).glob("*.safetensors")):
        try:
            _names(file)
        except (SafetensorError, OSError):
            return file
    pickles = sorted(Path(weights).glob("pytorch_model*.bin"))
    broken = [file for file in pickles if _start(file) == b"PK" and not zipfile.is_zipfile(file)]
    return broken[0] if broken else None


def _start(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(2)
