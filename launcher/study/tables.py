"""A study in words and tables: the answer, a row for each cell, and what the conditions were."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.study.collect import Result
from halfstep.launcher.study.conclusions import Summary, Verdict
from halfstep.launcher.study.conditions import WHOLE, Condition, Conditions

_GIB = 2**30
QUALITY = (
    "cell", "seeds done", "final loss", "validation loss", "seeds' band", "less reference", "noise band", "verdict",
    "skipped", "loss scale", "gate",
)  # fmt: skip
PRICE = (
    "cell", "tokens/s", "of reference", "MFU", "step, ms", "quartiles apart", "peak memory, GiB", "predicted, GiB",
    "wall, s", "load", "cost",
)  # fmt: skip
NOTES = (
    "Final loss: training loss, mean over the last tenth of the steps. Less reference: mean over the seeds that both "
    "have, which share initial weights and data. Noise band: 95 % confidence interval of that difference, its variance "
    "pooled over the cells of one precision, and never below what rounding alone does. A difference beyond it is "
    "called real: of equal cells, one in twenty exceeds its band by chance. Seeds' band: two standard deviations.",
    "Times are medians over the steps after the first five; quartiles apart: their distance as a share of the median. "
    "Load: processes that wanted a core, mean of start and end. "
    "Gate: whether the parity gate found here that the cell trains the same model as a plain trainer.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell in the two tables."""

    kind: str
    """`best`, `off` for what cannot be recommended, or empty."""
    quality: tuple[str, ...]
    """Under QUALITY."""
    price: tuple[str, ...]
    """Under PRICE."""


def rows(verdict: Verdict, price: float | None, currency: str) -> list[Row]:
    """Return a row for each cell, in the study's order."""
    shown = []
    for cell in verdict.cells:
        kind = "best" if cell is verdict.best else "" if cell in verdict.usable else "off"
        shown.append(
            Row(kind=kind, quality=_quality_of(verdict, cell), price=_price_of(verdict, cell, price, currency))
        )
    return shown


def _quality_of(verdict: Verdict, cell: Summary) -> tuple[str, ...]:
    done = [result for result in cell.results if result.done]
    return (
        cell.name,
        f"{len(done)}/{len(cell.results)}",
        number(_mean([result.loss for result in done]), ".4f"),
        number(_mean([result.eval_loss for result in done]), ".4f"),
        _signed(cell.band, "±.4f"),
        _signed(cell.difference, "+.5f"),
        _signed(cell.noise, "±.5f"),
        verdict_text(verdict, cell),
        ", ".join(dict.fromkeys(number(result.skipped_steps, ",d") for result in done)) or "-",
        ", ".join(dict.fromkeys(number(result.loss_scale, ",g") for result in done)) or "-",
        "proved" if cell.proved else "not run" if cell.proved is None and not done else "NOT PROVED",
    )


def _price_of(verdict: Verdict, cell: Summary, price: float | None, currency: str) -> tuple[str, ...]:
    done = [result for result in cell.results if result.done]
    reference, predicted = verdict.reference.tokens_per_second, cell.results[0].predicted_memory_bytes
    ratio = cell.tokens_per_second / reference if cell.tokens_per_second and reference else None
    return (
        cell.name,
        number(cell.tokens_per_second, ",.0f"),
        number(ratio, ".2f", "x"),
        number(_mean([result.mfu for result in done], 100.0), ".1f", " %"),
        number(cell.step_seconds and cell.step_seconds * 1000, ",.1f"),
        number(cell.step_spread and cell.step_spread * 100, ".0f", " %"),
        number(cell.peak_memory_bytes and cell.peak_memory_bytes / _GIB, ".3f"),
        number(predicted and predicted / _GIB, ".3f"),
        number(cell.wall_seconds, ",.1f"),
        number(_mean([result.load for result in done]), ".1f"),
        cost(cell, price, currency),
    )


def verdict_text(verdict: Verdict, cell: Summary) -> str:
    """Return what is said of a cell's difference."""
    if cell.verdict != "real":
        return cell.verdict
    better = "better" if (cell.difference or 0) < 0 else "worse"
    band = verdict.reference.band
    small = band is not None and abs(cell.difference or 0) <= band
    return f"real, {better}" + (", within seeds' band" if small else "")


