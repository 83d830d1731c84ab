"""Decide whether two things are the same: canonical JSON, its hash, and what a run may not change half-way."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.schema import RunSpec

# A run continues in its directory when only these differ; everything else would make it a different run.
_MAY_CHANGE = ("out", "zero", "precision", "offload", "nvme_path", "batch.micro", "steps", "tokens", "hardware",
               "nodes", "gpus_per_node", "data", "numerics.every", "numerics.max_skips")  # fmt: skip
_MAY_CHANGE_SECTIONS = ("checkpoint.", "eval.", "log.", "watch.")
# Who steps the same Adam: where one cannot be built, its run goes on with another. `ds` alone: that no such key is set.
_NO_OTHER_RUN = {"ds", *(f"ds.optimizer.params.{name}" for name in ("torch_adam", "fused", "foreach"))}


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(value: Any, length: int = 16) -> str:
    """Return the first hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def identity(spec: RunSpec) -> dict[str, Any]:
    """Return the keys that make a run this run, by dotted name.

    `data` is a path and not among them: the plan's data digest is compared instead.
    """
    leaves = flatten(spec.model_dump(by_alias=True))
    if spec.schedule.kind != "wsd":  # nothing comes of it, and runs of other kinds are older than this key
        del leaves["schedule.decay"]
    for key in ("fused_head", "keep_fp32"):  # runs are older than these keys
        if not getattr(spec, key):
            del leaves[key]
    if spec.documents == "plain":  # as it was before there was this key
        del leaves["documents"]
    for key in ("packing", "too_long"):  # the plan adds them where there are examples
        del leaves[key]
    if not spec.ema.decay:
        del leaves["ema.decay"]
    if spec.train == "full":  # likewise
        leaves = {key: value for key, value in leaves.items() if key != "train" and not key.startswith("lora.")}
    del leaves["model.router_loss"]  # what comes of it is compared: unset, it is the config's own
    return {
        key: list(value) if isinstance(value, tuple) else value  # as it comes back from a plan's JSON
        for key, value in leaves.items()
        if key not in _MAY_CHANGE and not key.startswith(_MAY_CHANGE_SECTIONS)
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two identities are those of different runs."""
    return sorted(key for key in {*old, *new} - _NO_OTHER_RUN if old.get(key) != new.get(key))
