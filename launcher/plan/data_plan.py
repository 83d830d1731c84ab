"""What a run reads, as a part of its Plan: one corpus, or several mixed by weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfstep.launcher.corpus import packing
from halfstep.launcher.corpus.description import DataFacts
from halfstep.launcher.errors import RequestError

PLACES = ("path", "train_prefix", "validation_prefix", "tokens_digest")
"""Of a corpus: where it lies, and what older plans did not say of it."""


@dataclass(frozen=True, kw_only=True)
class ExamplesPlan:
    """What is read of a corpus of examples, and how."""

    packing: bool
    """Whether examples share sequences; otherwise each has one for itself."""
    too_long: str
    """What becomes of an example that is longer than the sequence: `refuse`, `cut` or `drop`."""
    train: int
    """Examples in one epoch."""
    validation: int
    """Examples of the whole validation split."""
    longest: int
    """Tokens of the longest of both splits, as it was prepared."""
    longer: int = 0
    """Examples of both splits that are longer than the sequence, and cut or dropped."""
    padding: float = 0.0
    """Share of the positions of an epoch that no example takes."""


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
    examples: ExamplesPlan | None = None
    """None for text, which is one stream, cut into sequences."""


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

    @property
    def has_examples(self) -> bool:
        """Whether examples are read, alone or in a mixture."""
        return any(corpus.examples is not None for corpus in self.corpora)

    def epochs(self, sequences: int) -> list[float]:
        """Return how often a run of so many sequences reads each corpus."""
        pairs = zip(self.weights, self.corpora, strict=True)
        return [sequences * weight / corpus.train_windows for weight, corpus in pairs]


@dataclass(frozen=True, kw_only=True)
class Division:
    """How corpora are divided into sequences."""

    sequence: int
    evaluated: int
    """How many validation sequences of each corpus are asked for."""
    packing: bool = True
    """Of examples: whether they share sequences."""
    too_long: str = "refuse"
    """Of examples: what becomes of those that are longer than a sequence."""


def divided(data: DataFacts, how: Division) -> DataPlan:
    """Return how a corpus, or each part of a mixture, divides into sequences.

    Raises RequestError where not one fits, and for examples that are too long where that is not provided for.
    """
    if not data.parts:
        return DataPlan(**_corpus(data, how))
    parts = [PartPlan(**_corpus(part.corpus, how), weight=part.weight) for part in data.parts]
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


def lost_targets(data: DataFacts, how: Division) -> int:
    """Return how many training examples are cut before their first target, so that nothing is learnt from them."""
    if how.too_long != "cut":
        return 0
    return sum(count for first, count in data.train_first_targets or () if first >= how.sequence)


def _corpus(data: DataFacts, how: Division) -> dict[str, Any]:
    """Return the fields of a corpus's plan."""
    windows, validation, examples = _of_text(data, how) if data.train_lengths is None else _of_examples(data, how)
    return {
        "path": data.path,
        "train_prefix": data.train_prefix,
        "validation_prefix": data.validation_prefix,
        "digest": data.digest,
        "train_tokens": data.train_tokens,
        "train_windows": windows,
        "validation_windows": min(validation, how.evaluated),
        "tokens_digest": data.tokens_digest,
        "examples": examples,
    }


def _of_text(data: DataFacts, how: Division) -> tuple[int, int, None]:
    """Return how many sequences the splits of a stream of tokens are."""
    where, sequence = f"data={data.path}", how.sequence
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
    return windows, validation, None


def _of_examples(data: DataFacts, how: Division) -> tuple[int, int, ExamplesPlan]:
    """Return how many sequences the splits of a corpus of examples are."""
    where, sequence = f"data={data.path}", how.sequence
    train, validation = data.train_lengths or (), data.validation_lengths or ()
    every, longest = sum(count for _, count in train + validation), max(length for length, _ in train + validation)
    longer = packing.longer(train + validation, sequence)
    if longer and how.too_long == "refuse":
        raise RequestError(
            f"{longer:,} of {every:,} examples are longer than sequence={sequence}; the longest has {longest:,} tokens",
            where=where,
            fix=f"take sequence={longest}, or say what becomes of them: too_long=cut or too_long=drop",
        )
    read = [packing.fitted(lengths, sequence, how.too_long) for lengths in (train, validation)]
    bins = [packing.bins_of(lengths, sequence, packing=how.packing, too_long=how.too_long) for lengths in read]
    windows, held_back = map(packing.total, bins)
    for name, lengths, all_of_them in (("training", read[0], train), ("validation", read[1], validation)):
        if not lengths and (all_of_them or name == "training"):
            raise RequestError(
                f"all {name} examples are longer than sequence={sequence}, and too_long=drop leaves none",
                where=where,
                fix="take a longer sequence, or too_long=cut",
            )
    targeted = sum(count for _, count in data.train_first_targets or ())
    if targeted and lost_targets(data, how) == targeted:
        raise RequestError(
            f"too_long=cut leaves no example a target: all begin with {sequence} tokens or more that are none",
            where=where,
            fix="take a longer sequence, or too_long=drop for the examples that fit",
        )
    tokens = sum(length * count for length, count in read[0])
    return (
        windows,
        held_back,
        ExamplesPlan(
            packing=how.packing,
            too_long=how.too_long,
            train=sum(count for _, count in read[0]),
            validation=sum(count for _, count in read[1]),
            longest=longest,
            longer=longer,
            padding=1 - tokens / (windows * sequence),
        ),
    )
