"""Tells the ranks of a partitioned model what one of them has seen: text and tensors, no pickles."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_texts(text: str) -> list[str]:
    """Return every rank's text, on every rank. A collective call."""
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(_device()) if text else _empty(0)
    lengths = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], device=_device()))
    longest = max(int(length) for length in lengths)
    if not longest:
        return [""] * len(lengths)
    parts = [_empty(longest) for _ in lengths]
    dist.all_gather(parts, torch.cat([own, _empty(longest - len(own))]))
    return [bytes(part[: int(length)].tolist()).decode() for part, length in zip(parts, lengths, strict=True)]


def broadcast(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor on every rank; the others give one of its shape and type. A collective call."""
    sent = tensor.to(_device()).contiguous()
    as_bytes = sent.dtype is torch.bool  # gloo sends no booleans
    if as_bytes:
        sent = sent.to(torch.uint8)
    dist.broadcast(sent, src=0)
    return sent.bool() if as_bytes else sent


def _empty(length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.uint8, device=_device())


def _device() -> torch.device:
    """Return where collectives want their tensors: NCCL has no others than a GPU's."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
