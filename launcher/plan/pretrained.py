"""Read what an `hf:` model says of itself: its config, whether it has weights, and its tokenizer."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.plan import hub
from launcher.plan.corpus import vocabulary_digest
from launcher.spec.digest import digest
from launcher.spec.schema import RunSpec
from models import shapes

CountParameters = Callable[[dict[str, Any], bool], int]
"""Counts the parameters of a config, given whether its own Python code may run; loads torch."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ENDS_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What an `hf:` model says of itself."""

    config: dict[str, Any]
    """Its config with the request's overrides."""
    parameters: int | None
    """Counted on the meta device where the formulas do not know the family."""
    weights: str | None
    """Where trained weights lie, or None for a bare config."""
    weights_digest: str | None
    """Identifies the weights, wherever they lie."""
    vocabulary_digest: str | None
    """Identifies the vocabulary of the tokenizer beside the model, or None where there is none."""


def read_model(spec: RunSpec, count_parameters: CountParameters) -> ModelFacts:
    """Read the config of `model=hf:PATH_OR_ID`; raises RequestError for what is missing, damaged or contradictory."""
    name, where = spec.model.name[3:], f"model={spec.model.name}"
    local = Path(name).is_absolute()
    config_file = (
        (Path(name) / "config.json" if Path(name).is_dir() else Path(name)) if local else _download(name, where)
    )
    if not config_file.is_file():
        raise RequestError(f"{config_file} does not exist", where=where, fix="name a folder that holds a config.json")
    try:
        config = json.loads(config_file.read_text("utf-8"))
        if "model_type" not in config:
            raise ValueError("it has no model_type")
    except (ValueError, OSError, TypeError) as error:
        raise RequestError(f"{config_file} is no model's config: {error}", where=where, fix="check the file") from None
    keys = spec.model
    overrides = (keys.layers, keys.width, keys.heads, keys.vocabulary)
    has_weights = not local or any((config_file.parent / file).is_file() for file in _WEIGHT_FILES)
    if has_weights and any(overrides):
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
        config["vocab_size"] = keys.vocabulary
    known = shapes.from_hf_config(config) is not None
    return ModelFacts(
        config=config,
        parameters=None if known else count_parameters(config, spec.trust_remote_code),
        weights=(str(config_file.parent) if local else name) if has_weights else None,
        weights_digest=(_fingerprint(config_file.parent) if local else name) if has_weights else None,
        vocabulary_digest=vocabulary_digest(config_file.parent / "tokenizer.json"),
    )


def _fingerprint(folder: Path) -> str:
    """Return a digest of the weight files' names, sizes and ends: reading all of a large model would take minutes."""
    known = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as content:
            start = content.read(_ENDS_BYTES)
            content.seek(max(0, file.stat().st_size - _ENDS_BYTES))
            known.append([file.name, file.stat().st_size, hashlib.sha256(start + content.read()).hexdigest()])
    return digest(known)


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
