"""Find the trained weights of an `hf:` model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OTHER_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.distcp",
    "*.safetensors.index.json",
    "global_step*",
    "pytorch_model_fsdp*",
)
_NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*")
"""What transformers' Trainer leaves beside a model."""


def present(config_file: Path, config: dict[str, Any], where: str) -> bool:
    """Tell whether weights lie beside a config; raises RequestError for such as nothing would load."""
    folder = config_file.parent
    if (folder / "adapter_config.json").is_file():
        raise RequestError(
            f"{folder} holds an adapter (adapter_config.json), which is no model's weights",
            where=where,
            fix="merge it into its base model with peft (merge_and_unload, save_pretrained), and name that folder",
        )
    named = config.get("transformers_weights")
    if any((folder / file).is_file() for file in (*_WEIGHT_FILES, *([named] if isinstance(named, str) else []))):
        return True
    if others := sorted(set(_other_weights(folder))):
        raise RequestError(
            f"{folder} has {others[0]}, but no weights under a name that transformers loads",
            where=where,
            fix=f"bring them to {_WEIGHT_FILES[0]} (or shards and {_WEIGHT_FILES[1]}), or name a folder with the "
            "config alone to start from fresh weights",
        )
    return False


def _other_weights(folder: Path) -> Iterator[str]:
    for pattern in _OTHER_WEIGHTS:
        for file in folder.glob(pattern):
            if not any(file.match(other) for other in _NO_WEIGHTS):
                yield file.name
