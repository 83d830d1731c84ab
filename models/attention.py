"""Attention that is causal by its kernel's own argument, where a model asks for nothing but that."""

from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa_without_mask"
"""transformers' name of it, in a configuration while a model trains; configurations are saved without one."""
_WINDOWS = {"input_ids", "inputs_embeds", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}
"""What may be given to a model whose rows are windows: no padding, no positions of documents, no cache."""


def leave_out_masks(model: PreTrainedModel) -> None:
    """Let windows go through a model without a mask: SDPA's `is_causal` does what it would say, in a faster kernel.

    For models of which `observe` says that they are plainly causal. The attention is transformers' own; there is no
    mask function of its name, and without one transformers makes no mask and reads no positions
    (masking_utils.py, _preprocess_mask_arguments), eager and compiled. Under its own name `sdpa` it looks for documents
    in the positions at every pass, which waits for the device, and builds a mask whenever it is traced, before torch
    2.14 (_ignore_causal_mask_sdpa). Whatever else is given to the model goes under that name all the same.
    """
    AttentionInterface.register(NAME, sdpa_attention_forward)
    model.base_model.register_forward_pre_hook(_choose, with_kwargs=True)


def _choose(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    config: Any = module.config
    windows = len(arguments) <= 1 and all(name in _WINDOWS for name, value in options.items() if value is not None)
    name = NAME if windows else "sdpa"
    if config._attn_implementation != name:
        config._attn_implementation = name
