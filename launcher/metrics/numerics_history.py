"""What a run directory tells of its numerics: the loss scale's moves, skipped steps, and what fp16 would lose."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.launcher.rundir.metric_rows import StepRecord
from halfstep.launcher.rundir.records import Planned, Summary
from halfstep.launcher.rundir.run_reader import Run

TOO_MUCH_LOST = 0.01
"""Of a layer's gradient elements, lost in fp16 with the scale: beyond this share it is proposed for fp32."""
Matrix = list[list[float | None]]
"""One row a layer, in model order; one column a reading, steps increasing; None where there is nothing to tell."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """A step that was skipped or had no finite loss, or after which the loss scale moved."""

    step: int
    before: float | None
    """The loss scale of this step."""
    after: float | None
    """The loss scale of the next step; None also where there is no next step yet."""
    skipped: bool
    loss_finite: bool
    why: str
    overflow: dict[str, Any] | None
    """The event that tells where it arose."""
    loss_not_finite: dict[str, Any] | None
    """The event that tells where it arose."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Every reading of every layer's gradients.

    Shares are fractions, 0 to 1, of the layer's elements; None where a gradient was not finite: what has overflowed
    does not underflow, and would look as if nothing were lost.
    """

    steps: list[int]
    scales: list[float]
    """The scale that `underflow_scaled` is about, one a reading."""
    layers: list[str]
    elements: list[int]
    """One a layer."""
    grad_max: Matrix
    """Largest magnitude, unscaled; None where it was not finite."""
    zero: Matrix
    """Exactly zero as computed."""
    underflow_unscaled: Matrix
    """Not zero as computed, but zero in fp16 without scaling."""
    underflow_scaled: Matrix
    """Lost at the scale."""

    def worth_fp32(self) -> list[str]:
        """Return the layers of whose gradients fp16 lost more than `TOO_MUCH_LOST` in some reading."""
        return [
            layer
            for layer, shares in zip(self.layers, self.underflow_scaled, strict=True)
            if max((share for share in shares if share is not None), default=0.0) > TOO_MUCH_LOST
        ]

    def whole_model(self, matrix: Matrix) -> list[float | None]:
        """Return the share of all layers' elements together, one a reading."""
        means: list[float | None] = []
        for column in range(len(self.steps)):
            seen = [
                (row[column], size) for row, size in zip(matrix, self.elements, strict=True) if row[column] is not None
            ]
            size = sum(size for _, size in seen)
            means.append(sum((share or 0.0) * size for share, size in seen) / size if size else None)
        return means


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The numerics of a run's last attempt."""

    path: Path
    model: str | None
    """None, here and below, where neither plan.json nor summary.json tells."""
    precision: str | None
    zero: int | None
    planned_steps: int | None
    steps: list[StepRecord]
    """Never empty."""
    evaluations: list[tuple[int, float | None]]
    """Steps done before it, and the validation loss."""
    repairs: list[str]
    diverged: bool
    moves: list[Move]
    gradients: Gradients | None
    """None without a reading."""

    @property
    def scaled(self) -> bool:
        """Whether the loss was scaled at all."""
        return any(row.loss_scale is not None for row in self.steps)


def read(path: Path) -> Numerics:
    """Read a run directory; RequestError where it is none, has no step yet, or holds a damaged line."""
    run, file = Run(path), path / "metrics.jsonl"
    if run.planned is None and run.summary is None and not file.exists():
        raise RequestError(
            f"{path} is not a run directory" + ("" if path.is_dir() else ": there is no such folder"),
            where=f"halfstep numerics {path}",
            fix="name a directory made by `halfstep run` or `launcher/train.py`",
        )
    if not file.exists():
        raise RequestError(
            f"{path} has no metrics.jsonl: its training has not begun",
            where=str(file),
            fix="look again once the run has made a step",
        )
    steps = run.steps()
    if not steps:
        raise RequestError(
            f"{path} has not made a step yet", where=str(file), fix="look again once the run has made one"
        )
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in run.events():
        by_kind.setdefault(event.kind, []).append(event.row)
    about, model = _described(run)
    return Numerics(
        path=path,
        model=model,
        precision=about.precision,
        zero=about.zero,
        planned_steps=about.steps,
        steps=steps,
        evaluations=[(row.step, row.eval_loss) for row in run.evaluations()],
        repairs=[name for row in by_kind.get("repaired", []) for name in row["repairs"]],
        diverged="diverged" in by_kind,
        moves=_moves(steps, by_kind),
        gradients=_gradients(by_kind.get("numerics", [])),
    )


