"""Tell whether an export computes what the training engine computed when it saved the checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.shards import Shards, probe_tokens
from launcher.export import model
from launcher.export.weights import DTYPES

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
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

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the export's own note."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        if self.largest_difference is None or self.largest_logit is None:
            return "the logits are not finite, here or in training: there is nothing to compare"
        if self.largest_difference == 0:
            return f"the same logits as the training engine's, to the bit (largest {self.largest_logit:.3g})"
        share = self.largest_difference / self.largest_logit if self.largest_logit else self.largest_difference
        verdict = "explained by" if self.ok else "MORE than is explained by"
        return (
            f"largest difference to the training engine's logits {self.largest_difference:.3g}, largest logit "
            f"{self.largest_logit:.3g}: {share:.1e} of it, {verdict} {self.precision} ({self.tolerance:g})"
        )


def compare(folder: Path, manifest: Manifest, files: Shards, dtype: str) -> Comparison | None:
    """Load an export in the run's precision and compare its logits with the saved ones; None where none were saved.

    The tolerance is that of the coarser of the run's precision and the `dtype` that the weights were written in.
    """
    saved = files.probe()
    if saved is None:
        return None
    network = model.load(folder, DTYPES[manifest.precision])
    tokens = probe_tokens(manifest.sequence, saved.shape[-1])
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([tokens], device=network.device)).logits[0]
    found = logits.float().cpu().numpy()
    coarser = max((manifest.precision, dtype), key=TOLERANCE.__getitem__)
    largest, difference, ok = float(np.abs(saved).max()), float(np.abs(found - saved).max()), None
    if np.isfinite(largest) and np.isfinite(difference):
        ok = difference <= TOLERANCE[coarser] * largest
    return Comparison(
        largest_difference=difference if np.isfinite(difference) else None,
        largest_logit=largest if np.isfinite(largest) else None,
        precision=coarser,
        tolerance=TOLERANCE[coarser],
        tokens=len(tokens),
        device=str(network.device),
        ok=ok,
    )
