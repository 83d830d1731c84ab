"""A slow rank: how long each one computes in a step without waiting for others, and who takes longer than the rest."""

import contextlib
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module

from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.plan.plan import Plan

WARM_UP_STEPS = 3
WINDOW_STEPS = 16
"""Steps a judgement rests on: with the warm-up fewer than 20."""
_SPIKES = 5
"""How many of a window's slowest steps do not count: a garbage collection or a neighbour's burst is no slow rank."""
_MEMORY_STEPS = 48
"""Steps from which the noise is known."""

Stamp = float | torch.cuda.Event


class Pace:
    """How long this rank computes in a step.

    Ranks that wait for each other all take the same time for a step, so what counts is work without a collective in
    it: the forward pass. At stage 3 that gathers weights as it goes, and the time in there is taken off again.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._cuda = str(engine.device).startswith("cuda")
        self._inside = False
        self._worked: list[tuple[Stamp, Stamp]] = []
        self._waited: list[tuple[Stamp, Stamp]] = []
        self._before: tuple[list[tuple[Stamp, Stamp]], list[tuple[Stamp, Stamp]]] = ([], [])
        self._began: Stamp | None = None
        if plan.zero == 3:
            for module in set(_fetched(engine.module)):  # a shared one stands in several places
                self._time_the_gathering(module)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Surround the engine's forward pass, and what else is this rank's own work."""
        self._inside, began = True, self._stamp()
        try:
            yield
        finally:
            self._inside = False
            self._worked.append((began, self._stamp()))

    def seconds(self) -> float:
        """Return how long this rank has computed since the last call; 0 where that is not known.

        On a GPU it is the step before: reading an event of this one would make the host wait for the device. (Not
        tested on a GPU.)
        """
        now = (self._worked, self._waited)
        self._worked, self._waited = [], []
        if self._cuda:
            now, self._before = self._before, now
        return max(0.0, sum(map(_between, now[0])) - sum(map(_between, now[1])))

    def _stamp(self) -> Stamp:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time_the_gathering(self, module: torch.nn.Module) -> None:
        """Put a stamp before and after DeepSpeed's own hooks, which fetch a module's weights and give them back.

        They were registered when the engine was built (zero/parameter_offload.py, _register_deepspeed_module), so
        `prepend` comes before them and a plain hook after. On a GPU the fetch makes the computing stream wait, between
        the same two stamps.
        """

        def begin(*_: Any) -> None:
            # In the backward pass, activation checkpointing calls forward again.
            self._began = self._stamp() if self._inside else None

        def end(*_: Any) -> None:
            if self._inside and self._began is not None:
                self._waited.append((self._began, self._stamp()))
            self._began = None

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_pre_hook(end)
        module.register_forward_hook(begin, prepend=True)
        module.register_forward_hook(end)


def _fetched(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the modules whose weights DeepSpeed's hooks fetch: nothing within one that is fetched as a whole."""
    yield module
    if not z3_leaf_module(module):
        for child in module.children():
            yield from _fetched(child)


def _between(stamps: tuple[Stamp, Stamp]) -> float:
    began, ended = stamps
    if isinstance(began, torch.cuda.Event):
        return began.elapsed_time(ended) / 1000  # type: ignore[arg-type]
    return ended - began  # type: ignore[operator]


class Stragglers:
    """Who is slow, from every rank's seconds; the same numbers give the same answer on every rank.

    A rank is named when it takes `factor` times as long as the others' median, and when that is more than the noise
    explains. Simulated with lognormal noise and one step in fifty taking 5 x, two ranks: with noise of 5 to 10 % a step
    a rank 1.5 x slower is named within 20 steps in 99.5 % of cases, with 15 % in 90 %; with 20 % or more a noisy
    machine is kept from false alarms (4 to 11 % in 1000 steps, where the ratio alone gives 29 to 100 %) by naming late.
    """

    def __init__(self, world_size: int, factor: float) -> None:
        self._factor = factor
        self._seen = 0
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW_STEPS) for _ in range(world_size)]
        self._ratios: list[deque[float]] = [deque(maxlen=_MEMORY_STEPS) for _ in range(world_size)]
        # More ranks, more chances to be wrong about one.
        self._certainty = 4 + 0.25 * math.log2(max(2, world_size) / 2)
        self._named: set[int] = set()

    def see(self, step: int, seconds: Sequence[float]) -> dict[str, Any] | None:
        """Take one step's seconds of every rank; return who is slow, and how much, once until that has passed."""
        self._seen += 1
        known = all(math.isfinite(value) and value > 0 for value in seconds)
        if self._seen <= WARM_UP_STEPS or not known or self._factor <= 0 or len(self._windows) < 2:
            return None
        for rank, ratio in enumerate(_against_others(seconds)):
            self._windows[rank].append(seconds[rank])
            self._ratios[rank].append(math.log(ratio))
        if len(self._windows[0]) < WINDOW_STEPS:
            return None
        ratios = _against_others([statistics.fmean(sorted(window)[:-_SPIKES]) for window in self._windows])
        self._named -= {rank for rank in self._named if ratios[rank] < 1 + (self._factor - 1) / 2}
        slow = [rank for rank in range(len(ratios)) if rank not in self._named and self._is_slow(rank, ratios[rank])]
        if not slow:
            return None
        rank = max(slow, key=ratios.__getitem__)
        self._named.add(rank)
        return {"rank": rank, "ratio": round(ratios[rank], 2), "steps": WINDOW_STEPS}

    def _is_slow(self, rank: int, ratio: float) -> bool:
        # From one step to the next: that a rank has become slow is no noise.
        changes = [abs(after - before) for before, after in itertools.pairwise(self._ratios[rank])]
        noise = statistics.median(changes) / 0.6745 / math.sqrt(2)
        error = 1.1 * noise / math.sqrt(WINDOW_STEPS - 2)
        return ratio >= self._factor and math.log(ratio) >= self._certainty * error


def _against_others(values: Sequence[float]) -> list[float]:
    """Return each value over the median of the others."""
    return [value / statistics.median([*values[:at], *values[at + 1 :]]) for at, value in enumerate(values)]
