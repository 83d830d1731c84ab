"""The exponential moving average of the masters: one more fp32 tensor beside each, cut up as they are."""

import torch
from torch import Tensor

from halfstep.launcher.checkpoint.shards import AVERAGE
from halfstep.launcher.engine.state import training_state
from halfstep.launcher.engine.untyped import Engine


class Average:
    """What this rank holds of the average; it begins with the masters as they are now.

    After every step that was not skipped, average = decay * average + (1 - decay) * master.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._weight = 1 - decay
        masters = {id(piece.flat): piece.flat for piece in training_state.fragments(engine)}
        self._kept = {name: (flat, flat.detach().float().clone()) for name, flat in masters.items()}

    def of(self, master: Tensor) -> Tensor:
        """Return the average of a tensor of masters."""
        return self._kept[id(master)][1]

    @torch.no_grad()
    def update(self) -> None:
        """Take the masters of a step into the average."""
        for master, average in self._kept.values():
            average.lerp_(master.detach().float(), self._weight)


def begin(engine: Engine, decay: float) -> None:
    """Let an engine keep an average, which is saved and restored with its masters; a decay of 0 is none."""
    if decay:
        setattr(engine, AVERAGE, Average(engine, decay))


def after_step(engine: Engine, *, skipped: bool) -> None:
    """Move an engine's average, where it keeps one and the step was not skipped."""
    kept = training_state.average_of(engine)
    if kept is not None and not skipped:
        kept.update()
