"""Whether the two files of a rank fit each other and the manifest; hashes say only that nobody changed them since."""

import math
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from halfstep.launcher.checkpoint.manifest import Damaged, Manifest, rank_name
from halfstep.launcher.system import foreign
from halfstep.launcher.system.fields import Count, Text, checked
from halfstep.launcher.system.files import reason

PROBE_TOKENS = 16
PROBE = "probe/logits"
MASTER = "master"
"""The fp32 weight among a parameter's states; the others are the optimizer's, by torch's names (`exp_avg`, ...)."""
AVERAGE = "ema"
"""The exponential moving average of the masters, among the states of an optimizer."""
BUFFER = "buffer"
"""What no optimizer moves, whole, instead of a state."""
_BUFFER_TYPES = ("F32", "F64", "I64", "BOOL")


@with_config(ConfigDict(extra="allow"))
class _Sidecar(TypedDict):
    pieces: dict[Text, tuple[Count, Count]]
    """Of each parameter that the rank holds a part of: first element, length."""


def sidecar(folder: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    """Return what a rank wrote beside its tensors; raises Damaged where it could not have written that."""
    file = folder / f"{rank_name(rank)}.json"
    try:
        tree = foreign.read_object(file)
        pieces = checked(_Sidecar, tree)["pieces"]
    except OSError as error:
        raise Damaged(f"{file.name} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise Damaged(f"{file.name}: {error}") from None
    if not isinstance(tree.get("rng"), dict | None):
        raise Damaged(f"{file.name}: rng is no states of random generators")
    shapes = manifest.model["parameters"]
    for parameter, (start, length) in pieces.items():
        if parameter not in shapes:
            raise Damaged(f"{file.name} has a piece of {parameter}, which the model does not have")
        if length == 0 or start + length > math.prod(shapes[parameter]):
            raise Damaged(f"{file.name} has {length} elements of {parameter} from {start} on, which it does not have")
    return tree


def tensors(folder: Path, name: str) -> Any:
    """Open the tensors of a rank; raises Damaged where the file is not in that format."""
    try:
        return safe_open(folder / f"{name}.safetensors", framework="numpy")
    except OSError as error:
        raise Damaged(f"{name}.safetensors cannot be read: {reason(error)}") from None
    except SafetensorError as error:
        raise Damaged(f"{name}.safetensors is no file of tensors: {error}") from None


def check(folder: Path, manifest: Manifest, rank: int) -> None:
    """Raise Damaged where a rank's tensors are not those that its sidecar and the manifest speak of."""
    name = rank_name(rank)
    pieces, file = sidecar(folder, manifest, rank)["pieces"], tensors(folder, name)
    keys = set(file.keys())
    for key in sorted(keys):
        about = file.get_slice(key)
        if odd := _odd(key, about.get_shape(), about.get_dtype(), pieces, manifest):
            raise Damaged(f"{name}.safetensors: {odd}")
    for parameter in pieces:
        if f"{parameter}/{MASTER}" not in keys:
            raise Damaged(f"{name}.safetensors lacks {parameter}/{MASTER}")
    for buffer in manifest.model.get("buffers", {}) if rank == 0 else ():
        if f"{buffer}/{BUFFER}" not in keys:
            raise Damaged(f"{name}.safetensors lacks {buffer}/{BUFFER}")


def _odd(key: str, shape: list[int], dtype: str, pieces: dict[str, Any], manifest: Manifest) -> str | None:
    """Return what is wrong with a tensor by its name, shape and type."""
    owner, _, state = key.rpartition("/")
    buffers = manifest.model.get("buffers", {})
    if len(shape) != 1:
        return f"{key} is not flat"
    if state == BUFFER and owner in buffers:
        # A complex buffer is stored as pairs of real numbers.
        whole = math.prod(buffers[owner]["shape"]) * (2 if buffers[owner]["dtype"].startswith("complex") else 1)
        fits = shape[0] == whole and dtype in _BUFFER_TYPES
        return None if fits else f"{key} has {shape[0]} elements of {dtype}, which it cannot have"
    if dtype != "F32":
        return f"{key} is in {dtype}, not in F32"
    if key == PROBE:
        tokens = min(PROBE_TOKENS, manifest.sequence)
        return None if shape[0] and shape[0] % tokens == 0 else f"{key} holds no logits of {tokens} tokens"
    if owner not in pieces or state not in (MASTER, *manifest.optimizer["states"]):
        return f"nothing speaks of {key}"
    return None if shape[0] == pieces[owner][1] else f"{key} has {shape[0]} elements, not {pieces[owner][1]}"


def check_whole(folder: Path, manifest: Manifest) -> None:
    """Raise Damaged where the pieces of all ranks together are not the model."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for rank in range(manifest.world_size):
        for parameter, (start, length) in sidecar(folder, manifest, rank)["pieces"].items():
            parts.setdefault(parameter, []).append((start, length))
    for parameter, shape in manifest.model["parameters"].items():
        filled, whole = 0, math.prod(shape)
        for start, length in sorted(parts.get(parameter, [])):
            if start != filled:
                break
            filled = start + length
        if filled != whole and parameter not in manifest.model.get("buffers", {}):
            raise Damaged(f"{parameter} is there up to element {filled} of {whole}")
