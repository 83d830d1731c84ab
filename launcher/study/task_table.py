"""What the tasks of a study's runs came to, cell by cell, with the bands that differences have to exceed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.launcher.study.collect import Result, name_of
from halfstep.launcher.study.conclusions import by_precision, differences
from halfstep.launcher.study.noise import between_seeds

COLUMNS = (
    "task and metric", "cell", "before training", "mean", "seeds' band", "gain", "gain's noise", "less reference",
    "noise band", "verdict",
)  # fmt: skip
NOTE = (
    "Tasks: what the evaluation after the last step came to, mean over the seeds. The bands are those of the losses: "
    "seeds' band two standard deviations over the seeds, noise band the 95 % confidence interval of the difference, "
    "its variance pooled over the cells of one precision. Gain: less what the model came to before the first step, "
    "its variance pooled over all cells. All cells answer the same examples, so that how few these "
    "are is in no band: another test set moves all cells together."
)
_SMALLER_IS_BETTER, _NEITHER = ("perplexity",), ("distinct_1", "distinct_2", "distinct_3", "distinct_4")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One metric of a task in one cell."""

    name: str
    """`task.metric`."""
    cell: str
    before: float | None
    """Before the first step, mean over the seeds; None where that was not asked."""
    gain: float | None
    """Mean over the seeds, after the last step less before the first."""
    gain_noise: float | None
    """What the gain has to exceed; None with one seed."""
    mean: float | None
    """Over the seeds that have it."""
    band: float | None
    """Two standard deviations over the seeds; None with one."""
    difference: float | None
    """Mean over the seeds that both have, less the reference."""
    noise: float | None
    """What the difference has to exceed; None where it cannot be said."""
    verdict: str
    """`reference`, `identical`, `within noise`, `real` (with `better` or `worse`), or `not judged`."""


def judgements(results: Sequence[Result], reference: dict[str, str]) -> list[Judgement]:
    """Return what every metric came to in every cell; none where the runs were judged by no task."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    names = dict.fromkeys(name for result in results for name in result.tasks)
    return [judgement for name in names for judgement in _of_metric(name, groups, name_of(reference))]


def _of_metric(name: str, groups: dict[str, list[Result]], reference: str) -> list[Judgement]:
    def value_of(result: Result) -> float | None:
        return result.tasks.get(name)

    paired = {cell: differences(own, groups[reference], value_of) for cell, own in groups.items() if cell != reference}
    noise = by_precision(groups, paired)
    gains = {cell: _gains(name, own) for cell, own in groups.items()}
    # Of that, unlike of a difference, nearly all is the seeds' doing, in every precision alike.
    gain_noise = between_seeds(gains)
    judged = []
    for cell, own in groups.items():
        values = [value for result in own if result.done and (value := value_of(result)) is not None]
        before = [value for result in own if (value := result.tasks_before.get(name)) is not None]
        apart, gained = paired.get(cell, []), gains[cell]
        difference = statistics.fmean(apart) if apart else None
        band = noise[cell].interval(len(apart)) if cell in noise else None if any(apart) else 0.0
        judged.append(
            Judgement(
                name=name,
                cell=cell,
                before=statistics.fmean(before) if before else None,
                gain=statistics.fmean(gained) if gained else None,
                gain_noise=gain_noise[cell].interval(len(gained)) if cell in gain_noise else None,
                mean=statistics.fmean(values) if values else None,
                band=2 * statistics.stdev(values) if len(values) > 1 else None,
                difference=difference,
                noise=None if difference is None else band,
                verdict="reference" if cell == reference else _verdict(name, apart, difference, band),
            )
        )
    return judged


def _gains(name: str, own: Sequence[Result]) -> list[float]:
    """Return by how much training moved a metric, of every seed that has both."""
    pairs = [(result.tasks.get(name), result.tasks_before.get(name)) for result in own if result.done]
    return [after - before for after, before in pairs if after is not None and before is not None]


def _verdict(name: str, apart: Sequence[float], difference: float | None, band: float | None) -> str:
    if difference is None:
        return "not judged"
    if not any(apart):
        return "identical"
    if band is None:
        return "not judged"  # one seed has no noise that could be known
    if abs(difference) <= band:
        return "within noise"
    metric = name.rpartition(".")[2]
    if metric in _NEITHER:
        return "real"
    return "real, better" if (difference < 0) == (metric in _SMALLER_IS_BETTER) else "real, worse"


def rows(judged: Sequence[Judgement]) -> list[tuple[str, ...]]:
    """Return a row under COLUMNS for each metric and cell."""
    return [
        (
            judgement.name,
            judgement.cell,
            _number(judgement.before, ".4f"),
            _number(judgement.mean, ".4f"),
            _number(judgement.band, ".4f", "±"),
            _number(judgement.gain, "+.4f"),
            _number(judgement.gain_noise, ".4f", "±"),
            _number(judgement.difference, "+.4f"),
            _number(judgement.noise, ".4f", "±"),
            judgement.verdict,
        )
        for judgement in judged
    ]


def _number(value: float | None, form: str, before: str = "") -> str:
    return "-" if value is None else before + format(value, form)
