"""Judge a model by a task: deal the batches out to ranks, ask the model, and measure the answers."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.task_file import CHOICES, GENERATE, PERPLEXITY
from halfstep.launcher.metrics import derive
from halfstep.launcher.tasks import scores
from halfstep.launcher.tasks.answers import Asked, Continued, Scored
from halfstep.launcher.tasks.requests import Prepared

Share = list[list[Any]]
"""A rank's answers as JSON carries them: example, choice, whether it was scored, and the fields of the answer."""
_Answers = dict[tuple[int, int, bool], Continued | Scored]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What came of a task."""

    name: str
    digest: str
    """Of the task and its data."""
    kind: str
    metrics: dict[str, float | None]
    """None where a value is not finite, or has no meaning."""
    signatures: dict[str, str]
    """What sacrebleu calls its metrics."""
    examples: int
    cut: int
    """Prompts that lost their beginning, for which the model has no room."""
    skipped: int
    """Rows that were left out for that."""
    prompt_tokens: int
    answer_tokens: int
    """Generated, or else scored."""
    seconds: float
    """Of asking the model, data and metrics not included."""
    tokens_per_second: float
    """Answer tokens over those seconds, of all ranks."""
    rows: tuple[dict[str, Any], ...]
    """One for each example: line, prompt, answer, reference and scores."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as programs read it, without the rows."""
        return {key: value for key, value in vars(self).items() if key != "rows"}


def judge(
    prepared: Prepared,
    asked: Asked,
    *,
    rank: int = 0,
    ranks: int = 1,
    before: Callable[[], bool] = lambda: True,
    gather: Callable[[Share], list[Share]] = lambda share: [share],
) -> Judged | None:
    """Return what a model's answers to a task are worth, on every rank the same.

    Each rank takes every `ranks`-th batch, and all of them the same number: where there is none left, one is asked
    again and not counted, since ranks that share their weights run each forward pass together. `before` is called
    before each batch; where it returns False, None is returned. `gather` collects the answers of all ranks.
    """
    began = time.perf_counter()
    share: Share = []
    how = prepared.task.spec.answer
    # One kind after the other: a generation runs more passes than a scoring.
    for batches in (prepared.generations, prepared.scorings):
        for start in range(0, len(batches), ranks):
            if not before():
                return None
            place = start + rank
            batch = batches[min(place, len(batches) - 1)]
            answered = asked.answer(batch, how, prepared.template)
            if place < len(batches):
                share += [
                    [ask.example, ask.choice, ask.start is not None, vars(answer)]
                    for ask, answer in zip(batch, answered, strict=True)
                ]
    answers: _Answers = {}
    for some in gather(share):
        for example, choice, scored, fields in some:
            kind = Scored if scored else Continued
            answers[example, choice, scored] = kind(**fields)
    return _judged(prepared, answers, time.perf_counter() - began)


def _judged(prepared: Prepared, answers: _Answers, seconds: float) -> Judged:
    spec, examples = prepared.task.spec, prepared.examples
    rows = [_row(prepared, place, answers) for place in range(len(examples))]
    scored = [answer for answer in answers.values() if isinstance(answer, Scored)]
    continued = [answer for answer in answers.values() if isinstance(answer, Continued)]
    tokens = sum(len(answer.ids) for answer in continued) if continued else sum(answer.tokens for answer in scored)
    signatures = {}
    if "bleu" in spec.metrics:
        signatures["bleu"] = scores.bleu_signature(spec.bleu_tokenize)
    if "chrf" in spec.metrics:
        signatures["chrf"] = scores.chrf_signature()
    return Judged(
        name=spec.name,
        digest=prepared.task.digest,
        kind=spec.answer.kind,
        metrics={metric: _metric(metric, prepared, rows, scored) for metric in spec.metrics},
        signatures=signatures,
        examples=len(examples),
        cut=prepared.cut,
        skipped=prepared.skipped,
        prompt_tokens=prepared.prompt_tokens,
        answer_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        rows=tuple(rows),
    )


def _row(prepared: Prepared, place: int, answers: Mapping[tuple[int, int, bool], Continued | Scored]) -> dict[str, Any]:
    """Return what happened to one example."""
    spec, example = prepared.task.spec, prepared.examples[place]
    row: dict[str, Any] = {"line": example.row, "prompt": example.prompt}
    if spec.answer.kind == CHOICES:
        parts = [answers[place, number, True] for number in range(len(example.choices))]
        likelihoods = [part.log_likelihood for part in parts if isinstance(part, Scored)]
        if spec.answer.per_token:
            lengths = [part.tokens for part in parts if isinstance(part, Scored)]
            likelihoods = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
        chosen = _likeliest(likelihoods)
        return row | {
            "answer": None if chosen is None else example.choices[chosen],
            "reference": example.choices[example.right or 0],
            "correct": chosen == example.right,
            "log_likelihoods": [derive.finite(value) for value in likelihoods],
        }
    if spec.answer.kind == GENERATE:
        answer = answers[place, 0, False]
        assert isinstance(answer, Continued)
        row |= {"answer": answer.text, "reference": example.reference, "new_tokens": len(answer.ids)}
        if example.reference is not None:
            row["correct"] = answer.text.strip() == example.reference.strip()
    if spec.answer.kind == PERPLEXITY or "perplexity" in spec.metrics:
        score = answers[place, 0, True]
        assert isinstance(score, Scored)
        row |= {"reference": example.reference, "log_likelihood": derive.finite(score.log_likelihood)}
        row["reference_tokens"] = score.tokens
    return row


def _likeliest(likelihoods: list[float]) -> int | None:
    """Return the first of the likeliest choices; None where no likelihood is a number."""
    finite = [value if math.isfinite(value) else -math.inf for value in likelihoods]
    return finite.index(max(finite)) if max(finite) > -math.inf else None


def _metric(metric: str, prepared: Prepared, rows: list[dict[str, Any]], scored: list[Scored]) -> float | None:
    answers = [(row.get("answer") or "").strip() for row in rows]
    references = [(row.get("reference") or "").strip() for row in rows]
    if metric.startswith("distinct_"):
        return scores.distinct(answers, int(metric.removeprefix("distinct_")))
    if metric == "perplexity":
        total = math.fsum(answer.log_likelihood for answer in scored)  # exact: in whatever order they came
        return derive.perplexity(-total / sum(answer.tokens for answer in scored))
    if metric == "bleu":
        return scores.bleu(answers, references, prepared.task.spec.bleu_tokenize)
    if metric == "chrf":
        return scores.chrf(answers, references)
    if metric == "macro_f1":
        return scores.macro_f1(answers, references)
    return sum(row["correct"] for row in rows) / len(rows)  # accuracy and exact_match
