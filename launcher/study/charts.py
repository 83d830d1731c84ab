"""A study's pictures, as SVG: curves and differences, loss scales, speed and memory, and what one costs the other."""

import io
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from halfstep.launcher.errors import printable
from halfstep.launcher.study.collect import Result
from halfstep.launcher.study.conclusions import Summary, Verdict

# Okabe and Ito's colours, which people with any colour vision tell apart; dashes and marks differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DASHES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_POINTS = 240
"""Of a curve; what lies between two is averaged."""
MOST_CURVES = 12
_MOST_BARS = 40
_LONGEST_NAME = 60
_GIB = 2**30


def draw(verdict: Verdict) -> dict[str, str]:
    """Return every picture for which there are data, by its title."""
    shown = _shown(verdict)
    pictures: list[tuple[str, Callable[[], Figure | None]]] = [
        ("Loss, and its difference to the reference", lambda: _curves(verdict, shown)),
        ("Loss scale and skipped steps", lambda: _scales(verdict)),
        ("Throughput and peak memory", lambda: _bars(verdict)),
        ("Speed against memory", lambda: _trade(verdict)),
    ]
    drawn = {}
    for title, make in pictures:
        with _our_style(title), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            figure = make()
            if figure is not None:
                drawn[title] = svg(figure)
    return drawn


def svg(figure: Figure) -> str:
    """Return a figure as the text of an <svg> element."""
    content = io.StringIO()
    FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = content.getvalue()
    return text[text.index("<svg") :]


def _our_style(salt: str) -> AbstractContextManager[None]:
    # Several pictures stand in one page: their ids must differ, and be the same for the same data.
    ours = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.axisbelow": True,
            "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "legend.frameon": False,
            "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    return matplotlib.style.context(["default", ours])


def look(verdict: Verdict, cell: Summary) -> dict[str, Any]:
    """Return a cell's colour, dash and mark: by its value on the first axis that varies, and on the second."""
    axes = [axis for axis in cell.values if len({other.values[axis] for other in verdict.cells}) > 1] or list(
        cell.values
    )
    places = []
    for axis in axes[:2]:
        labels = list(dict.fromkeys(other.values[axis] for other in verdict.cells))
        places.append(labels.index(cell.values[axis]))
    second = places[1] if len(places) > 1 else 0
    return {
        "color": _COLOURS[places[0] % len(_COLOURS)],
        "linestyle": _DASHES[second % len(_DASHES)],
        "marker": _MARKS[second % len(_MARKS)],
    }


def _shown(verdict: Verdict) -> list[Summary]:
    """Return the cells whose curves are drawn: the reference, the ones to choose from, then the others in order."""
    with_steps = [cell for cell in verdict.cells if any(result.curve.steps for result in cell.results)]
    first = [cell for cell in (verdict.reference, verdict.best, *verdict.frontier) if cell in with_steps]
    chosen = list({cell.name: cell for cell in [*first, *with_steps]}.values())[:MOST_CURVES]
    return [cell for cell in verdict.cells if cell in chosen]


def _curves(verdict: Verdict, shown: Sequence[Summary]) -> Figure | None:
    if not shown:
        return None
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    reference, largest = _mean_curve(verdict.reference), 0.0
    for cell in shown:
        steps, losses = _thinned(_mean_curve(cell))
        style = {key: value for key, value in look(verdict, cell).items() if key != "marker"}
        top.plot(steps, losses, label=_short(cell.name), linewidth=1.6, **style)
        if cell is not verdict.reference and reference:
            own = _mean_curve(cell, seeds=_seeds(verdict.reference))
            theirs = _mean_curve(verdict.reference, seeds=_seeds(cell))
            steps, apart = _thinned({step: own[step] - theirs[step] for step in own if step in theirs})
            bottom.plot(steps, apart, linewidth=1.2, **style)
            largest = max([largest, *map(abs, apart)])
    _draw_band(bottom, _band(verdict.reference), largest)
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("training loss, nats per token")
    bottom.set_ylabel(f"less {_short(verdict.reference.name)}")
    bottom.set_xlabel("optimizer step")
    for panel in (top, bottom):
        panel.grid(color="#E4E4E4", linewidth=0.6)
    top.legend(loc="upper right", fontsize=8, ncols=1 if len(shown) <= 6 else 2)
    return figure


