"""What a model keeps that no optimizer moves: persistent buffers (a router's bias, a mask) and frozen parameters.

Saved and restored to the bit. Frozen parameters are the same on every rank; buffers may differ, where a forward pass
writes to them, and then each rank's own are kept. The model under adapters is not saved: it is drawn or loaded again,
bit for bit, and would be hundreds of times what is trained.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from halfstep.launcher.checkpoint.manifest import Adapters, Buffer
from halfstep.launcher.checkpoint.shards import BUFFER, Damaged, Piece, Shards, stored_type
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.plan.plan import Plan
from halfstep.models.adapters import is_adapter
from halfstep.models.draw import gathered, shape_of
from halfstep.models.lora import Lora


def described(engine: Engine) -> dict[str, Buffer]:
    """Return shape and type (torch's name) of every persistent buffer and frozen parameter."""
    return {
        name: {"shape": list(shape_of(kept)), "dtype": str(kept.dtype).removeprefix("torch.")}
        for name, kept in _kept(engine.module)
    }


def adapters(plan: Plan, lora: Lora) -> Adapters:
    """Return where the frozen model comes from: it can be had again, and is not saved with every checkpoint."""
    weights = plan.model.weights
    local = weights is not None and Path(weights).is_absolute()
    digest = plan.model.weights_digest
    return Adapters(lora=asdict(lora), weights=weights, local=local, digest=digest, seed=plan.seed)


@torch.no_grad()
def pieces(engine: Engine) -> list[Piece]:
    """Return what this rank writes: rank 0 everything, another rank the buffers that are others than rank 0's.

    A collective call.
    """
    rank, arrays, hashes = torch.distributed.get_rank(), [], {}
    for name, kept in _kept(engine.module):
        with gathered([kept] if isinstance(kept, nn.Parameter) else []):
            frozen = isinstance(kept, nn.Parameter)
            if frozen and rank:
                continue
            array = _encoded(kept)
        arrays.append((name, array))
        if not frozen:
            hashes[name] = xxhash.xxh3_128_hexdigest(array.tobytes())
    first = distributed.gather_objects(hashes)[0]
    return [
        Piece(key=f"{name}/{BUFFER}", length=array.size, array=lambda array=array: array, dtype=stored_type(array))
        for name, array in arrays
        if rank == 0 or hashes[name] != first[name]
    ]


@torch.no_grad()
def restore(engine: Engine, files: Shards, rank: int) -> None:
    """Fill buffers and frozen parameters from a checkpoint; one that was written before they were kept has none.

    A collective call. Raises Damaged where they are not those of this model.
    """
    saved, rank = files.buffers(), rank if files.manifest.world_size == torch.distributed.get_world_size() else 0
    own = {name: about["shape"] for name, about in described(engine).items()}
    if not saved:
        return
    if own != {name: about["shape"] for name, about in saved.items()}:
        different = sorted(name for name in {*own, *saved} if own.get(name) != saved.get(name, {}).get("shape"))
        raise Damaged(f"its buffers are not those of the model that was built, such as {different[0]}")
    for name, kept in _kept(engine.module):
        array = files.buffer(name, rank)
        with gathered([kept] if isinstance(kept, nn.Parameter) else [], modifier_rank=0):
            kept.copy_(decoded(array, tuple(own[name]), complex_=kept.is_complex()))


def decoded(array: np.ndarray, shape: tuple[int, ...], *, complex_: bool = False) -> Tensor:
    """Return a saved buffer as the tensor that it was, in the type that it was stored in."""
    flat = torch.from_numpy(array)
    return torch.view_as_complex(flat.view(*shape, 2)) if complex_ else flat.view(shape)


def _kept(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
    parameters = dict(model.named_parameters())
    if not any(map(is_adapter, parameters)):
        yield from ((name, parameter) for name, parameter in parameters.items() if not parameter.requires_grad)


def _encoded(kept: Tensor) -> np.ndarray:
    """Return a flat array of a type that a checkpoint holds, with every bit of the value."""
    value = kept.detach().cpu()
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.dtype is torch.bool or value.dtype is torch.float64:
        return value.reshape(-1).numpy()
    return (value.float() if value.is_floating_point() else value.long()).reshape(-1).numpy()
