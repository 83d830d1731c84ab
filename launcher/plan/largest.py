"""Refuse a model's config that says more than can be planned, before anything is counted or built from it."""

from collections.abc import Mapping
from typing import Any

from launcher.errors import RequestError
from launcher.spec import counts

_LIMITS = {
    counts.LAYERS: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    ),
    counts.WIDTH: ("hidden_size", "n_embd", "d_model", "dim", "num_attention_heads", "n_head", "n_heads", "num_heads"),
    16 * counts.WIDTH: ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"),
    counts.ROWS: ("vocab_size",),
    10**12: ("n_positions", "max_position_embeddings", "max_seq_len", "max_sequence_length"),
}  # fmt: skip
"""By the most that is planned, what transformers calls it in one family or another."""


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise RequestError for a number beyond its limit, in the config or in a section of it."""
    for most, names in _LIMITS.items():
        for name in names:
            value = config.get(name)
            if isinstance(value, int | float) and value > most:
                raise RequestError(
                    f"the model's config says {name} {value:.6g}; at most {most} can be planned",
                    where=where,
                    fix="check the file",
                )
    for section in config.values():
        if isinstance(section, Mapping):
            check(section, where)