def _draw_band(panel: Axes, band: dict[int, float], largest: float) -> None:
    """Shade how much the reference moves between seeds; where that hides the differences, these decide the height."""
    if not band:
        return
    steps, widths = _thinned(band)
    label = "2 standard deviations of the reference over its seeds"
    if 0 < 4 * largest < max(widths):
        panel.set_ylim(-2 * largest, 2 * largest)
        label += f" (up to ±{max(widths):.2g})"
    panel.fill_between(steps, -np.array(widths), widths, color="#BBBBBB", alpha=0.45, linewidth=0, label=label)
    panel.legend(loc="lower left", fontsize=8)


def _scales(verdict: Verdict) -> Figure | None:
    scaled = [cell for cell in _shown(verdict) if any(scale is not None for scale in cell.results[0].curve.loss_scale)]
    if not scaled:
        return None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panel = figure.subplots()
    for place, cell in enumerate(scaled):
        curve = cell.results[0].curve
        known = {step: scale for step, scale in zip(curve.steps, curve.loss_scale, strict=True) if scale}
        # Cells whose scales move alike would hide each other: each is drawn a little above the one before.
        shift = 1.03**place
        style = {key: value for key, value in look(verdict, cell).items() if key != "marker"}
        panel.plot(
            list(known),
            [scale * shift for scale in known.values()],
            drawstyle="steps-post",
            linewidth=1.5,
            label=f"{_short(cell.name)}, {len(curve.skipped)} skipped",
            **style,
        )
        marks = [step for step in curve.skipped if step in known]
        panel.plot(marks, [known[step] * shift for step in marks], "x", color=style["color"], markersize=5)
    panel.set_yscale("log", base=2)
    low, high = panel.get_ylim()
    panel.set_ylim(low / 2, high * 2)
    panel.set_xlabel("optimizer step (crosses: skipped)")
    panel.set_ylabel(f"loss scale, seed {scaled[0].results[0].seed}")
    panel.grid(color="#E4E4E4", linewidth=0.6)
    panel.legend(fontsize=8, loc="best", ncols=1 if len(scaled) <= 4 else 2)
    return figure


def _bars(verdict: Verdict) -> Figure | None:
    cells = [cell for cell in verdict.cells if cell.tokens_per_second and cell.peak_memory_bytes][:_MOST_BARS]
    if not cells:
        return None
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(cells)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(cells))
    colours = [look(verdict, cell)["color"] for cell in cells]
    left.barh(places, [cell.tokens_per_second or 0 for cell in cells], color=colours, height=0.7)
    right.barh(places, [(cell.peak_memory_bytes or 0) / _GIB for cell in cells], color=colours, height=0.7)
    predicted = [cell.results[0].predicted_memory_bytes for cell in cells]
    known = [(place, size / _GIB) for place, size in zip(places, predicted, strict=True) if size]
    if known:
        right.plot(
            [size for _, size in known],
            [place for place, _ in known],
            "|",
            color="black",
            markersize=11,
            markeredgewidth=1.6,
            label="predicted",
        )
        right.legend(fontsize=8, loc="lower right")
    left.set_yticks(
        places,
        [_short(cell.name) + (" (reference)" if cell is verdict.reference else "") for cell in cells],
        parse_math=False,
    )
    left.invert_yaxis()
    left.set_xlabel("tokens per second (median)")
    right.set_xlabel("peak memory of a rank, GiB")
    for panel in (left, right):
        panel.grid(axis="x", color="#E4E4E4", linewidth=0.6)
        panel.tick_params(axis="y", length=0)
    return figure


