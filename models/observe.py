"""What a forward pass asks for, seen without weights: its masks, and how its blocks and its head are called."""

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from halfstep.models.draw import units_of

_LENGTH = 16
"""Tokens of the pass; only what is asked for counts, not for how many."""
_OBSERVED = "halfstep_observed"
NAME = "sdpa_without_mask"
"""transformers' name of it, in a configuration while a model trains; configurations are saved without one."""
_WINDOWS = {"input_ids", "inputs_embeds", "use_cache", "return_dict",
            "output_attentions", "output_hidden_states", "output_router_logits"}  # fmt: skip
"""What may be given to a model whose rows are windows: no padding, no positions of documents, no cache."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a forward pass over a window of tokens did."""

    plainly_causal: bool = False
    """Whether it asked for the plain causal mask alone, and every attention was content with it."""
    common_attention: bool = False
    """Whether transformers' interfaces made all of its masks and its attention: there documents can be kept apart."""
    whole_blocks: tuple[str, ...] = ()
    """Blocks that ran once and as a whole, from a tensor to a tensor, and share no parameter with anything else."""
    plain_head: bool = False
    """Whether the logits are what its head made of all tokens' hidden states at once, unchanged."""


def observe(model: PreTrainedModel) -> Observed:
    """Run a model that lies on the meta device (network.skeleton), and return what it did.

    Sees nothing in a model that cannot be run there: one whose course depends on values. The model is changed: it is of
    no other use.
    """
    requests: list[bool] = []
    attended: list[bool] = []
    calls: Counter[str] = Counter()

    def mask(**request: Any) -> None:
        requests.append(_is_plain(request))

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: Any, **options: Any) -> Any:
        attended.append(given is None)
        return sdpa_attention_forward(module, query, key, value, given, **options)

    AttentionMaskInterface.register(_OBSERVED, mask)
    AttentionInterface.register(_OBSERVED, attention)
    for name, block in blocks(model).items():
        block.register_forward_hook(lambda _, given, made, name=name: calls.update([name] * _is_whole(given, made)))
        # A call that is not whole must not pass for the only one.
        block.register_forward_pre_hook(lambda _, given, name=name: calls.update([f"{name} entered"]))
    headed: list[tuple[Any, Any]] = []
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        head.register_forward_hook(lambda _, given, made: headed.append((given, made)))
    uses_sdpa = model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = _OBSERVED if uses_sdpa else model.config._attn_implementation
    tokens = torch.ones(1, _LENGTH, dtype=torch.long, device="meta")
    try:
        # Some kernels know one type alone, and whether positions begin anew is read from them without this mask.
        made = nn.Module.to(model, torch.bfloat16)(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except Exception:  # whatever a model's code raises without values
        return Observed()
    shared, common = _shared(model), uses_sdpa and bool(attended) and bool(requests)
    return Observed(
        plain_head=isinstance(head, nn.Linear) and len(headed) == 1 and _is_plain_head(*headed[0], made.logits),
        plainly_causal=common and all(requests + attended),
        common_attention=common,
        whole_blocks=tuple(
            name
            for name, block in blocks(model).items()
            if (calls[name], calls[f"{name} entered"]) == (1, 1) and shared.isdisjoint(map(id, block.parameters()))
        ),
    )


def takes_positions(model: PreTrainedModel) -> bool:
    """Tell whether a model can be told where each token stands in its document."""
    return "position_ids" in inspect.signature(model.forward).parameters


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


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return a model's transformer blocks by name: what stands in its outermost ModuleLists and can be called."""
    named = {name: model.get_submodule(name) for name, _ in units_of(model) if name}
    return {
        name: module
        for name, module in named.items()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
        and type(module).forward is not nn.Module.forward
    }


def _is_plain(request: dict[str, Any]) -> bool:
    """Tell whether a mask is what SDPA's `is_causal` does: no window, no chunks, nothing laid over it."""
    return (
        request["mask_function"] is causal_mask_function
        and request.get("allow_is_causal_skip", True)
        and request.get("local_size") is None
        and request["q_length"] == request["kv_length"]
    )


def _is_whole(given: tuple[Any, ...], made: Any) -> bool:
    """Tell whether hooks on a block see its backward pass begin and end: gradients of positional tensors and tuples."""
    first = made[0] if isinstance(made, tuple) and made else made
    return bool(given) and all(isinstance(value, Tensor) and value.requires_grad for value in (given[0], first))


def _is_plain_head(given: tuple[Any, ...], made: Any, logits: Any) -> bool:
    """Tell whether a head made these logits by itself, from one hidden state for each token and nothing else."""
    return made is logits and len(given) == 1 and isinstance(given[0], Tensor) and given[0].shape[:-1] == (1, _LENGTH)


def _shared(model: PreTrainedModel) -> set[int]:
    """Return the ids of parameters that stand in more than one place."""
    counted = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, places in counted.items() if places > 1}
