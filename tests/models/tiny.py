"""A configuration of every causal language model of transformers, made small enough to train in seconds.

Sizes are those of the nano models that the parity gate makes (`halfstep.models.nano_sizes`), set over the family's own
defaults; what a family wants besides stands in `MORE` there.
"""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from halfstep.models.nano import sections_of
from halfstep.models.nano_sizes import MORE, SIZES, TOKENS, VOCABULARIES

VOCABULARY = 512
_SIZES = {**SIZES, **dict.fromkeys(VOCABULARIES, VOCABULARY)}


AS_DECODER = {
    **dict.fromkeys(("xlm",), ("causal", True)),
    **dict.fromkeys(("xlnet",), ("attn_type", "uni")),
}
"""What makes a family causal that has `is_decoder` for nothing."""


def config(name: str) -> dict[str, Any]:
    """Return what a config.json of a small model of a family holds; `bert:decoder` is one that sees no future."""
    family, _, variant = name.partition(":")
    key, value = AS_DECODER.get(family, ("is_decoder", True))
    changed = {"decoder": {key: value}, "bidirectional": {"use_bidirectional_attention": True}}.get(variant, {})
    return _small(CONFIG_MAPPING[family], {**MORE.get(family, {}), **changed}).to_dict()


def _small(kind: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {name: size for name, size in _SIZES.items() if name in names}
    for place, token in enumerate(TOKENS):
        default = getattr(kind, token, None)
        odd = isinstance(default, list) or (isinstance(default, int) and not 0 <= default < VOCABULARY)
        if token in names and odd:
            values[token] = min(place, 2)
    sections = {name: section for name, section in sections_of(kind).items() if name in names}
    for name, section in sections.items():
        if section is not None:
            values[name] = _small(section, more.get(name) or {}).to_dict()
    return kind(**{**values, **{key: value for key, value in more.items() if sections.get(key) is None}})
