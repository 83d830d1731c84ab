"""Look for the fastest way to train that fits: stage, offload, micro-batch, checkpointing, ranked by predicted time."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from halfstep.launcher.forecast import step_time
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.workload import Workload

_LARGEST_MICRO = 64
_WORTH = 0.95


class Needed(Protocol):
    """What is read of a forecast of memory."""

    @property
    def peak_bytes(self) -> int:
        """Most likely."""
        ...

    def verdict(self, capacity_bytes: int | None) -> str | None:
        """Say whether it fits; None where the capacity is not known."""
        ...


@dataclass(frozen=True, kw_only=True)
class Start:
    """One (nodes, stage, offload) that the rules allow, with its DeepSpeed config read: where candidates begin."""

    nodes: int
    offload: str
    """As the run key says it."""
    workload: Workload
    micro: int | None = None
    """Where only this one is asked for."""
    checkpointing: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train, with what is predicted of it."""

    nodes: int
    offload: str
    workload: Workload
    step_seconds: float
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    """Of one rank: on the device, for a CPU rank on the host."""
    verdict: str | None
    """`fits`, `tight` or `does not fit`; None where the device's memory is not known."""

    @property
    def fits(self) -> bool:
        """Whether it may be tried: what is tight may run out of memory, what is not known is the user's to know."""
        return self.verdict in (None, "fits")

    def arguments(self) -> list[str]:
        """Return the run keys that ask for it."""
        workload = self.workload
        return [
            f"nodes={self.nodes}",
            f"gpus_per_node={workload.ranks_per_node}",
            f"zero={workload.zero}",
            f"offload={self.offload}",
            f"batch.micro={workload.micro}",
            f"activation_checkpointing={'true' if workload.activation_checkpointing else 'false'}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        workload = self.workload
        return {
            "words": self.arguments(),
            "nodes": self.nodes,
            "ranks": workload.ranks,
            "zero": workload.zero,
            "offload": self.offload,
            "micro": workload.micro,
            "accumulation": workload.accumulation,
            "activation_checkpointing": workload.activation_checkpointing,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "peak_bytes": self.peak_bytes,
            "verdict": self.verdict,
        }


def candidates(starts: Iterable[Start]) -> Iterator[tuple[Start, Workload]]:
    """Return every start with every micro-batch that divides its share of the batch, checkpointed or not."""
    for start in starts:
        share = start.workload.micro * start.workload.accumulation
        sizes = [size for size in range(1, min(share, _LARGEST_MICRO) + 1) if share % size == 0]
        for micro in [start.micro] if start.micro else sizes:
            for checkpointing in (False, True) if start.checkpointing is None else (start.checkpointing,):
                yield (
                    start,
                    dataclasses.replace(
                        start.workload,
                        micro=micro,
                        accumulation=share // micro,
                        activation_checkpointing=checkpointing,
                    ),
                )


def search(
    starts: Iterable[Start], hardware: Hardware, capacity: int | None, needs: Callable[[Workload], Needed]
) -> list[Candidate]:
    """Return all candidates: those that fit first, each kind by predicted time, then by memory.

    `needs` forecasts a workload's memory, `capacity` is a device's in bytes. What has no forecast of time is left out.
    """
    tried = []
    for start, workload in candidates(starts):
        step = step_time.forecast(workload, hardware)
        if step is None:
            continue
        memory = needs(workload)
        tried.append(
            Candidate(
                nodes=start.nodes,
                offload=start.offload,
                workload=workload,
                step_seconds=step.step_seconds,
                tokens_per_second=step.tokens_per_second,
                mfu=step.mfu,
                peak_bytes=memory.peak_bytes,
                verdict=memory.verdict(capacity),
            )
        )
    return sorted(tried, key=lambda candidate: (not candidate.fits, candidate.step_seconds, candidate.peak_bytes))


def frontier(tried: Sequence[Candidate]) -> list[Candidate]:
    """Return those that nothing beats in time, memory and devices at once, the fastest first.

    Memory counts where it is a twentieth less: what is slower for the sake of a few megabytes is no choice.
    """
    kept: list[Candidate] = []
    for candidate in sorted(tried, key=lambda other: (other.step_seconds, other.peak_bytes, other.workload.ranks)):
        peak, ranks = candidate.peak_bytes, candidate.workload.ranks
        beaten = any(_WORTH * other.peak_bytes <= peak and other.workload.ranks <= ranks for other in kept)
        if candidate.fits and not beaten:
            kept.append(candidate)
    return kept
