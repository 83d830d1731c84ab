"""Write the masters of a checkpoint as the safetensors and the config.json that transformers loads.

The library's own writers want every tensor in memory at once; here it is one chunk of one parameter.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.shards import MASTER, HashingFile, Shards
from launcher.errors import RefusedError, RequestError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_CHUNK_ELEMENTS = 1 << 24
"""Of a parameter in work at a time: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One safetensors file: its name and the parameters in it."""

    name: str
    parameters: tuple[str, ...]
    bytes: int
    """Of the tensors."""


def configuration(manifest: Manifest, dtype: str) -> PreTrainedConfig:
    """Return the transformers configuration of a checkpoint's model, after a look at whether it makes that model.

    Raises RequestError where this transformers does not know the architecture, RefusedError where it builds other
    parameters than were trained or keeps state that is no parameter.
    """
    values = manifest.model["config"]
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise RequestError(
            f"transformers knows no model_type {model_type!r}, so nobody could load the export",
            where=f"the model {manifest.model['name']} of the checkpoint",
            fix="install the transformers that the run used"
            f" ({manifest.versions.get('transformers', 'not recorded')}); a model with code of its own"
            " (trust_remote_code) cannot be exported",
        )
    config = CONFIG_MAPPING[model_type].from_dict({**values, "use_cache": True})
    config.dtype = DTYPES[dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    others = [name for name in model.state_dict() if name not in parameters]
    if others:
        raise RefusedError(
            f"the model has state that is no parameter, and a checkpoint holds none of it: {others[0]}"
            + (f" and {len(others) - 1} more" if len(others) > 1 else ""),
            where=f"model_type {model_type} of {manifest.model['name']}",
            fix="models with persistent buffers cannot be exported",
        )
    built = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    trained = {name: list(shape) for name, shape in manifest.model["parameters"].items()}
    if built != trained:
        different = sorted(name for name in {*built, *trained} if built.get(name) != trained.get(name))
        raise RefusedError(
            f"this transformers builds another model than was trained: {len(different)} parameters differ, such as "
            f"{different[0]} (trained {trained.get(different[0])}, built {built.get(different[0])})",
            where=f"transformers {manifest.versions.get('transformers')} trained it",
            fix="export with the versions of the run: they stand in its attempts/NNNN/env.json",
        )
    return config


def divide(parameters: dict[str, Any], dtype: str, max_bytes: int) -> list[Part]:
    """Deal parameters out, in order, to files of at most `max_bytes`; a larger parameter gets a file of its own."""
    groups: list[tuple[list[str], int]] = [([], 0)]
    for name, shape in parameters.items():
        count = math.prod(shape) * DTYPES[dtype].itemsize
        if groups[-1][0] and groups[-1][1] + count > max_bytes:
            groups.append(([], 0))
        names, filled = groups[-1]
        groups[-1] = ([*names, name], filled + count)
    total = len(groups)
    return [
        Part(
            name="model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            parameters=tuple(names),
            bytes=count,
        )
        for number, (names, count) in enumerate(groups, 1)
    ]


def write(folder: Path, files: Shards, parts: list[Part], dtype: str) -> None:
    """Write the weights of a checkpoint, and the index where there is more than one file.

    Raises RefusedError for a value that fp16 cannot hold, Damaged where the checkpoint lacks a part of a parameter.
    """
    for part in parts:
        _write_part(folder, files, part, dtype)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(part.bytes for part in parts)},
            "weight_map": {name: part.name for part in parts for name in part.parameters},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_part(folder: Path, files: Shards, part: Part, dtype: str) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in part.parameters:
        shape = files.shape(name)
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with HashingFile(folder / part.name) as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name in part.parameters:
            for chunk in _chunks(files, name):
                out.write(_converted(chunk, name, dtype))


def _chunks(files: Shards, name: str) -> Iterator[np.ndarray]:
    whole = math.prod(files.shape(name))
    for start in range(0, whole, _CHUNK_ELEMENTS):
        found = files.read(name, MASTER, start, min(_CHUNK_ELEMENTS, whole - start))
        assert found is not None, name
        yield found


def _converted(values: np.ndarray, name: str, dtype: str) -> memoryview:
    if dtype == "fp32":
        return memoryview(values).cast("B")
    rounded = torch.from_numpy(values).to(DTYPES[dtype])
    if dtype == "fp16" and bool((rounded.isinf() & ~torch.from_numpy(values).isinf()).any()):
        raise RefusedError(
            f"{name} has values beyond fp16's 65504 (largest {float(np.abs(values).max()):.3g})",
            where="--dtype fp16",
            fix="--dtype bf16 or --dtype fp32",
        )
    return memoryview(rounded.view(torch.int16).numpy()).cast("B")
