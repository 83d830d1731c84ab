"""The checkpoint of a run that trained adapters, read as if it had trained the whole model: its base and what they add.

The frozen base is in no checkpoint. It is loaded, or drawn from the seed, again, and rounded as the run had it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfstep.launcher.checkpoint import start, store
from halfstep.launcher.checkpoint.manifest import Adapters, Damaged, Manifest, read
from halfstep.launcher.checkpoint.shards import MASTER, Shards, damaged
from halfstep.launcher.config import precisions
from halfstep.launcher.config.weights_digest import fingerprint
from halfstep.launcher.errors import RefusedError
from halfstep.models import network
from halfstep.models.adapters import layer_of
from halfstep.models.draw import shape_of
from halfstep.models.hf_config import Unfit
from halfstep.models.hf_weights import Values
from halfstep.models.lora import Lora

_KEEP = "bring it back; checkpoint.keep_every keeps what other runs begin with"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def adapters_of(manifest: Manifest) -> Adapters | None:
    """Return what a checkpoint says of its adapters; None where every parameter was trained."""
    return manifest.model.get("adapters")


def lora_of(about: Adapters) -> Lora:
    """Return the adapters of a checkpoint as models know them."""
    return Lora(**{**about["lora"], "targets": tuple(about["lora"]["targets"])})


def opened(weights: str | None, digest: str | None) -> str | Values | None:
    """Return weights as `network.build` takes them: those of another run's checkpoint, merged where it has adapters.

    Every byte of it is read first. Raises Unfit where it has gone, is damaged, or is another by now.
    """
    if weights is None or not weights.startswith(start.PREFIX):
        return weights
    path, step = start.split(weights)
    assert step is not None, "a plan says which"
    folder = store.home(Path(path)) / store.folder_name(step)
    try:
        manifest = read(folder)
    except Damaged as damage:
        raise Unfit(f"the checkpoint of step {step} of {path} cannot be read: {damage}", _KEEP) from None
    if start.weights_digest(manifest) != digest:
        raise Unfit(f"the checkpoint of step {step} of {path} is another than it was when the run was planned", _KEEP)
    if reason := damaged(folder, manifest, lambda: None):
        raise Unfit(f"the checkpoint of step {step} of {path} is damaged: {reason}", _KEEP)
    about = adapters_of(manifest)
    files = Shards(folder, manifest) if about is None else Merged(Shards(folder, manifest), about)

    def value(name: str) -> Tensor:
        if name in files.manifest.model["parameters"]:
            master = files.read(name, MASTER)
            assert master is not None, name
            return torch.from_numpy(master)
        kept = files.buffers()[name]
        flat = torch.from_numpy(files.buffer(name))
        return torch.view_as_complex(flat.view(-1, 2)) if kept["dtype"].startswith("complex") else flat

    return value


def base_of(manifest: Manifest, about: Adapters) -> PreTrainedModel:
    """Return the model that was frozen, whole, on the CPU, in the run's precision.

    Raises RefusedError where the weights that it was loaded from have gone, or are others now.
    """
    weights, where = (
        about["weights"],
        f"the base of {manifest.model['name']}, {about['weights'] or 'drawn from a seed'}",
    )
    fix = "bring the folder back as it was when the run was started"
    if weights is not None and about["local"] and fingerprint(weights) != about["digest"]:
        raise RefusedError(
            "the weights under the adapters are not those that they were trained on", where=where, fix=fix
        )
    try:
        dtype = _DTYPES[precisions.of(manifest.precision).weights]
        values = opened(weights, about["digest"])
        return network.build(manifest.model["config"], seed=about["seed"], weights=values, dtype=dtype)
    except (Unfit, OSError) as error:
        raise RefusedError(
            f"the model under the adapters cannot be made: {error}", where=where, fix=getattr(error, "fix", None) or fix
        ) from None


class Merged(Shards):
    """The masters of the whole model: W + alpha / rank * B A where there is an adapter, W elsewhere."""

    def __init__(self, files: Shards, about: Adapters) -> None:
        self._adapters, self._lora = files, lora_of(about)
        self._base = base_of(files.manifest, about)
        parameters = dict(self._base.named_parameters())
        trained = {name: list(shape_of(weight)) for name, weight in parameters.items() if weight.requires_grad}
        frozen = {name: {"shape": list(weight.shape), "dtype": "float32"}
                  for name, weight in parameters.items() if not weight.requires_grad}  # fmt: skip
        model: dict[str, Any] = {**files.manifest.model, "parameters": trained}
        model["buffers"] = {**files.buffers(), **frozen}
        super().__init__(files.folder, replace(files.manifest, model=model))  # pyright: ignore[reportArgumentType]
        self._parameters = parameters
        self._matrices: dict[str, dict[str, str]] = {}
        for name in files.parameters():
            kind = "A" if ".lora_A." in name else "B"
            self._matrices.setdefault(f"{layer_of(name)}.weight", {})[kind] = name
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, parameter: str, state: str, start: int = 0, length: int | None = None) -> np.ndarray | None:
        """Return elements of a flattened parameter in fp32; None for any state but the master."""
        if state != MASTER:
            return None
        if self._last is None or self._last[0] != parameter:
            self._last = (parameter, self._merged(parameter).reshape(-1).numpy())
        return self._last[1][start : None if length is None else start + length]

    def buffer(self, name: str, rank: int = 0) -> np.ndarray:
        """Return a whole buffer as a rank had it, or a parameter that is never trained, flat."""
        if name in self._parameters:
            return self._parameters[name].detach().float().reshape(-1).numpy()
        return self._adapters.buffer(name, rank)

    def _merged(self, parameter: str) -> Tensor:
        weight = self._parameters[parameter].detach().float()
        matrices = self._matrices.get(parameter)
        if matrices is None:
            return weight
        a, b = (self._adapter(matrices[kind]) for kind in ("A", "B"))
        added = (b @ a) * (self._lora.alpha / self._lora.rank)
        # transformers' Conv1D keeps its matrix the other way round.
        transposed = isinstance(self._base.get_submodule(parameter.removesuffix(".weight")), Conv1D)
        return (weight + (added.T if transposed else added)).contiguous()

    def _adapter(self, name: str) -> Tensor:
        values = self._adapters.read(name, MASTER)
        assert values is not None, name
        return torch.from_numpy(values).view(self._adapters.shape(name))
