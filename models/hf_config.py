"""Turns the content of a config.json into a transformers configuration for training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SPECIAL = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_WITHOUT_LIMIT = ("rwkv",)
"""Their `max_position_embeddings` bounds a CUDA kernel of old, not the model."""


class Unfit(ValueError):
    """A model that cannot be made; its text says why, `fix` what to do where that is known."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.fix = fix


def configuration(config: dict[str, Any], *, source: str | None = None, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the configuration of a config.json's content, without a key-value cache.

    `source` is the folder or hub id whose code runs where `trust_remote_code` allows it and `auto_map` names it.
    `{"__float__": "Infinity"}` is infinity, as transformers writes it. Raises Unfit, one sentence.
    """
    values, model_type = {**_decoded(config), "use_cache": False}, config.get("model_type")
    own_code = "AutoConfig" in (config.get("auto_map") or {})
    try:
        if trust_remote_code and own_code:
            source = source or config.get("_name_or_path")
            if not source:
                raise Unfit("the configuration has code of its own, and nothing says where that code is")
            made = AutoConfig.from_pretrained(source, trust_remote_code=True, **values)
        elif model_type not in CONFIG_MAPPING:
            raise Unfit(
                f"transformers knows no model_type {model_type!r}",
                "trust_remote_code=true lets it run the Python code in its folder, if you trust that"
                if own_code
                else None,
            )
        elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise Unfit(f"transformers has no causal language model of model_type {model_type!r}")
        else:
            made = CONFIG_MAPPING[str(model_type)].from_dict(values)
        made.get_text_config(decoder=True).use_cache = False
    except Unfit:
        raise
    except Exception as error:  # whatever the configuration's own class, or code that is trusted, objects with
        raise Unfit(f"the configuration makes no {model_type} model: {one_line(error)}") from error
    return made


def positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model can look at, None where nothing limits them."""
    text = model.config.get_text_config(decoder=True)
    if text.model_type in _WITHOUT_LIMIT:
        return None
    stated = next((value for name in _POSITIONS if isinstance(value := getattr(text, name, None), int)), 0)
    limits = [stated] if stated > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # counted from after the padding, as RoBERTa
    return min(limits) if limits else None


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many token ids a model reads and predicts: the rows of its embedding or its head, the fewer."""
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if _is_table(table)]
    rows = [table.weight.shape[0] for table in tables]
    return min(rows) if rows else int(model.config.get_text_config(decoder=True).vocab_size)


def width(model: PreTrainedModel) -> int:
    """Return the elements of an input embedding."""
    table = model.get_input_embeddings()
    return table.weight.shape[1] if _is_table(table) else int(model.config.get_text_config(decoder=True).hidden_size)


def _is_table(module: Any) -> TypeGuard[nn.Embedding]:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and printing tables: what is wrong becomes an error of ours."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _SPECIAL:
            return _SPECIAL[value["__float__"]]
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value
