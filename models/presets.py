"""The model sizes Halfstep knows by name, one row each, with where the numbers come from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Describe one published (or tiny) causal language model; `models.shapes.shape_of` turns it into a shape."""

    family: str
    """transformers' `model_type`: `gpt2` (learned positions) or `llama` (rotary positions, gated feed-forward)."""
    layers: int
    """Transformer blocks."""
    width: int
    """Hidden size, in elements."""
    heads: int
    """Attention (query) heads; must divide `width`."""
    kv_heads: int
    """Key and value heads; equal to `heads` without grouped-query attention."""
    ffn: int
    """Width of the feed-forward layer, in elements."""
    vocabulary: int | None
    """Rows of the embedding, padding included; None takes the vocabulary of the data's tokenizer."""
    context: int
    """Longest sequence the published model was trained for, in tokens; the rows of a learned position table."""
    tied: bool
    """Whether the output head is the embedding."""
    dropout: float = 0.0
    """Probability. Zero in every row: these models are pretrained in about one pass over the data, where dropout only
    costs; GPT-2's published 0.1 is one override away (`model.dropout=0.1`)."""
    norm_eps: float = 1e-5
    """Epsilon inside LayerNorm or RMSNorm."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; None where positions are learned."""
    rope_scaling: tuple[tuple[str, str | float | int], ...] = ()
    """Further `rope_parameters` of the transformers configuration, as (key, value) pairs; empty for plain ones."""
    source: str
    """Where the row was read, and what was changed in it."""


GPT2_VOCABULARY = 50304
"""GPT-2's 50257 tokens padded to the next multiple of 128, Megatron-LM's default `--make-vocab-size-divisible-by`: an
odd number fits no matrix unit's tiles. The 47 extra rows are never a target. Published parameter counts are without
them: subtract 47 x width."""

LLAMA3_VOCABULARY = 128256
"""Llama 3's 128000 tokens and 256 reserved ones, as published; already a multiple of 128."""


def _gpt2(layers: int, width: int, heads: int, source: str) -> Preset:
    return Preset(
        family="gpt2",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        ffn=4 * width,
        vocabulary=GPT2_VOCABULARY,
        context=1024,
        tied=True,
        source=f"{source}; 50257 tokens padded to 50304",
    )


def _gpt3(layers: int, width: int, heads: int, changed: str = "") -> Preset:
    return Preset(
        family="gpt2",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        ffn=4 * width,
        vocabulary=GPT2_VOCABULARY,
        context=2048,
        tied=True,
        source="Brown et al. 2020, table 2.1; all attention is dense (the paper alternates it with banded); "
        f"50257 tokens padded to 50304{changed}",
    )


PRESETS: dict[str, Preset] = {
    "gpt2-nano": Preset(
        family="gpt2",
        layers=2,
        width=128,
        heads=4,
        kv_heads=4,
        ffn=512,
        vocabulary=None,
        context=128,
        tied=True,
        source="Halfstep: GPT-2's architecture; one CPU core does 100 steps of 32 x 128 tokens in half a minute",
    ),
    "llama-nano": Preset(
        family="llama",
        layers=2,
        width=128,
        heads=4,
        kv_heads=2,
        ffn=352,
        vocabulary=None,
        context=128,
        tied=True,
        rope_theta=10000.0,
        source="Halfstep: Llama's architecture with grouped-query attention, the size of gpt2-nano; "
        "ffn is 8/3 of the width rounded up to a multiple of 32",
    ),
    "gpt2-124m": _gpt2(12, 768, 12, "Radford et al. 2019, config.json of openai-community/gpt2"),
    "gpt2-355m": _gpt2(24, 1024, 16, "Radford et al. 2019, config.json of openai-community/gpt2-medium"),
    "gpt2-774m": _gpt2(36, 1280, 20, "Radford et al. 2019, config.json of openai-community/gpt2-large"),
    "gpt2-1.5b": _gpt2(48, 1600, 25, "Radford et al. 2019, config.json of openai-community/gpt2-xl"),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16, "; 16 heads, since the table's 24 heads of 128 do not divide its width of 2048"),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40, "; width 5120, since the table's 5140 is not 40 heads of 128"),
    "gpt3-175b": _gpt3(96, 12288, 96),
    "llama-1b": Preset(
        family="llama",
        layers=16,
        width=2048,
        heads=32,
        kv_heads=8,
        ffn=8192,
        vocabulary=LLAMA3_VOCABULARY,
        context=131072,
        tied=True,
        rope_theta=500000.0,
        rope_scaling=(
            ("rope_type", "llama3"),
            ("factor", 32.0),
            ("low_freq_factor", 1.0),
            ("high_freq_factor", 4.0),
            ("original_max_position_embeddings", 8192),
        ),
        source="config.json of meta-llama/Llama-3.2-1B",
    ),
    "llama-8b": Preset(
        family="llama",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        ffn=14336,
        vocabulary=LLAMA3_VOCABULARY,
        context=8192,
        tied=False,
        rope_theta=500000.0,
        source="config.json of meta-llama/Meta-Llama-3-8B",
    ),
    "llama-70b": Preset(
        family="llama",
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        ffn=28672,
        vocabulary=LLAMA3_VOCABULARY,
        context=8192,
        tied=False,
        rope_theta=500000.0,
        source="config.json of meta-llama/Meta-Llama-3-70B",
    ),
}
