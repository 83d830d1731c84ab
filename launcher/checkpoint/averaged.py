"""A checkpoint read with the moving average of the masters in their place."""

import numpy as np

from halfstep.launcher.checkpoint.manifest import Manifest
from halfstep.launcher.checkpoint.shards import AVERAGE, MASTER, Shards


def has_average(manifest: Manifest) -> bool:
    """Tell whether a checkpoint holds an average."""
    return AVERAGE in manifest.optimizer["states"]


class Averaged(Shards):
    """The tensors of a checkpoint that holds an average."""

    def read(self, parameter: str, state: str, start: int = 0, length: int | None = None) -> np.ndarray | None:
        """Return elements of the average instead of the master's."""
        return super().read(parameter, AVERAGE if state == MASTER else state, start, length)
