"""The states of every random generator of this process: what dropout draws next."""

import random
from typing import Any

import numpy as np
import torch

from halfstep.launcher.config.digest import digest
from halfstep.launcher.plan.plan import Plan


def seed(plan: Plan, rank: int, step: int) -> None:
    """Seed all generators of a rank, differently on every rank, for the steps after `step`."""
    number = int(digest([plan.seed, rank, *([step] if step else [])]), 16)
    torch.manual_seed(number % 2**63)  # cuda's as well
    random.seed(number)
    np.random.seed(number % 2**32)


def states() -> dict[str, Any]:
    """Return the states of all generators, JSON-able."""
    kind, keys, *rest = np.random.get_state()
    drawn: dict[str, Any] = {
        "torch": _hex(torch.get_rng_state()),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        drawn["cuda"] = _hex(torch.cuda.get_rng_state())
    return drawn


def restore(drawn: dict[str, Any]) -> None:
    """Set all generators to the states that `states` returned."""
    torch.set_rng_state(_tensor(drawn["torch"]))
    kind, keys, *rest = drawn["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, inner, gauss = drawn["python"]
    random.setstate((version, tuple(inner), gauss))
    if torch.cuda.is_available() and "cuda" in drawn:
        torch.cuda.set_rng_state(_tensor(drawn["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
