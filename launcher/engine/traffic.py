"""Count what a rank really sends in an optimizer step, where torch hands the collective over to its backend."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Adds up the collectives that start while it is entered.

    Bytes are what one rank sends when a ring does it, with the (n - 1) / n of a ring taken as 1, as the plan counts
    them (plan/communication.py): an all-reduce passes over its tensor twice, all others once over the whole of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.collectives = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d" and (size := max(map(_bytes, args), default=0)):
            # Of what goes in and what comes out, the larger is the whole: gathered tensors, unscattered gradients.
            self.bytes += size * (2 if name.startswith("allreduce") else 1)
            self.collectives += 1
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
