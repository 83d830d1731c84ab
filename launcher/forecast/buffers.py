"""What lies in memory at one moment."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Something that lies in memory for a while."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A moment and all that lies on the device in it."""

    name: str
    buffers: tuple[Buffer, ...]

    @property
    def bytes(self) -> int:
        """Everything."""
        return sum(one.bytes for one in self.buffers)


def one(name: str, size: int, note: str) -> Buffer:
    """Return a buffer."""
    return Buffer(name=name, bytes=size, note=note)
