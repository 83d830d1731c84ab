"""What lies in memory at one moment, and which of it a CPU rank's C heap serves."""

from dataclasses import dataclass

from launcher.heap import MAPPED
from launcher.plan import tensors as cuts
from launcher.plan.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Something that lies in memory for a while."""

    name: str
    bytes: int
    note: str
    small: int = 0
    """Of the bytes, those in allocations that the C heap serves."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A moment and all that lies on the device in it."""

    name: str
    buffers: tuple[Buffer, ...]

    @property
    def bytes(self) -> int:
        """Everything."""
        return sum(one.bytes for one in self.buffers)

    @property
    def small(self) -> int:
        """What the C heap serves of it."""
        return sum(one.small for one in self.buffers)


def one(name: str, size: int, note: str) -> Buffer:
    """Return a buffer that is one allocation."""
    return Buffer(name=name, bytes=size, note=note, small=size if size < MAPPED else 0)


def several(name: str, size: int, note: str, pieces: int) -> Buffer:
    """Return a buffer that is some allocations of the same size."""
    return Buffer(name=name, bytes=size, note=note, small=size if size < pieces * MAPPED else 0)


def each(name: str, every: Tensors, element: int, note: str, times: int = 1) -> Buffer:
    """Return a buffer that is an allocation, or several, for each tensor."""
    small = cuts.persistent(every, (MAPPED - 1) // element)
    return Buffer(name=name, bytes=times * element * every.elements, note=note, small=times * element * small)


def many(name: str, size: int, note: str, small: float = 1.0) -> Buffer:
    """Return a buffer of many allocations, of which the C heap serves a share."""
    return Buffer(name=name, bytes=size, note=note, small=int(size * small))
