"""Count what a rank really sends in an optimizer step, and measure how fast the ranks' messages are."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_MESSAGE_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}


class Traffic(TorchDispatchMode):
    """Adds up the collectives that start while it is entered.

    Bytes are what one rank sends when a ring does it, with the (n - 1) / n of a ring taken as 1, as the plan counts
    them (forecast/communication.py): an all-reduce passes over its tensor twice, all others once over the whole of it.
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


def bandwidth(device: torch.device) -> dict[str, float]:
    """Measure an all-reduce over all ranks: `bytes`, median `seconds`, `gigabytes_per_second` of the bus.

    The bus's share is 2 (n - 1) / n of the bytes, the convention of nccl-tests; one rank alone has none. A collective.
    """
    ranks, size = dist.get_world_size(), _MESSAGE_BYTES[device.type]
    if ranks == 1:
        return {}
    message = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[2]
    rate = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    return {"bytes": size, "seconds": round(seconds, 6), "gigabytes_per_second": round(rate, 3)}
