"""A slow rank: how long each one computes in a step without waiting for others, and who takes longer than the rest."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from launcher.plan.plan import Plan

WARM_UP_STEPS = 3
WINDOW_STEPS = 16
"""Steps a judgement rests on: with the warm-up fewer than 20, and enough that noise of 15 % a step raises no alarm."""
_SPIKES = 5
"""How many of a window's slowest steps do not count: a garbage collection or a neighbour's burst is no slow rank."""

Stamp = float | torch.cuda.Event


class Pace:
    """How long this rank computes in a step.

    Ranks that wait for each other all take the same time for a step, so what counts is work without a collective in
    it: the forward pass. At stage 3 that gathers weights as it goes, and the time in there is taken off again.
    """

    def __init__(self, engine: DeepSpeedEngine, plan: Plan) -> None:
        self._cuda = str(engine.device).startswith("cuda")
        self._inside = False
        self._worked: list[tuple[Stamp, Stamp]] = []
        self._waited: list[tuple[Stamp, Stamp]] = []
        self._before: tuple[list[tuple[Stamp, Stamp]], list[tuple[Stamp, Stamp]]] = ([], [])
        self._began: Stamp | None = None
        gathers = plan.zero == 3
        # torch.compile would trace the hooks: compiled stage-3 ranks are not measured, which `seconds` says with 0.
        self._measures = not (gathers and plan.compile)
        if gathers and self._measures:
            for module in torch.nn.Module.modules(engine.module):  # type: ignore[arg-type]
                self._time_the_gathering(module)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Surround the engine's forward pass, and what else is this rank's own work."""
        self._inside, began = self._measures, self._stamp()
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
        if not self._measures:
            return 0.0
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


def _between(stamps: tuple[Stamp, Stamp]) -> float:
    began, ended = stamps
    if isinstance(began, torch.cuda.Event):
        return began.elapsed_time(ended) / 1000  # type: ignore[arg-type]
    return ended - began  # type: ignore[operator]


class Stragglers:
    """Who is slow, from every rank's seconds; the same numbers give the same answer on every rank."""

    def __init__(self, world_size: int, factor: float) -> None:
        self._factor = factor
        self._seen = 0
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW_STEPS) for _ in range(world_size)]
        self._named: set[int] = set()

    def see(self, step: int, seconds: Sequence[float]) -> dict[str, Any] | None:
        """Take one step's seconds of every rank; return who is slow, and how much, once until that has passed."""
        self._seen += 1
        known = all(math.isfinite(one) and one > 0 for one in seconds)
        if self._seen <= WARM_UP_STEPS or not known or self._factor <= 0 or len(self._windows) < 2:
            return None
        for window, one in zip(self._windows, seconds, strict=True):
            window.append(one)
        if len(self._windows[0]) < WINDOW_STEPS:
            return None
        usual = [statistics.fmean(sorted(window)[:-_SPIKES]) for window in self._windows]
        ratios = [one / statistics.median(usual[:rank] + usual[rank + 1 :]) for rank, one in enumerate(usual)]
        self._named -= {rank for rank in self._named if ratios[rank] < 1 + (self._factor - 1) / 2}
        rank = max((one for one in range(len(ratios)) if one not in self._named), key=ratios.__getitem__, default=None)
        if rank is None or ratios[rank] < self._factor:
            return None
        self._named.add(rank)
        return {"rank": rank, "ratio": round(ratios[rank], 2), "steps": WINDOW_STEPS}
