"""What a run reads, as a part of its Plan: one corpus, or several mixed by weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field

PLACES = ("path", "train_prefix", "validation_prefix", "tokens_digest")
"""Of a corpus: where it lies, and what older plans did not say of it."""


@dataclass(frozen=True, kw_only=True)
class CorpusPlan:
    """A corpus and how it divides into sequences."""

    path: str
    train_prefix: str
    validation_prefix: str | None
    digest: str
    train_tokens: int
    train_windows: int
    """Sequences in one epoch."""
    validation_windows: int
    """Sequences read at each evaluation."""
    tokens_digest: str | None = None
    """Identifies the tokens by a sample of them; None in a plan made before they were read."""


@dataclass(frozen=True, kw_only=True)
class PartPlan(CorpusPlan):
    """A corpus that others are mixed with."""

    weight: float
    """Its share of the sequences, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class DataPlan(CorpusPlan):
    """What is read: a corpus, or several; then the numbers are sums and the path is the mixture as text."""

    parts: list[PartPlan] = field(default_factory=list)
    """Of a mixture; empty for a single corpus."""

    @classmethod
    def unknown(cls) -> "DataPlan":
        """Return what stands for a corpus in a plan that names none."""
        return cls(
            path="",
            train_prefix="",
            validation_prefix=None,
            digest="",
            train_tokens=0,
            train_windows=0,
            validation_windows=0,
        )

    @property
    def known(self) -> bool:
        """Whether there is a corpus; a plan without one is shown, never started."""
        return self.path != ""

    @property
    def corpora(self) -> Sequence[CorpusPlan]:
        """Return what is read, one corpus or each part of a mixture."""
        return self.parts or [self]

    @property
    def weights(self) -> list[float]:
        """Return each corpus's share of the sequences."""
        return [part.weight for part in self.parts] or [1.0]

    def epochs(self, sequences: int) -> list[float]:
        """Return how often a run of so many sequences reads each corpus."""
        pairs = zip(self.weights, self.corpora, strict=True)
        return [sequences * weight / corpus.train_windows for weight, corpus in pairs]
