"""The picture of a run's numerics: loss scale and skipped steps, the loss, and what fp16 loses, layer by step."""

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from halfstep.launcher.errors import RequestError, printable
from halfstep.launcher.metrics.numerics_history import Matrix, Numerics
from halfstep.launcher.metrics.numerics_report import percent_text, scale_text
from halfstep.launcher.system.files import reason, write_atomic

DOTS_PER_INCH = 150
_FAINTEST = 1e-5
"""The smallest share with a colour of its own: 0.001 %."""
_ZERO = _FAINTEST / 10
"""Stands for zero in a map."""
_TICKS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NAMED_LAYERS = 16
"""Names that fit beside one map."""
_LONGEST_NAME = 24
# Okabe and Ito's colours, which people with any colour vision tell apart; the marks differ in shape as well.
_BLUE, _RED, _ORANGE = "#0072B2", "#C8102E", "#E69F00"


def write(run: Numerics, file: Path) -> None:
    """Draw a run into a PNG file; RequestError where it cannot be written."""
    if file.suffix.lower() != ".png":
        raise RequestError(f"the picture is a PNG, not {file.name}", where=f"--out {file}", fix="--out FILE.png")
    content = png(run)
    try:
        write_atomic(file, content, sync=False)  # a link of that name leads nowhere
    except OSError as error:
        raise RequestError(
            f"the picture cannot be written: {reason(error)}", where=str(file), fix="name another file: --out FILE.png"
        ) from None


def png(run: Numerics) -> bytes:
    """Return the picture as a PNG, 1500 pixels wide."""
    content = io.BytesIO()
    with _our_style(), warnings.catch_warnings():
        # A letter of the run's name that the font lacks is drawn as a box, which tells a reader enough.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        FigureCanvasAgg(draw(run)).print_png(content)
    return content.getvalue()


def draw(run: Numerics) -> Figure:
    """Return the figure: scale (or gradient norm), loss, and with readings the maps without and with scaling."""
    with _our_style():
        maps = run.gradients is not None
        figure = Figure(figsize=(10, 9 if maps else 4.5), dpi=DOTS_PER_INCH, layout="constrained")
        grid = figure.add_gridspec(
            4 if maps else 2, 2, width_ratios=(1, 0.022), height_ratios=(2, 1.3, 2.5, 2.5) if maps else (2, 1.3)
        )
        top = figure.add_subplot(grid[0, 0])
        panels = [top, *(figure.add_subplot(grid[row, 0], sharex=top) for row in range(1, 4 if maps else 2))]
        figure.suptitle(_title(run), fontsize=13, fontweight="bold", parse_math=False)
        panels[-1].set_xlabel("optimizer step")
        _draw_scale(panels[0], run) if run.scaled else _draw_norm(panels[0], run)
        _draw_loss(panels[1], run)
        if run.gradients is not None:
            _draw_colour_bar(figure, figure.add_subplot(grid[2:, 1]), _draw_maps(panels[2:], run))
        for panel in panels[:-1]:
            panel.tick_params(labelbottom=False)
        panels[-1].set_xlim(0, run.steps[-1].step)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return figure


def _our_style() -> AbstractContextManager[None]:
    # A picture should not depend on whose matplotlibrc lies around.
    ours = {"font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.axisbelow": True}
    ours["text.parse_math"] = False  # names may hold a dollar sign
    return matplotlib.style.context(["default", ours])


def _title(run: Numerics) -> str:
    parts = [run.model, run.precision, None if run.zero is None else f"zero={run.zero}"]
    return printable(f"{run.path.resolve().name}: " + ", ".join(word for word in parts if word))


def _draw_scale(panel: Axes, run: Numerics) -> None:
    steps = [0, *(row.step for row in run.steps)]
    scales = _with_gaps([run.steps[0].loss_scale, *(row.loss_scale for row in run.steps)])
    panel.plot(steps, scales, drawstyle="steps-pre", color=_BLUE, linewidth=1.8)
    panel.set_yscale("log", base=2)
    low, high = np.nanmin(scales), np.nanmax(scales)
    panel.set_ylim(low / 4, high * 4)  # a scale that never moved would have no height
    panel.set_ylabel("loss scale")
    panel.set_title(f"Loss scale {scale_text(run.steps[0].loss_scale)} \u2192 {scale_text(run.steps[-1].loss_scale)}")
    _mark(panel, run, {row.step: row.loss_scale for row in run.steps})


def _draw_norm(panel: Axes, run: Numerics) -> None:
    norms = {row.step: row.grad_norm for row in run.steps}
    panel.plot(list(norms), _with_gaps(norms.values()), **_line(run))
    positive = [norm for norm in norms.values() if norm]
    if positive:
        few_decades = max(positive) / min(positive) < 1000
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if few_decades and f"{value:e}"[0] in "25" else ""
        )
    panel.set_ylabel("gradient norm")
    panel.set_title(f"No loss scale in {run.precision or 'this run'}: gradient norm before clipping")
    _mark(panel, run, norms)


def _draw_loss(panel: Axes, run: Numerics) -> None:
    steps = [row.step for row in run.steps]
    panel.plot(steps, _with_gaps(row.loss for row in run.steps), label="training", **_line(run))
    if run.evaluations:
        done, losses = zip(*run.evaluations, strict=True)
        points: dict[str, Any] = {"marker": "o", "color": _ORANGE, "markeredgecolor": "black", "markersize": 5}
        panel.plot(done, _with_gaps(losses), linestyle="none", label="validation", clip_on=False, zorder=3, **points)
    panel.set_ylabel("nats per token")
    panel.set_title("Loss")
    _mark_lost(panel, run)
    _legend(panel)


