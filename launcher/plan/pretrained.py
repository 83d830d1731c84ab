"""Read what an `hf:` model says of itself: its config, whether it has weights, and its tokenizer."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config import counts
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.config.weights_digest import fingerprint
from halfstep.launcher.corpus import hub
from halfstep.launcher.corpus.vocabulary import TokenizerFacts, of_folder
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import pretrained_weights
from halfstep.launcher.plan.construct import Network, Source, construct
from halfstep.launcher.system import foreign
from halfstep.models import shapes

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


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What an `hf:` model says of itself."""

    config: dict[str, Any]
    """Its config with the request's overrides."""
    network: Network
    """As it was constructed."""
    weights: str | None
    """Where trained weights lie, or None for a bare config."""
    weights_digest: str | None
    """Identifies the weights, wherever they lie."""
    tokenizer: TokenizerFacts
    """Identifies the tokenizer beside the model."""
    tokenizer_place: str | None = None
    """Where that is, for `data prepare --tokenizer`."""


def read_model(spec: RunSpec, *, examples: bool = False) -> ModelFacts:
    """Read the config of `model=hf:PATH_OR_ID` and construct the model once, so that what cannot be is refused now.

    `examples`: whether the data holds some, which are kept apart as documents are by `documents=masked`.
    Raises RequestError for what is missing, damaged, contradictory, quantised or cannot be constructed.
    """
    name, where = spec.model.name[3:], f"model={spec.model.name}"
    local = Path(name).is_absolute()
    config_file = (
        (Path(name) / "config.json" if Path(name).is_dir() else Path(name)) if local else _download(name, where)
    )
    config = _read_config(config_file, where)
    _refuse_quantised(config, config_file, where)
    has_weights = not local or pretrained_weights.present(config_file, config, where)
    config = overridden(config, spec, config_file, has_weights=has_weights)
    refuse_skipped_layers(config, spec, where)
    home = str(config_file.parent) if local else name
    source = Source(name=name, home=home, weights=home if has_weights else None, local=local)
    return ModelFacts(
        config=config,
        network=constructed(source, config, spec, examples=examples),
        weights=source.weights,
        weights_digest=(fingerprint(config_file.parent) if local else name) if has_weights else None,
        tokenizer=of_folder(config_file.parent),
        tokenizer_place=name,
    )


def constructed(source: Source, config: dict[str, Any], spec: RunSpec, *, examples: bool) -> Network:
    """Construct the model once, and refuse what the request wants of it and it cannot."""
    return construct(
        source,
        config,
        spec.trust_remote_code,
        fused_head=spec.fused_head,
        documents_apart="documents=masked" if spec.documents == "masked" else "data of examples" * examples,
    )


def _read_config(file: Path, where: str) -> dict[str, Any]:
    if not file.is_file():
        raise RequestError(f"{file} does not exist", where=where, fix="name a folder that holds a config.json")
    try:
        # JSON has no infinity; transformers writes it as an object, and older config.json spell it out.
        text = foreign.read_text(file, follow=True)
        config = json.loads(text, parse_constant=lambda name: {"__float__": name}, parse_float=_float)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        if "model_type" not in config:
            raise ValueError("it has no model_type")
    except (ValueError, OSError, RecursionError) as error:
        raise RequestError(f"{file} is no model's config: {error}", where=where, fix="check the file") from None
    return config


def _float(text: str) -> Any:
    value = float(text)
    return value if math.isfinite(value) else {"__float__": "-Infinity" if value < 0 else "Infinity"}  # 1e999


def _refuse_quantised(config: dict[str, Any], file: Path, where: str) -> None:
    """Refuse what cannot be trained: integers stand in for the weights, and a quantiser's package reads them."""
    for section in (config, config.get("text_config")):
        quantised = section.get("quantization_config") if isinstance(section, dict) else None
        if quantised:
            named = quantised.get("quant_method") if isinstance(quantised, dict) else None
            method = named or "an unnamed method"
            raise RequestError(
                f"the model is quantised ({method}), and quantised weights cannot be trained",
                where=f"{where}, quantization_config in {file}",
                fix="take the weights it was made from, or save it again after transformers' dequantize(); remove "
                "quantization_config from a config without weights",
            )


def refuse_skipped_layers(config: dict[str, Any], spec: RunSpec, where: str) -> None:
    """Refuse layers that are left out at random where ranks share them."""
    for key, value in config.items():
        if spec.zero == 3 and key.endswith("layerdrop") and isinstance(value, int | float) and value > 0:
            raise RequestError(
                f"{key}={value:g} skips layers at random, other ones on every rank, and at stage 3 ranks share a layer",
                where=where,
                fix=f"set {key} to 0 in its config.json, or take zero=2",
            )


def overridden(config: dict[str, Any], spec: RunSpec, file: Path, *, has_weights: bool) -> dict[str, Any]:
    """Return the config with the request's overrides; raises RequestError for those that make no model."""
    keys, where = spec.model, f"model={spec.model.name}"
    if has_weights and any((keys.layers, keys.width, keys.heads, keys.vocabulary)):
        raise RequestError(
            "the dimensions of trained weights cannot be changed",
            where=f"{where} with model.layers, model.width, model.heads or model.vocabulary",
            fix="drop the override, or name a folder that holds the config alone",
        )
    try:
        config = shapes.override_hf_config(
            config, layers=keys.layers, width=keys.width, heads=keys.heads, dropout=keys.dropout
        )
    except ValueError as error:
        raise RequestError(str(error), where=where, fix="change model.layers, model.width or model.heads") from None
    if keys.vocabulary:
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = {**text, "vocab_size": keys.vocabulary}
        else:
            config["vocab_size"] = keys.vocabulary
    _require_plannable(config, str(file))
    return config


def _download(name: str, where: str) -> Path:
    """Fetch a hub model's config.json, or take it from the local cache where the hub does not answer."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    offline = hub.unreachable()
    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=offline is not None))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = offline or str(error).splitlines()[0]
        raise RequestError(
            f"no model {name!r} here, and the hub did not give it: {reason}",
            where=where,
            fix="check the spelling, or fetch it where there is a network and name the folder: model=hf:/PATH",
        ) from None


def _require_plannable(config: Mapping[str, Any], where: str) -> None:
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
            _require_plannable(section, where)