def cost(cell: Summary, price: float | None, currency: str) -> str:
    """Return what one run of a cell costs, start included."""
    devices = max((result.devices or 1 for result in cell.results), default=1)
    if price is None or cell.wall_seconds is None:
        return "-"
    return f"{price * devices * cell.wall_seconds / 3600:,.4g} {currency}"


def answer(verdict: Verdict, price: float | None, currency: str) -> list[str]:
    """Return which cell to use and why, in three sentences with numbers; else why there is none."""
    best, small, cheap, reference = verdict.best, verdict.smallest, verdict.cheapest, verdict.reference
    if best is None or small is None or cheap is None:
        return [f"No cell can be recommended: {_why_none(verdict)}."]
    speed = number(best.tokens_per_second, ",.0f")
    return [
        f"Use {best.name}: at {speed} tokens/s it is the fastest{_times(verdict, best)} of the "
        f"{len(verdict.usable)} cells that are proved and whose loss is not above the reference's by more than "
        f"{_bands(verdict)}; "
        f"{_quality(verdict, best)}.{_as_fast(verdict)}",
        f"Smallest of these is {small.name} with {number((small.peak_memory_bytes or 0) / _GIB, '.3f')} GiB a rank"
        + _less(small, best, "peak_memory_bytes", "the fastest's")
        + ("." if small is best else f", at {number(small.tokens_per_second, ',.0f')} tokens/s."),
        f"Cheapest of these per token is {cheap.name}: {_per_token(cheap, price, currency)}"
        + _less(cheap, reference, "device_seconds_per_token", "the reference's")
        + ".",
    ]


def warnings(verdict: Verdict, conditions: Conditions) -> list[str]:
    """Return what a reader has to know before believing the answer."""
    sentences = []
    unproved = [cell for cell in verdict.cells if cell.done and cell.proved is not True]
    if unproved:
        reasons = dict.fromkeys(
            result.unproved_because for cell in unproved for result in cell.results if result.unproved_because
        )
        names = ", ".join(cell.name for cell in unproved)
        sentences.append(
            f"Not proved, and left out of the recommendation: {names} ({'; '.join(reasons) or 'the gate was not run'})."
        )
    ended = [result for cell in verdict.cells for result in cell.results if not result.done]
    if ended:
        kinds: dict[str, int] = {}
        for result in ended:
            kinds[result.status] = kinds.get(result.status, 0) + 1
        sentences.append(
            "Not every run is done: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + "."
        )
    if verdict.seeds == 1:
        sentences.append(
            "One seed: no noise is known, so that no difference can be called real. Give [seeds] two values or more."
        )
    noisy = [cell.name for cell in verdict.cells if cell.noisy]
    if noisy:
        sentences.append(
            f"Scatters between seeds far more than the other cells, and is judged by itself: {', '.join(noisy)}."
        )
    if 0 < verdict.freedom < 3:
        sentences.append(
            f"The noise band rests on {verdict.freedom} degree(s) of freedom and is wide: more seeds narrow it."
        )
    for what, seen in conditions.mixed.items():
        sentences.append(f"The cells did not all run on the same {what}: {', '.join(seen)}.")
    if conditions.weights:
        sentences.append("Initial weights differ where they should not: " + "; ".join(conditions.weights) + ".")
    loads = [result.load for cell in verdict.cells for result in cell.results if result.load is not None]
    if loads and max(loads) > 3 * max(min(loads), 0.7):
        sentences.append(
            f"The machine's load was between {min(loads):.1f} and {max(loads):.1f}: compare times with care."
        )
    return sentences


