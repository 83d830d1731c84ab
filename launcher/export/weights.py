"""Write the masters of a checkpoint as the safetensors and the config.json that transformers loads.

The library's own writers want every tensor in memory at once; here it is one chunk of one parameter.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from halfstep.launcher.checkpoint.manifest import Manifest
from halfstep.launcher.checkpoint.shards import MASTER, HashingFile, Shards
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.models.hf_config import Unfit, configuration, positions
from halfstep.models.network import skeleton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_ELEMENTS = 1 << 24
"""Of a parameter in work at a time: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of an export."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    """Whether it has a master; else it is a buffer or a frozen parameter."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Part:
    """One safetensors file: its name and the tensors in it."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What an export is made of."""

    config: PreTrainedConfig
    entries: tuple[Entry, ...]
    context: int | None
    """The most tokens that the model can look at; None where nothing limits them."""


def content(manifest: Manifest, dtype: str) -> Content:
    """Return the transformers configuration of a checkpoint's model, and the tensors that it is loaded from.

    Raises RequestError where this transformers does not know the architecture, RefusedError where it builds other
    tensors than were saved.
    """
    try:
        model = skeleton(manifest.model["config"])
    except Unfit as error:
        trained = manifest.versions.get("transformers", "not recorded")
        raise RequestError(
            f"{error}, so nobody could load the export",
            where=f"the model {manifest.model['name']} of the checkpoint",
            fix=f"install the transformers that the run used ({trained}); a model with code of its own"
            " (trust_remote_code) cannot be exported",
        ) from None
    config: PreTrainedConfig = model.config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # the part of a configuration that some classes are made of
        config = configuration(manifest.model["config"], trust_remote_code=False)
    for section in (config, config.get_text_config(decoder=True)):
        section.use_cache, section.dtype = True, DTYPES[dtype]
    config.architectures = [type(model).__name__]
    if hasattr(config, "auto_map"):
        # It names code that is not in the export, and that did not run.
        del config.auto_map  # pyright: ignore[reportAttributeAccessIssue]
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    built = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    saved = {**manifest.model["parameters"], **_buffers(manifest)}
    _compare(manifest, built, {name: list(shape) for name, shape in saved.items()}, parameters)
    entries = tuple(
        Entry(name=name, shape=tuple(built[name]), dtype=_dtype(tensor, dtype), trained=name in parameters)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in built
    )
    return Content(config=config, entries=entries, context=positions(model))


def _dtype(tensor: torch.Tensor, dtype: str) -> torch.dtype:
    """Return the type that a tensor is written in: parameters as asked for, floating-point buffers without loss."""
    if isinstance(tensor, torch.nn.Parameter):
        return DTYPES[dtype]
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return tensor.dtype if tensor.dtype in _NAMES else torch.int64


def _buffers(manifest: Manifest) -> dict[str, list[int]]:
    return {name: about["shape"] for name, about in manifest.model.get("buffers", {}).items()}


def _compare(
    manifest: Manifest, built: dict[str, list[int]], saved: dict[str, list[int]], parameters: set[str]
) -> None:
    different = sorted(name for name in {*built, *saved} if built.get(name) != saved.get(name))
    if not different:
        return
    if "buffers" not in manifest.model and not parameters & set(different):
        raise RefusedError(
            f"the checkpoint was written before buffers and frozen parameters were kept, and lacks {different[0]}"
            + (f" and {len(different) - 1} more" if len(different) > 1 else ""),
            where=f"the model {manifest.model['name']} of the checkpoint",
            fix="resume the run for some steps: the checkpoint that it writes now has them",
        )
    raise RefusedError(
        f"this transformers builds another model than was trained: {len(different)} parameters differ, such as "
        f"{different[0]} (trained {saved.get(different[0])}, built {built.get(different[0])})",
        where=f"transformers {manifest.versions.get('transformers')} trained it",
        fix="export with the versions of the run: they stand in its attempts/NNNN/env.json",
    )


def divide(entries: Iterable[Entry], max_bytes: int) -> list[Part]:
    """Deal tensors out, in order, to files of at most `max_bytes`; a larger tensor gets a file of its own."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.bytes
    total = len(groups)
    return [
        Part(
            name="model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            entries=tuple(group),
        )
        for number, group in enumerate(groups, 1)
    ]


def write(folder: Path, files: Shards, parts: list[Part]) -> None:
    """Write the weights of a checkpoint, and the index where there is more than one file.

    Raises RefusedError for a value that fp16 cannot hold, Damaged where the checkpoint lacks a part of a parameter.
    """
    for part in parts:
        _write_part(folder, files, part)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(part.bytes for part in parts)},
            "weight_map": {entry.name: part.name for part in parts for entry in part.entries},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_part(folder: Path, files: Shards, part: Part) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in part.entries:
        end = offset + entry.bytes
        shape = list(entry.shape)
        table[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with HashingFile(folder / part.name) as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for entry in part.entries:
            for chunk in _chunks(files, entry):
                out.write(_converted(chunk, entry))


def _chunks(files: Shards, entry: Entry) -> Iterator[np.ndarray]:
    if not entry.trained:
        yield files.buffer(entry.name)
        return
    whole = math.prod(entry.shape)
    for start in range(0, whole, _CHUNK_ELEMENTS):
        chunk = files.read(entry.name, MASTER, start, min(_CHUNK_ELEMENTS, whole - start))
        assert chunk is not None, entry.name
        yield chunk


def _converted(values: np.ndarray, entry: Entry) -> memoryview:
    if entry.dtype.is_complex:
        return values.data.cast("B")  # a checkpoint has the two parts beside each other, as they lie in memory
    rounded = torch.from_numpy(values).to(entry.dtype)
    if entry.dtype is torch.float16 and bool((rounded.isinf() & ~torch.from_numpy(values).isinf()).any()):
        raise RefusedError(
            f"{entry.name} has values beyond fp16's 65504 (largest {float(np.abs(values).max()):.3g})",
            where="--dtype fp16",
            fix="--dtype bf16 or --dtype fp32",
        )
    return rounded.reshape(-1).view(torch.uint8).numpy().data