def _described(run: Run) -> tuple[Planned | Summary, str | None]:
    """Return what says how a run was planned, and its model's name; nothing for a folder with metrics.jsonl alone."""
    if run.planned is not None:
        return run.planned, run.planned.model.name
    summary = run.summary or Summary()
    return summary, summary.model


def to_dict(run: Numerics) -> dict[str, Any]:
    """Return every move and every reading as JSON-able dictionaries."""
    return {
        "run": str(run.path),
        "model": run.model,
        "precision": run.precision,
        "zero": run.zero,
        "steps": run.steps[-1].step,
        "planned_steps": run.planned_steps,
        "loss_scale_first": run.steps[0].loss_scale,
        "loss_scale_last": run.steps[-1].loss_scale,
        "skipped_steps": run.steps[-1].skipped_steps,
        "repairs": run.repairs,
        "diverged": run.diverged,
        "moves": [asdict(move) for move in run.moves],
        "gradients": None if run.gradients is None else asdict(run.gradients),
        "keep_fp32": [] if run.gradients is None else run.gradients.worth_fp32(),
    }


def _moves(steps: list[StepRecord], by_kind: dict[str, list[dict[str, Any]]]) -> list[Move]:
    overflows = {event["step"]: event for event in by_kind.get("overflow", [])}
    lost = {event["step"]: event for event in by_kind.get("loss_not_finite", [])}
    moves = []
    for row, following in zip(steps, [*steps[1:], None], strict=True):
        before, after = row.loss_scale, following and following.loss_scale
        moved = following is not None and before != after
        if not (row.overflow or row.loss is None or moved):
            continue
        overflow, not_finite = overflows.get(row.step), lost.get(row.step)
        why = [_overflow_text(overflow)] if row.overflow else []
        why += [_not_finite_text(not_finite)] if row.loss is None else []
        # A scale that shrinks without an overflow is nobody's rule; it is told, not explained.
        why = why or ["grown" if (after or 0) > (before or 0) else "lowered"]
        moves.append(
            Move(
                step=row.step,
                before=before,
                after=after,
                skipped=row.overflow,
                loss_finite=row.loss is not None,
                why="; ".join(why),
                overflow=overflow,
                loss_not_finite=not_finite,
            )
        )
    return moves


def _overflow_text(event: dict[str, Any] | None) -> str:
    if event is None or "first" not in event:
        return "overflow"
    if not event["first"]:
        repeated = event.get("repeated", True)
        return f"overflow {'in the sum over micro-steps or ranks' if repeated else 'that was not there a second time'}"
    return f"overflow in {event['first'][0]['parameter']} on rank {event['first'][0]['rank']}"


def _not_finite_text(event: dict[str, Any] | None) -> str:
    ranks = list(map(str, (event or {}).get("ranks") or []))
    text = "loss not finite"
    if ranks:
        more = f" and {len(ranks) - 4:,} more" if len(ranks) > 4 else ""
        text += f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:4])}{more}"
    first = (event or {}).get("first_activation")
    where = f" on rank {first['rank']}" if first and len(ranks) > 1 else ""
    return text + (f", first in {first['module']}{where}" if first else "")


def _gradients(events: list[dict[str, Any]]) -> Gradients | None:
    if not events:
        return None
    elements = {name: layer["elements"] for event in events for name, layer in event["layers"].items()}

    def matrix(field: str) -> Matrix:
        cells = [[event["layers"].get(name, {}) for event in events] for name in elements]
        return [[cell[field] if cell.get("grad_max") is not None else None for cell in row] for row in cells]

    return Gradients(
        steps=[event["step"] for event in events],
        scales=[event["scale"] for event in events],
        layers=list(elements),
        elements=list(elements.values()),
        grad_max=matrix("grad_max"),
        zero=matrix("zero"),
        underflow_unscaled=matrix("underflow_unscaled"),
        underflow_scaled=matrix("underflow_scaled"),
    )
