"""The states of every random generator of this process: what dropout draws next."""

import contextlib
import random
from collections.abc import Iterator
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


def drawn() -> list[torch.Tensor]:
    """Return the states of the generators that a model draws from: torch's, the host's and this rank's device's.

    No device is waited for: a GPU's generator is a seed and a count that the host keeps.
    """
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


@contextlib.contextmanager
def as_drawn(earlier: list[torch.Tensor]) -> Iterator[None]:
    """Let what is within draw again what was drawn since `drawn` returned `earlier`; what comes after draws on."""
    now = drawn()
    _set_drawn(earlier)
    try:
        yield
    finally:
        _set_drawn(now)


def _set_drawn(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
