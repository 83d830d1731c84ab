"""Makes a nano model of any transformers configuration: the sizes are cut down, and every option of structure stays."""

import copy
import dataclasses
import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from halfstep.models import network
from halfstep.models.hf_config import Unfit, configuration, one_line, quiet
from halfstep.models.nano_sizes import MORE, SIZES, TOKENS, VOCABULARIES, WIDTH

MOST_PARAMETERS = 4_000_000
"""Of a nano model. One that is larger has sizes of which nothing is known here."""
_LENGTH = 32
"""Tokens that it is tried with; twice what a window sees."""
_WINDOW = 16
_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_blocks")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_MOST = {
    **dict.fromkeys((*_WINDOWS, "local_attention"), _WINDOW),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "n_group", "num_expert_group", "decoder_sparse_step", "moe_layer_freq"), 2),
    **dict.fromkeys(("interleave_moe_layer_step", "moe_layer_interval", "attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts"), 1),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
}
"""Counts that say how a model is made, and the most of them that one of two layers and four experts can have."""
_FOLLOW = {"qk_head_dim": 16, "d_head": 8, "embedding_dim": WIDTH}
"""Sizes that follow from others where a configuration does not say them; a whole one does."""
_NOT_STRUCTURE = ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id")


def nano(config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return what a config.json of a nano model of the same family holds; the same for configs of the same structure.

    A layer of every kind stays, a window becomes shorter than what is read, heads that are shared stay so; dropout and
    noise, which no two trainers draw alike, are 0. The model is made, has modules of every kind that the whole one has,
    and reads once. Raises Unfit, one sentence, where the family cannot be cut down.
    """
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise Unfit("it has code of its own")
    if config.get("quantization_config"):
        raise Unfit("it is quantised")
    return json.loads(_made(json.dumps(dict(config), sort_keys=True), vocabulary))


@functools.lru_cache(maxsize=64)
def _made(text: str, vocabulary: int) -> str:
    """Return a nano config as JSON; of the sizes alone where that makes a model, else with what the family wants."""
    whole = configuration(json.loads(text), trust_remote_code=False)
    kinds = _kinds_of_modules(json.loads(text))
    more = MORE.get(str(whole.model_type))
    failure: Unfit | None = None
    for wanted in [{}, more] if more else [{}]:
        try:
            cut = _cut(type(whole), _without_names(whole), wanted, vocabulary)
            made = json.loads(cut.to_json_string(use_diff=False))
            small = json.dumps(_without_chance({k: v for k, v in made.items() if k not in _NOT_STRUCTURE}))
            _try(json.loads(small), kinds)
            return small
        except Unfit as error:
            failure = error
        except Exception as error:  # whatever the configuration's own class objects with
            failure = Unfit(one_line(error))
    assert failure is not None, "at least the sizes alone are tried"
    raise failure


def _without_names(made: PreTrainedConfig) -> dict[str, Any]:
    """Return a configuration's values by its fields' own names; a file may have one under another, too."""
    names = {field.name for field in dataclasses.fields(made)} - set(_NOT_STRUCTURE)
    written = made.to_dict()  # where layers differ in a field, it cannot be read from the configuration of all
    sections = {name for name in names if isinstance(made.__dict__.get(name), PreTrainedConfig)}
    return {
        name: copy.deepcopy(written[name] if name in written and name not in sections else getattr(made, name))
        for name in names
    }


def _cut(kind: type[PreTrainedConfig], whole: dict[str, Any], more: dict[str, Any], vocabulary: int) -> Any:
    """Return a configuration of a kind with small sizes for the values of a whole one."""
    layers = next((value for name in _LAYERS if isinstance(value := whole.get(name), int) and value > 0), 0)
    kept = _kinds_of_layers(whole, layers)
    heads = next((int(value) for name in _HEADS if isinstance(value := whole.get(name), int)), 0)
    values = {name: _smaller(name, value, layers, kept, heads) for name, value in whole.items()}
    for name in VOCABULARIES:
        if isinstance(values.get(name), int) and values[name]:
            values[name] = vocabulary
    for place, token in enumerate(TOKENS):
        given = values.get(token)
        if isinstance(given, list) or (isinstance(given, int) and not 0 <= given < vocabulary):
            values[token] = min(place, 2)
    for name, section in sections_of(kind).items():
        given = whole.get(name)
        if isinstance(given, PreTrainedConfig) and dataclasses.is_dataclass(given):
            values[name] = _cut(type(given), _without_names(given), more.get(name) or {}, vocabulary).to_dict()
        elif section is not None and isinstance(given, dict):
            inner = section.from_dict(given)
            values[name] = _cut(section, _without_names(inner), more.get(name) or {}, vocabulary).to_dict()
    _turn(values)
    extra = {key: value for key, value in more.items() if not isinstance(value, dict) or key not in sections_of(kind)}
    with quiet():
        return kind.from_dict({**values, **extra})


def _kinds_of_layers(whole: Mapping[str, Any], layers: int) -> list[int]:
    """Return the layers that stay: the first of every kind, two at least where there are two."""
    listed = [value for value in whole.values() if isinstance(value, list) and len(value) == layers]
    firsts: dict[str, int] = {}
    for place in range(layers):
        firsts.setdefault(repr([_of_any_size(value[place]) for value in listed]), place)
    chosen = list(firsts.values())[:4]
    others = [place for place in range(layers) if place not in chosen]
    return sorted([*chosen, *others[: max(0, 2 - len(chosen))]])


def _of_any_size(value: Any) -> Any:
    return bool(value) if isinstance(value, int | float) else value


def _smaller(name: str, value: Any, layers: int, kept: list[int], heads: int) -> Any:
    """Return the small value of a field; what is absent, off or no size stays."""
    if isinstance(value, list) and layers and len(value) == layers:
        return [_smaller(name, value[place], 0, [], heads) for place in kept]
    if name.endswith("only_layers") and isinstance(value, list):
        return [kept.index(place) for place in value if place in kept]  # numbers of layers
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name in _LAYERS:
        return len(kept) if value == layers else min(value, SIZES[name])
    if name in _SHARED_HEADS:
        return 4 if value == heads else min(value, 2)
    if name in _MOST:
        return min(value, _MOST[name])
    return {**SIZES, **_FOLLOW}.get(name, value)


def _turn(values: dict[str, Any]) -> None:
    """Make what turns positions fit heads of eight elements: a part of them stays a part, of an even number."""
    head: int = values["head_dim"] if isinstance(values.get("head_dim"), int) else WIDTH // 4

    def walk(tree: dict[str, Any], part: float) -> None:
        for name in ("partial_rotary_factor", "rotary_pct", "rotary_percent"):
            if isinstance(tree.get(name), float) and 0 < tree[name] < 1:
                tree[name] = part = 0.5
        for name, value in tree.items():
            if name in ("short_factor", "long_factor") and isinstance(value, list):
                tree[name] = value[: int(head * part) // 2]
            elif name == "mrope_section" and isinstance(value, list) and len(value) == 3:
                tree[name] = [2, 1, 1]
            elif isinstance(value, dict):
                walk(value, part)

    walk(values, 0.5 if 0 < (values.get("partial_rotary_factor") or 1) < 1 else 1.0)
    if isinstance(values.get("rotary_dim"), int) and values["rotary_dim"]:
        values["rotary_dim"] = 4  # of GPT-J's kind, which turns a part


def _without_chance(tree: dict[str, Any]) -> dict[str, Any]:
    def off(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _without_chance(value)
        by_chance = any(word in name for word in ("drop", "jitter")) and isinstance(value, float)
        return 0.0 if by_chance else value

    return {name: off(name, value) for name, value in tree.items()}


def _kinds_of_modules(config: dict[str, Any]) -> set[str]:
    modules = [type(module) for module in network.skeleton(config).modules()]
    return {kind.__name__ for kind in modules if not kind.__module__.startswith("torch.")}


def _try(config: dict[str, Any], kinds: set[str]) -> None:
    """Make a model and let it read; raises Unfit for what makes none, is not small or whole, or ends in an error."""
    if missing := sorted(kinds - _kinds_of_modules(config)):
        raise Unfit(f"a small one has no {missing[0]}")
    count = network.count_parameters(network.skeleton(config))
    if count > MOST_PARAMETERS:
        raise Unfit(f"with all known sizes cut down it still has {count:,} parameters")
    with quiet():
        model = network.build(config, seed=0)
    try:
        with torch.no_grad(), quiet():
            model(input_ids=torch.ones(1, _LENGTH, dtype=torch.long))
    except Exception as error:  # whatever its code raises
        raise Unfit(f"a {model.config.model_type} model of small sizes does not run: {one_line(error)}") from error


def sections_of(kind: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig] | None]:
    """Return the nested configurations of a kind by field, None where nobody says of which kind one is."""
    named: Any = getattr(kind, "sub_configs_defaults", None) or kind.sub_configs or {}
    return {name: _class_of(section) for name, section in named.items()}


def _class_of(section: Any) -> type[PreTrainedConfig] | None:
    kind: Any = getattr(section, "config_class", section)
    if kind is AutoConfig:
        return CONFIG_MAPPING[section.model_type] if getattr(section, "model_type", None) else None
    return kind if inspect.isclass(kind) and issubclass(kind, PreTrainedConfig) else None