def equality(verdict: Verdict, conditions: Conditions) -> list[str]:
    """Return in sentences how equal the conditions were."""
    sentences = []
    runs = [result for cell in verdict.cells for result in cell.results if result.plan]
    summed = [result for result in runs if result.checksum]
    if summed and not conditions.weights:
        whose = "all runs" if len(summed) == len(runs) else f"the {len(summed)} of {len(runs)} runs that began"
        sentences.append(
            f"Initial weights: the same in {whose} of one seed, precision and number of parameters, by a checksum "
            "of all fp32 masters that does not depend on stage or ranks (half precision begins with the same draw, "
            "rounded to its type)."
        )
    if not conditions.other_data:
        sentences.append("Data: which sequences make up a batch depends on seed and step alone, in all cells alike.")
    else:
        sentences.append(
            f"Data: the cells do not read the same batches, because they differ in {conditions.other_data}."
        )
    odd = [condition.name for condition in conditions.unexplained]
    whole = [condition.name for condition in conditions.differences if condition.follows_from == WHOLE]
    if odd:
        sentences.append("Differs between runs of one cell: " + ", ".join(odd) + ".")
    if whole:
        sentences.append("Differs from cell to cell, and follows from no axis alone: " + ", ".join(whole) + ".")
    if not odd and not whole:
        sentences.append("Every key of the DeepSpeed configs that differs between two cells follows from one axis.")
    return sentences


def condition(seen: Condition, cells: int) -> dict[str, str]:
    """Return a condition as a row of a table."""
    parts = []
    for value, names in seen.values.items():
        parts.append(
            value
            if len(seen.values) == 1
            else f"{value}: {', '.join(names) if len(names) <= 4 else f'{len(names)} of {cells} cells'}"
        )
    why = "same everywhere" if len(seen.values) == 1 else "same wherever it is used" if seen.pinned else ""
    return {"name": seen.name, "text": "; ".join(parts), "why": why or seen.follows_from or "NO AXIS"}


def command(result: Result) -> str:
    """Return what runs one cell by itself."""
    return shlex.join(["halfstep", "run", *result.arguments])


def number(value: Any, form: str, unit: str = "") -> str:
    """Return a number as a table has it; a dash where there is none."""
    return "-" if value is None else format(value, form) + unit


def _signed(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"±{value:{form[1:]}}" if form.startswith("±") else format(value, form)


def _mean(values: Sequence[float | None], factor: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return factor * sum(known) / len(known) if known else None


def _times(verdict: Verdict, cell: Summary) -> str:
    ratio = verdict.ratio(cell, verdict.reference)
    if cell is verdict.reference or ratio is None:
        return ""
    interval = "" if not verdict.speed_noise else f" ({ratio[1]:.2f} to {ratio[2]:.2f})"
    return f", {ratio[0]:.2f} times{interval} the reference {verdict.reference.name},"


def _bands(verdict: Verdict) -> str:
    return "rounding (with one seed no noise is known)" if verdict.seeds == 1 else "the noise and the seeds' band"


def _as_fast(verdict: Verdict) -> str:
    names = [cell.name for cell in verdict.as_fast]
    if not names:
        return ""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f" Its speed cannot be told from that of {listed}."


def _quality(verdict: Verdict, cell: Summary) -> str:
    loss = f"its loss is {number(cell.quality, '.4f')}"
    if cell is verdict.reference:
        return f"{loss}; it is the reference itself"
    band = "" if cell.noise is None else f" ±{cell.noise:.5f}"
    return f"{loss}, {number(cell.difference, '+.5f')}{band} to the reference ({verdict_text(verdict, cell)})"


def _less(cell: Summary, other: Summary, what: str, whose: str) -> str:
    own, theirs = getattr(cell, what), getattr(other, what)
    if cell is other or not own or not theirs or round(abs(1 - own / theirs) * 100) == 0:
        return ""
    return f", {abs(1 - own / theirs) * 100:.0f} % {'less' if own < theirs else 'more'} than {whose}"


def _per_token(cell: Summary, price: float | None, currency: str) -> str:
    hours = (cell.device_seconds_per_token or 0.0) * 1e9 / 3600
    paid = "" if price is None else f", {price * hours:,.4g} {currency}"
    return f"{hours:,.3g} device-hours for 10^9 tokens{paid}"


def _why_none(verdict: Verdict) -> str:
    reasons = []
    for cell in verdict.cells:
        if not cell.done:
            reasons.append("not done")
        elif cell.proved is not True:
            reasons.append("not proved")
        else:
            reasons.append("of another quality than the reference" if cell.difference is not None else "not comparable")
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
