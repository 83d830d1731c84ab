"""What a run reads, as a part of its Plan: one corpus, or several mixed by weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfstep.launcher.corpus.description import DataFacts
from halfstep.launcher.errors import RequestError

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


def divided(data: DataFacts, sequence: int, evaluated: int) -> DataPlan:
    """Return how a corpus, or each part of a mixture, divides into sequences.

    `evaluated` is how many validation sequences of each are asked for. Raises RequestError where not one fits.
    """
    if not data.parts:
        return DataPlan(**_corpus(data, sequence, evaluated))
    parts = [PartPlan(**_corpus(part.corpus, sequence, evaluated), weight=part.weight) for part in data.parts]
    return DataPlan(
        path=data.path,
        train_prefix=data.train_prefix,
        validation_prefix=data.validation_prefix,
        digest=data.digest,
        train_tokens=data.train_tokens,
        train_windows=sum(part.train_windows for part in parts),
        validation_windows=sum(part.validation_windows for part in parts),
        tokens_digest=data.tokens_digest,
        parts=parts,
    )


def _corpus(data: DataFacts, sequence: int, evaluated: int) -> dict[str, Any]:
    """Return the fields of a corpus's plan; `evaluated` is how many validation sequences are asked for."""
    where = f"data={data.path}"
    windows = max(0, (data.train_tokens - 1) // sequence)
    if windows == 0:
        raise RequestError(
            f"sequence={sequence} is longer than the corpus, which has {data.train_tokens} training tokens",
            where=where,
            fix=f"take a sequence below {data.train_tokens}, or more text",
        )
    validation = max(0, (data.validation_tokens - 1) // sequence)
    if validation == 0 and data.validation_prefix is not None:
        raise RequestError(
            f"sequence={sequence} is longer than the validation split, which has {data.validation_tokens} tokens",
            where=where,
            fix=f"take a sequence below {data.validation_tokens}, or prepare with a larger --validation-fraction",
        )
    return {
        "path": data.path,
        "train_prefix": data.train_prefix,
        "validation_prefix": data.validation_prefix,
        "digest": data.digest,
        "train_tokens": data.train_tokens,
        "train_windows": windows,
        "validation_windows": min(validation, evaluated),
        "tokens_digest": data.tokens_digest,
    }