def _trade(verdict: Verdict) -> Figure | None:
    cells = [cell for cell in verdict.cells if cell.tokens_per_second and cell.peak_memory_bytes]
    if len(cells) < 2:
        return None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    for cell in cells:
        style = look(verdict, cell)
        usable = cell in verdict.usable
        panel.plot(
            (cell.peak_memory_bytes or 0) / _GIB,
            cell.tokens_per_second or 0.0,
            style["marker"],
            color=style["color"],
            markersize=8,
            fillstyle="full" if usable else "none",
        )
    line = sorted(verdict.frontier, key=lambda cell: cell.peak_memory_bytes or 0)
    if line:
        panel.plot(
            [(cell.peak_memory_bytes or 0) / _GIB for cell in line],
            [cell.tokens_per_second or 0.0 for cell in line],
            color="black",
            linewidth=1,
            zorder=0,
            label="efficient: no usable cell is faster and smaller",
        )
    named = line if len(cells) > MOST_CURVES else cells
    _name(panel, named)
    panel.set_xlabel("peak memory of a rank, GiB (hollow: not proved, or of another quality)")
    panel.set_ylabel("tokens per second")
    panel.margins(x=0.18, y=0.15)
    panel.grid(color="#E4E4E4", linewidth=0.6)
    if line:
        panel.legend(fontsize=8, loc="best")
    return figure


def _name(panel: Axes, cells: Sequence[Summary]) -> None:
    """Write names beside points, each a line below the one before where they would lie on each other."""
    speeds = [cell.tokens_per_second or 0.0 for cell in cells]
    apart = 0.045 * ((max(speeds) - min(speeds)) or 1.0)
    last = math.inf
    for cell in sorted(cells, key=lambda summary: -(summary.tokens_per_second or 0.0)):
        height = min(cell.tokens_per_second or 0.0, last - apart)
        last = height
        point = ((cell.peak_memory_bytes or 0) / _GIB, cell.tokens_per_second or 0.0)
        panel.annotate(
            f"   {_short(cell.name)}",
            point,
            xytext=(point[0], height),
            textcoords="data",
            fontsize=7.5,
            xycoords="data",
            parse_math=False,
            annotation_clip=False,
            horizontalalignment="left",
            verticalalignment="center",
            rotation=0,
            alpha=0.9,
        )


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "\u2026"


def _seeds(cell: Summary) -> set[int]:
    return {result.seed for result in _drawn(cell)}


def _mean_curve(cell: Summary, seeds: set[int] | None = None) -> dict[int, float]:
    """Return the mean loss over the seeds, for the steps that all of them have."""
    chosen = [result for result in _drawn(cell) if seeds is None or result.seed in seeds]
    columns = _columns(chosen)
    return {step: statistics.fmean(losses) for step, losses in columns.items() if len(losses) == len(chosen)}


def _band(cell: Summary) -> dict[int, float]:
    columns = _columns(_drawn(cell))
    return {step: 2 * statistics.stdev(losses) for step, losses in columns.items() if len(losses) > 1}


def _drawn(cell: Summary) -> list[Result]:
    """Return the runs whose curves stand for a cell: those that are done; where none is, what there is."""
    done = [result for result in cell.results if result.done and result.curve.steps]
    return done or [result for result in cell.results if result.curve.steps]


def _columns(results: Sequence[Result]) -> dict[int, list[float]]:
    """Return the losses of each step."""
    columns: dict[int, list[float]] = {}
    for result in results:
        for step, loss in zip(result.curve.steps, result.curve.loss, strict=True):
            if loss is not None:
                columns.setdefault(step, []).append(loss)
    return columns


def _thinned(curve: dict[int, float]) -> tuple[list[float], list[float]]:
    """Return a curve of at most `_POINTS` points, each the mean of its neighbours."""
    steps, values = list(curve), list(curve.values())
    size = max(1, -(-len(steps) // _POINTS))
    chunks = range(0, len(steps), size)
    return (
        [statistics.fmean(steps[first : first + size]) for first in chunks],
        [statistics.fmean(values[first : first + size]) for first in chunks],
    )
