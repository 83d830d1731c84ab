"""The arithmetic of a model's shape: its overrides, its transformers configuration, its parameters and its FLOPs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfstep.models.presets import Preset

FFN_MULTIPLE = 32  # elements; a feed-forward width that an override makes fractional is rounded up to a multiple

_GPT2_KEYS = {
    "layers": ("n_layer",),
    "width": ("n_embd",),
    "heads": ("n_head",),
    "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
_LLAMA_KEYS = {
    "layers": ("num_hidden_layers",),
    "width": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "dropout": ("attention_dropout",),
}
_OWN_KEYS = {"gpt2": _GPT2_KEYS, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_KEYS)}
"""Our four names as each model_type spells them: transformers' `attribute_map`, and its dropout fields."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Hold everything that decides how many parameters and FLOPs a causal language model has."""

    family: str  # transformers' `model_type`
    layers: int  # transformer blocks
    width: int  # hidden size, in elements
    heads: int  # attention (query) heads
    kv_heads: int  # key and value heads
    head_dim: int  # elements of one head: `width / heads` except where a configuration file says otherwise
    ffn: int  # feed-forward width, in elements
    vocabulary: int  # rows of the embedding
    positions: int  # longest sequence, in tokens; the rows of a learned position table
    tied: bool  # whether the output head is the embedding
    dropout: float = 0.0  # probability, wherever the family has dropout (llama: in the attention only)
    norm_eps: float = 1e-5  # inside the norms; this and the rotary fields are a preset's, not read from configurations
    rope_theta: float | None = None  # base of the rotary frequencies; None where positions are learned
    rope_scaling: tuple[tuple[str, str | float | int], ...] = ()  # further `rope_parameters`, as (key, value) pairs
    qkv_bias: bool = False  # whether query, key and value projections have biases (gpt2: everything has, always)
    output_bias: bool = False  # whether the attention's output projection has a bias
    mlp_bias: bool = False  # whether the feed-forward projections have biases
    qk_norm: bool = False  # whether queries and keys are normalised per head


def shape_of(
    preset: Preset,
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dropout: float | None = None,
    vocabulary: int | None = None,
    sequence: int | None = None,
) -> Shape:
    """Return the shape of a preset with the overrides a user gave.

    `vocabulary` is the number of tokens of the data's tokenizer: rows without a vocabulary take it, the others keep the
    published one. `sequence` (tokens) beyond the context lengthens it. A new width keeps the row's ratio of `ffn` to
    width, rounded up to a multiple of 32; new heads keep `kv_heads`, or its greatest common divisor with them.

    Raises ValueError, one sentence, when no such model exists.
    """
    layers = preset.layers if layers is None else layers
    width = preset.width if width is None else width
    heads = preset.heads if heads is None else heads
    dropout = preset.dropout if dropout is None else dropout
    _check_numbers(layers=layers, width=width, heads=heads, dropout=dropout, rotary=preset.rope_theta is not None)
    return Shape(
        family=preset.family,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_legal_kv_heads(preset.kv_heads, preset.heads, heads),
        head_dim=width // heads,
        ffn=_scaled_ffn(preset.ffn, preset.width, width),
        vocabulary=_vocabulary(preset, vocabulary),
        positions=max(preset.context, sequence or 0),
        tied=preset.tied,
        dropout=float(dropout),
        norm_eps=preset.norm_eps,
        rope_theta=preset.rope_theta,
        rope_scaling=preset.rope_scaling,
    )