def _line(run: Numerics) -> dict[str, Any]:
    # The dots show a value between two that are missing, which no line would.
    size = 5 if len(run.steps) <= 20 else 3 if len(run.steps) <= 200 else 1
    return {"color": _BLUE, "linewidth": 1.2, "marker": ".", "markersize": size}


def _mark(panel: Axes, run: Numerics, heights: Mapping[int, float | None]) -> None:
    """Mark skipped steps at their height, or at the bottom where they have none."""
    skipped = [row.step for row in run.steps if row.overflow]
    known = [step for step in skipped if heights[step] is not None]
    unknown = [step for step in skipped if heights[step] is None]
    size = 7 if len(skipped) <= 50 else 4
    look: dict[str, Any] = {"color": _RED, "marker": "x", "markersize": size, "markeredgewidth": size / 4}
    look |= {"linestyle": "none", "zorder": 3, "clip_on": False}
    label = f"skipped ({len(skipped):,})"
    if known:
        panel.plot(known, _with_gaps(heights[step] for step in known), label=label, **look)
    if unknown:
        at_edge = panel.get_xaxis_transform()
        panel.plot(unknown, [0.08] * len(unknown), transform=at_edge, label=label, **look)
    _mark_lost(panel, run)
    _legend(panel)


def _mark_lost(panel: Axes, run: Numerics) -> None:
    lost = [row.step for row in run.steps if row.loss is None]
    if lost:
        panel.plot(
            lost,
            [0.93] * len(lost),
            linestyle="none",
            marker="v",
            color=_ORANGE,
            markeredgecolor="black",
            markersize=7,
            zorder=3,
            clip_on=False,
            transform=panel.get_xaxis_transform(),
            label=f"loss not finite ({len(lost):,})",
        )


def _legend(panel: Axes) -> None:
    """Put the legend on the title's line, where it hides nothing."""
    panel.grid(color="#DDDDDD", linewidth=0.6)
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        panel.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False, borderpad=0.1
        )


def _draw_maps(panels: Sequence[Axes], run: Numerics) -> QuadMesh:
    assert run.gradients is not None, "drawn only where there is a reading"
    seen, meshes = run.gradients, []
    unscaled, scaled = (
        percent_text(seen.whole_model(matrix)[-1]) for matrix in (seen.underflow_unscaled, seen.underflow_scaled)
    )
    scale = "at the step's loss scale" if run.scaled else f"at a loss scale of {scale_text(seen.scales[-1])}"
    last = f"at step {seen.steps[-1]:,}"
    texts = (
        f"Gradient elements lost in fp16 without scaling: {unscaled} % of all {last}",
        f"Gradient elements lost in fp16 {scale}: {scaled} % of all {last}",
    )
    for panel, text, matrix in zip(panels, texts, (seen.underflow_unscaled, seen.underflow_scaled), strict=True):
        meshes.append(_draw_map(panel, seen.steps, matrix))
        panel.set_title(text)
        chosen = _spread(len(seen.layers), _NAMED_LAYERS)
        names = _short(seen.layers)
        panel.set_yticks(chosen, [names[index] for index in chosen], fontsize=8.5, parse_math=False)
        panel.set_ylabel("layer")
    if any(None in row for row in seen.underflow_unscaled):
        panels[-1].set_xlabel("optimizer step (hatched: gradients not finite)")
    return meshes[0]


def _draw_map(panel: Axes, steps: Sequence[int], matrix: Matrix) -> QuadMesh:
    shares = np.ma.masked_invalid(np.array(matrix, dtype=float))
    # A share too small for the scale is still not zero and must not look like it; zero has no logarithm.
    shares = np.ma.where(shares > 0, np.ma.maximum(shares, _FAINTEST), _ZERO)
    rows = np.arange(len(matrix) + 1) - 0.5
    mesh = panel.pcolormesh(_edges(steps), rows, shares, cmap=_colours(), norm=LogNorm(_FAINTEST, 1.0))
    panel.patch.set(facecolor="#E8E8E8", hatch="////", edgecolor="#A0A0A0")  # where there is no reading to trust
    panel.set_ylim(len(matrix) - 0.5, -0.5)
    return mesh


def _colours() -> Colormap:
    """Return viridis from light to dark, and white for what is below its scale: zero."""
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0, 1, 256))
    return ListedColormap(colours, name="halfstep").with_extremes(under="white", bad="none")


def _draw_colour_bar(figure: Figure, panel: Axes, mesh: QuadMesh) -> None:
    bar = figure.colorbar(mesh, cax=panel, extend="min", extendrect=True, extendfrac=0.07)
    bar.set_ticks(_TICKS, labels=[f"{100 * share:g}" for share in _TICKS])
    bar.minorticks_off()
    bar.set_label("percent of the layer's gradient elements")
    panel.annotate("0", (1, -0.045), xytext=(7, 0), xycoords="axes fraction", textcoords="offset points", va="center")


def _with_gaps(values: Iterable[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Return where each reading's cell begins and ends: from the reading before it to its own step."""
    # A single reading is the first, taken at step `numerics.every`.
    every = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    return np.array([steps[0] - every, *steps])


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` positions, evenly spread, first and last among them."""
    shown = min(count, most)
    return [round(index * (count - 1) / max(shown - 1, 1)) for index in range(shown)]


def _short(layers: Sequence[str]) -> list[str]:
    """Return the names without the part before a dot that all of them share, and the end of long ones."""
    depth, parts = 0, [name.split(".") for name in layers]
    while len({tuple(part[: depth + 1]) for part in parts}) == 1 and min(map(len, parts)) > depth + 1:
        depth += 1
    names = [".".join(part[depth:]) for part in parts]
    return [name if len(name) <= _LONGEST_NAME else "\u2026" + name[1 - _LONGEST_NAME :] for name in names]
