"""Say a run's numerics to a person: one line on the run, the loss scale's moves, every layer at the last reading."""

import json

from halfstep.launcher.metrics.numerics_history import TOO_MUCH_LOST, Numerics
from halfstep.launcher.system import terminal

_SHOWN = 10
"""Moves shown from either end of a long list."""


def lines(run: Numerics) -> list[str]:
    """Return what a person reads: the run, the loss scale's moves, and every layer's gradients at the last reading."""
    return [_headline(run), "", *_move_lines(run), "", *_gradient_lines(run)]


def scale_text(scale: float | None) -> str:
    """Return a loss scale with all its digits, or a dash."""
    if scale is None:
        return "-"
    return f"{scale:,.0f}" if scale == round(scale) else f"{scale:g}"


def percent_text(share: float | None) -> str:
    """Return a fraction in percent; only what is zero reads 0, and what is not known is a dash."""
    if share is None:
        return "-"
    return "0" if share == 0 else "<0.01" if share < 1e-4 else f"{100 * share:.2f}"


def _headline(run: Numerics) -> str:
    last, planned = run.steps[-1], run.planned_steps
    of = f" of {planned:,}" if planned is not None and planned != last.step else ""
    scale = f"{scale_text(run.steps[0].loss_scale)} -> {scale_text(last.loss_scale)}"
    parts = [
        run.model,
        f"{last.step:,}{of} step{'' if (planned or last.step) == 1 else 's'}",
        run.precision or "precision not recorded",
        None if run.zero is None else f"zero={run.zero}",
        f"loss scale {scale}" if run.scaled else "no loss scale",
        f"{last.skipped_steps:,} skipped",
        "repaired " + " and ".join(run.repairs) if run.repairs else "no repairs",
        "diverged" if run.diverged else None,
    ]
    return f"{run.path}: " + ", ".join(part for part in parts if part)


def _move_lines(run: Numerics) -> list[str]:
    unscaled = [] if run.scaled else [f"{run.precision or 'this run'} trains without a loss scale"]
    if not run.moves:
        return unscaled or ["the loss scale never moved, no step was skipped"]
    rows = [["step", "scale", "", "next", "why"]]
    rows += [[f"{move.step:,}", scale_text(move.before), "->", scale_text(move.after), move.why] for move in run.moves]
    table = terminal.table([[row[0], row[-1]] for row in rows] if unscaled else rows, left=(1,) if unscaled else (4,))
    if between := run.moves[_SHOWN:-_SHOWN]:
        skipped = sum(move.skipped for move in between)
        table[1 + _SHOWN : -_SHOWN] = [f"... {len(between):,} more, {skipped:,} of them skipped ..."]
    return [*unscaled, *table]


def _gradient_lines(run: Numerics) -> list[str]:
    seen = run.gradients
    if seen is None:
        return ["no reading of the gradients: a run started with numerics.every=10 takes one every 10 steps"]
    lost = "lost at" if run.scaled else "lost in fp16 at"
    shares = (seen.zero, seen.underflow_unscaled, seen.underflow_scaled)
    rows = [["layer", "grad max", "zero", "unscaled", "scaled", "most unscaled", "most scaled"]]
    for index, layer in enumerate(seen.layers):
        rows.append([layer, _magnitude(seen.grad_max[index][-1]), *_share_cells([matrix[index] for matrix in shares])])
    last_maxima = [row[-1] for row in seen.grad_max]
    together = None if None in last_maxima else max(maximum for maximum in last_maxima if maximum is not None)
    rows.append(["all layers", _magnitude(together), *_share_cells([seen.whole_model(matrix) for matrix in shares])])
    return [
        f"gradients at step {seen.steps[-1]:,} (reading {len(seen.steps):,}), in percent of each layer's elements",
        f"zero: as computed; unscaled: lost in fp16 without scaling; scaled: {lost} {scale_text(seen.scales[-1])}; "
        "most: of all readings",
        *terminal.table(rows, left=(0,)),
        *_proposal(run),
    ]


def _proposal(run: Numerics) -> list[str]:
    """Propose what to keep in fp32, for a run in which the scale does not save the gradients of some layers."""
    kept = run.gradients.worth_fp32() if run.gradients else []
    if not kept or (run.precision or "").startswith("bf16"):
        return []  # bf16 has the range of fp32
    return [
        "",
        f"fp16 loses more than {percent_text(TOO_MUCH_LOST)} % of the gradients of {len(kept)} "
        f"layer{'' if len(kept) == 1 else 's'} even with the scale; to compute them in fp32:",
        f"  precision=fp16-autocast 'keep_fp32={json.dumps(kept)}'",
    ]


def _share_cells(series: list[list[float | None]]) -> list[str]:
    most = [max((share for share in shares if share is not None), default=None) for shares in series[1:]]
    return [percent_text(share) for share in [*(shares[-1] for shares in series), *most]]


def _magnitude(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"
