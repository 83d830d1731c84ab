"""The metrics of a task: answers compared with references; every one a pure function."""

import math
from collections import Counter
from collections.abc import Sequence

# sacrebleu is loaded where it is asked: it takes 10 MiB, which every rank would have.


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean of F1 over the classes that references have.

    A class that no answer names has F1 = 0. An answer that is no class of the references counts as a miss of its
    reference's class, and makes no class of its own (scikit-learn: `f1_score(labels=classes of the references)`).
    """
    pairs = list(zip(answers, references, strict=True))
    right = Counter(reference for answer, reference in pairs if answer == reference)
    given, there = Counter(answers), Counter(references)
    return math.fsum(2 * right[label] / (given[label] + there[label]) for label in there) / len(there)


def bleu(answers: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> float:
    """Return sacrebleu's corpus BLEU, 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenize).corpus_score(answers, [references]).score


def bleu_signature(tokenize: str = "13a") -> str:
    """Return what sacrebleu calls the BLEU that `bleu` returns, for others to compute the same."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenize)
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return sacrebleu's chrF2, 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF().corpus_score(answers, [references]).score


def chrf_signature() -> str:
    """Return what sacrebleu calls the chrF that `chrf` returns."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def distinct(answers: Sequence[str], n: int) -> float | None:
    """Return the share of n-grams of words that are different, over all answers (Li et al. 2016, distinct-n).

    None where no answer has n words.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for answer in answers:
        split = answer.split()
        grams.update(tuple(split[start : start + n]) for start in range(len(split) - n + 1))
    return len(grams) / grams.total() if grams else None