def hf_config(shape: Shape) -> dict[str, Any]:
    """Return the transformers configuration of a gpt2 or llama shape: plain JSON values, the same for the same shape.

    GPT-2 uses `gelu_pytorch_tanh`: the same function as its default `gelu_new`, in one fused kernel that keeps 32 bytes
    per token, hidden element and layer for the backward pass, not 56. Special tokens stay unset: they belong to the
    tokenizer. Raises ValueError for another family.
    """
    if shape.family == "gpt2":
        own = {
            "n_positions": shape.positions,
            "n_inner": shape.ffn,
            "activation_function": "gelu_pytorch_tanh",
            "layer_norm_epsilon": shape.norm_eps,
        }
    elif shape.family == "llama":
        own = {
            "max_position_embeddings": shape.positions,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.ffn,
            "hidden_act": "silu",
            "attention_bias": shape.qkv_bias,
            "mlp_bias": shape.mlp_bias,
            "rms_norm_eps": shape.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta, **dict(shape.rope_scaling)},
        }
    else:
        raise ValueError(f"presets are gpt2 or llama; a {shape.family} model brings its own config.json")
    sizes = {key: getattr(shape, name) for name, keys in _OWN_KEYS[shape.family].items() for key in keys}
    common = {"vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied, "initializer_range": 0.02}
    return {"model_type": shape.family, **sizes, **own, **common, "bos_token_id": None, "eos_token_id": None}


def from_hf_config(config: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a transformers configuration, or None when its arithmetic is not known.

    Known are gpt2, llama, mistral, qwen2 and qwen3, from a full configuration or a `config.json`. A size left out gives
    None, never transformers' default of the day; `halfstep.models.network.count_parameters` knows every architecture.
    """
    try:
        if config["model_type"] == "gpt2" and not config.get("add_cross_attention"):
            return _gpt2_shape(config)
        if config["model_type"] in ("llama", "mistral", "qwen2", "qwen3"):
            return _llama_shape(config, config["model_type"])
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return None


def override_hf_config(
    config: Mapping[str, Any],
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dropout: float | None = None,
) -> dict[str, Any]:
    """Return a copy of a transformers configuration with our names written in its model_type's own keys.

    The feed-forward width, the key and value heads and a dependent `head_dim` follow as in `shape_of`. Raises
    ValueError for a model_type whose keys are not known, and for numbers that make no model.
    """
    given = {"layers": layers, "width": width, "heads": heads, "dropout": dropout}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return dict(config)
    old = from_hf_config(config)
    if old is None:
        names, known = " and ".join(asked), ", ".join(_OWN_KEYS)
        kind = f"model_type {config.get('model_type')!r}"
        raise ValueError(f"{names} can be changed in a complete configuration of {known}, not in this one of {kind}")
    new = {name: asked.get(name, getattr(old, name)) for name in _OWN_KEYS[old.family]}
    dependent = old.head_dim * old.heads == old.width  # in some qwen3 sizes head_dim is a number of its own
    rotary = old.family != "gpt2"
    _check_numbers(**(new if dependent else {**new, "heads": 1}), rotary=rotary and dependent)
    changed = dict(config)
    for name, value in asked.items():
        changed.update(dict.fromkeys(_OWN_KEYS[old.family][name], value))
    if rotary:
        changed["intermediate_size"] = _scaled_ffn(old.ffn, old.width, new["width"])
        changed["num_key_value_heads"] = _legal_kv_heads(old.kv_heads, old.heads, new["heads"])
        changed["head_dim"] = new["width"] // new["heads"] if dependent else old.head_dim
        if layers is not None:
            changed.pop("layer_types", None)  # one entry per layer, which qwen2 and qwen3 make again themselves
    elif config.get("n_inner") is not None:
        changed["n_inner"] = _scaled_ffn(old.ffn, old.width, new["width"])
    return changed


def parameters(shape: Shape) -> int:
    """Count the parameters, a tied head once; equal to what transformers builds, for every preset and known family."""
    rows = shape.positions + 2 if shape.family == "gpt2" else 1  # position table and the last norm
    return embedding_parameters(shape) + shape.layers * _block_parameters(shape) + rows * shape.width


def embedding_parameters(shape: Shape) -> int:
    """Count the parameters of the token embedding and the output head, a tied head once; without positions."""
    return (1 if shape.tied else 2) * shape.vocabulary * shape.width


def largest_tensor(shape: Shape) -> int:
    """Return the elements of the largest single parameter: what a communication bucket has to hold."""
    if shape.family == "gpt2":  # query, key and value are one matrix
        return shape.width * max(shape.vocabulary, shape.ffn, 3 * shape.width, shape.positions)
    return shape.width * max(shape.vocabulary, shape.ffn, shape.heads * shape.head_dim)


def flops_per_token(shape: Shape, sequence: int, convention: str = "causal") -> float:
    """Return the floating-point operations of one token, forward and backward, recomputation not counted.

    `causal`: 6 (N - V h) + 6 L h s, half of the attention matrix and nothing for the input embedding, which is a gather
    (Megatron-Bridge 25.09 and later); a tied matrix is multiplied once, as the head, and stays in. `palm`: 6 N +
    12 L h s, the whole attention matrix, as in most published tables (Chowdhery et al. 2022, appendix B; llm-foundry).
    h is heads x head_dim; sliding windows are not considered. Raises ValueError for another convention.
    """
    attention = attention_width(shape) * sequence
    if convention == "causal":
        return causal_flops(multiplied_parameters(shape), attention)
    if convention == "palm":
        return 6.0 * parameters(shape) + 12.0 * attention
    raise ValueError(f"FLOPs are counted by the convention causal or palm, not {convention!r}")


def multiplied_parameters(shape: Shape) -> int:
    """Count the parameters that a token is multiplied with: all but the rows of an embedding that is no head."""
    return parameters(shape) - (0 if shape.tied else shape.vocabulary * shape.width)


def attention_width(shape: Shape) -> int:
    """Return heads x head_dim, summed over the layers."""
    return shape.layers * shape.heads * shape.head_dim


def causal_flops(multiplied: int, attention: int) -> float:
    """Return the FLOPs of a token that is multiplied with so many parameters; `attention` is L h s."""
    return 6.0 * multiplied + 6.0 * attention


def _check_numbers(*, layers: int, width: int, heads: int, dropout: float, rotary: bool) -> None:
    for name, value in {"layers": layers, "width": width, "heads": heads}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if width % heads:
        legal = (count for count in range(1, min(width, 2 * heads) + 1) if width % count == 0)
        nearest = ", ".join(map(str, sorted(sorted(legal, key=lambda count: abs(count - heads))[:3])))
        raise ValueError(f"a width of {width} cannot be split into {heads} equal heads; it can into {nearest}")
    if rotary and (width // heads) % 2:
        raise ValueError(f"rotary positions turn pairs of elements; {width} / {heads} = {width // heads} is odd")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is a probability of at least 0 and less than 1, not {dropout}")


def _legal_kv_heads(old_kv_heads: int, old_heads: int, heads: int) -> int:
    return heads if old_kv_heads == old_heads else math.gcd(heads, old_kv_heads)


def _scaled_ffn(old_ffn: int, old_width: int, width: int) -> int:
    exact, rest = divmod(old_ffn * width, old_width)
    return exact if rest == 0 else (exact // FFN_MULTIPLE + 1) * FFN_MULTIPLE


def _vocabulary(preset: Preset, tokens: int | None) -> int:
    if preset.vocabulary is not None and tokens is not None and tokens > preset.vocabulary:
        raise ValueError(f"the tokenizer has {tokens} tokens and the model's vocabulary only {preset.vocabulary}")
    if preset.vocabulary is None and tokens is None:
        raise ValueError("this model takes its vocabulary from the data's tokenizer, and no data was given")
    return preset.vocabulary or tokens or 0


def _block_parameters(shape: Shape) -> int:
    h, f, query, kv = shape.width, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.family == "gpt2":
        return 4 * h * h + 2 * h * f + f + 9 * h  # biases 5 h + f, two LayerNorms 4 h
    biases = shape.qkv_bias * (query + 2 * kv) + shape.output_bias * h + shape.mlp_bias * (2 * f + h)
    norms = 2 * h + shape.qk_norm * 2 * shape.head_dim
    return 2 * h * query + 2 * h * kv + 3 * h * f + biases + norms


def _gpt2_shape(config: Mapping[str, Any]) -> Shape:
    return Shape(
        family="gpt2",
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=config["n_head"],
        kv_heads=config["n_head"],
        head_dim=config["n_embd"] // config["n_head"],
        ffn=config.get("n_inner") or 4 * config["n_embd"],
        vocabulary=config["vocab_size"],
        positions=config["n_positions"],
        tied=config.get("tie_word_embeddings", True),
        dropout=config.get("resid_pdrop", 0.1),
    )


def _llama_shape(config: Mapping[str, Any], family: str) -> Shape:
    heads, bias = config["num_attention_heads"], bool(config.get("attention_bias")) and family in ("llama", "qwen3")
    # Left out, kv_heads is the heads in llama alone, and head_dim is width / heads in all but qwen3.
    kv_heads = config.get("num_key_value_heads") if family == "llama" else config["num_key_value_heads"]
    head_dim = config["head_dim"] if family == "qwen3" else config.get("head_dim")
    return Shape(
        family=family,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        dropout=config.get("attention_dropout", 0.0),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")) and family == "llama",
        qk_norm=family == "qwen3",
    )


_CPU_CHUNK, _CHUNK = 1 << 24, 1 << 27
"""Logits that a fused head makes at a time: enough tokens to keep a GPU's matrix units busy, 256 MiB in 16 bits."""


def head_tokens(tokens: int, vocabulary: int, *, on_cpu: bool) -> int:
    """Return how many of some tokens a fused head works on at a time: an eighth of them or fewer."""
    return max(1, min((_CPU_CHUNK if on_cpu else _CHUNK) // vocabulary, -(-tokens // 8)))
