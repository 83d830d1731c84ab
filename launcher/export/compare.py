"""Tell whether an export computes what the training engine computed when it saved the checkpoint."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from halfstep.launcher.checkpoint.manifest import Manifest
from halfstep.launcher.checkpoint.shards import MASTER, Shards, probe_tokens
from halfstep.launcher.config import precisions
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.export import exported
from halfstep.launcher.export.weights import DTYPES

TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Of the largest logit: what the order of additions and the kernels of another device explain. For 16 bit it is about
ten times the distance between neighbouring numbers (2^-10, 2^-7), as errors add up from layer to layer."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The logits of the export beside those of the training engine."""

    largest_difference: float | None
    """None where either has values that are not finite."""
    largest_logit: float | None
    """Magnitude, of the training engine's."""
    precision: str
    """That the export was loaded in: the run's."""
    tolerance: float
    """Largest difference that is explained, relative to the largest logit."""
    tokens: int
    device: str
    ok: bool | None
    """None where nothing can be said."""
    flipped: int = 0
    """Tokens whose logits are further away in a model with experts: a router's near tie went the other way."""
    rounding: float | None = None
    """How far the logits move by what the weights' type cannot hold; None where it holds all of the run's precision."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the export's own note."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        if self.largest_difference is None or self.largest_logit is None:
            return "the logits are not finite, here or in training: there is nothing to compare"
        if self.largest_difference == 0:
            moved = "" if self.rounding is None else f"; rounding the weights moves them by up to {self.rounding:.3g}"
            return f"the same logits as the training engine's, to the bit (largest {self.largest_logit:.3g}){moved}"
        share = self.largest_difference / self.largest_logit if self.largest_logit else self.largest_difference
        verdict = "explained by" if self.ok else "MORE than is explained by"
        if self.flipped:
            verdict = f"at {self.flipped} of {self.tokens} tokens a router chose otherwise, the rest is explained by"
        return (
            f"largest difference to the training engine's logits {self.largest_difference:.3g}, largest logit "
            f"{self.largest_logit:.3g}: {share:.1e} of it, {verdict} {self.precision} ({self.tolerance:g})"
        )


def compare(folder: Path, manifest: Manifest, files: Shards, dtype: str) -> Comparison | None:
    """Load an export in the run's precision and compare its logits with the saved ones; None where none were saved.

    Weights written in a `dtype` that holds less than the run's precision are first compared with the masters, bit by
    bit, and then replaced by them: what rounding moves is not the export's fault, and one router that chooses another
    expert for it would move any logit by any amount. Raises RefusedError for weights that are not the masters rounded.
    """
    saved = files.probe()
    if saved is None:
        return None
    weights = precisions.of(manifest.precision).weights
    network = exported.load(folder, DTYPES[weights])
    rounded = None
    if not _holds(dtype, weights):
        rounded = _largest(_logits(network, manifest, saved.shape[-1]) - saved)
        _use_masters(network, folder, files, DTYPES[dtype], DTYPES[weights])
    _as_in_training(network, files, DTYPES[weights])
    return judged(network, manifest, files, rounded)


def judged(network: Any, manifest: Manifest, files: Shards, rounded: float | None = None) -> Comparison:
    """Compare the logits of a model with those that were saved, of which there are some."""
    saved = files.probe()
    assert saved is not None, "the caller looks for them"
    difference = np.abs(_logits(network, manifest, saved.shape[-1]) - saved).max(axis=-1)
    largest, tolerance = _largest(saved), TOLERANCE[precisions.of(manifest.precision).products]
    ok, flipped = None, 0
    if largest is not None and np.isfinite(difference).all():
        flipped = int((difference > tolerance * largest).sum())
        ok = flipped == 0 or (_has_router(network) and flipped * 2 < len(difference))
    return Comparison(
        largest_difference=_largest(difference),
        largest_logit=largest,
        precision=manifest.precision,
        tolerance=tolerance,
        tokens=len(difference),
        device=str(network.device),
        ok=ok,
        flipped=flipped if ok else 0,
        rounding=rounded,
    )


def _largest(values: np.ndarray) -> float | None:
    largest = float(np.abs(values).max())
    return largest if np.isfinite(largest) else None


def _holds(dtype: str, precision: str) -> bool:
    """Tell whether weights written in `dtype` come back as the run's precision had them."""
    return dtype in ("fp32", precision)


@torch.no_grad()
def _logits(network: PreTrainedModel, manifest: Manifest, vocabulary: int) -> np.ndarray:
    tokens = probe_tokens(manifest.sequence, manifest.model.get("vocabulary") or vocabulary)
    precision, device = precisions.of(manifest.precision), network.device
    with torch.autocast(device.type, DTYPES.get(precision.products), precision.autocast):
        return exported.logits(network, torch.tensor([tokens], device=device))[0].float().cpu().numpy()


@torch.no_grad()
def _use_masters(
    network: PreTrainedModel, folder: Path, files: Shards, dtype: torch.dtype, precision: torch.dtype
) -> None:
    for name, parameter in network.named_parameters():
        if parameter.is_meta:
            continue  # accelerate keeps it on the disk
        trained = name in files.manifest.model["parameters"]
        master = files.read(name, MASTER) if trained else files.buffer(name)  # of a frozen parameter
        assert master is not None, name
        value = torch.from_numpy(master).view(parameter.shape).to(parameter.device)
        if not torch.equal(parameter.to(precision), value.to(dtype).to(precision)):
            raise RefusedError(
                f"{name} in the export is not what was trained, rounded",
                where=str(folder),
                fix="check the disk, or name a folder on another with --to",
            )
        parameter.copy_(value)


@torch.no_grad()
def _as_in_training(network: PreTrainedModel, files: Shards, precision: torch.dtype) -> None:
    """Give parameters and buffers the types that the engine had: transformers keeps some parameters in fp32."""
    for parameter in network.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(precision)
    for name, about in files.buffers().items():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        buffer = module._buffers.get(leaf)
        if buffer is not None and not buffer.is_meta:
            module._buffers[leaf] = buffer.to(getattr(torch, about["dtype"]))


def _has_router(network: PreTrainedModel) -> bool:
    return any(re.search(r"expert|router|moe", name) for name, _ in network.named_parameters())
