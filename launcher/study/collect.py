"""What a study's run directories say: one result for each run, and nothing from anywhere else."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.metrics.record import EvaluationRecord, StepRecord, of_row
from halfstep.launcher.plan.plan import Plan, run_id_of
from halfstep.launcher.rundir import progress, records
from halfstep.launcher.rundir.records import Damaged
from halfstep.launcher.study import run_status
from halfstep.launcher.submit.slurm import Queued
from halfstep.launcher.system import foreign

WARM_UP = 5
"""Steps at a start that do not count for timing, as in summary.json."""
_LAST = 0.1
"""Share of the steps that the final training loss is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run's optimizer steps, as lists of the same length."""

    steps: list[int] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    loss_scale: list[float | None] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    """The steps that were."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of a study."""

    values: dict[str, str]
    """By axis, the value's label."""
    seed: int
    words: tuple[str, ...]
    run: Path | None
    status: str
    reason: str
    proved: bool | None
    """Whether the parity gate holds for its cell where it ran; None where that was not tried."""
    unproved_because: str
    zero: int | None
    precision: str | None
    loss: float | None = None
    """Mean over the last tenth of the steps, nats per token."""
    eval_loss: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    """Median, without the warm-up."""
    mfu: float | None = None
    step_seconds: float | None = None
    """Median, without the warm-up."""
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    """Quartiles."""
    peak_memory_bytes: int | None = None
    predicted_memory_bytes: int | None = None
    predicted_step_seconds: float | None = None
    skipped_steps: int | None = None
    loss_scale: float | None = None
    wall_seconds: float | None = None
    devices: int | None = None
    tokens: int | None = None
    load: float | None = None
    """Mean number of processes that wanted a core, at the start and at the end of the run."""
    checksum: str | None = None
    """Of the initial masters."""
    curve: Curve = field(default_factory=Curve)
    plan: dict[str, Any] = field(default_factory=dict)
    environment: records.Environment | None = None
    has_gradients: bool = False
    """Whether it has written down what fp16 loses of each layer."""

    @property
    def name(self) -> str:
        """Return how its cell is called."""
        return name_of(self.values)

    @property
    def done(self) -> bool:
        """Whether it ran to its end."""
        return self.status == "done"

    @property
    def quality(self) -> float | None:
        """Return the loss by which runs are compared: on held-out text where there is some."""
        return self.loss if self.eval_loss is None else self.eval_loss


def name_of(values: dict[str, str]) -> str:
    """Return how a cell is called."""
    return " ".join(f"{axis.removesuffix('.name')}={value}" for axis, value in values.items())


def results(study: dict[str, Any], folder: Path, queued: Sequence[Queued] = ()) -> list[Result]:
    """Return a result for every cell of study.json."""
    return [_result(cell, folder, queued) for cell in study["cells"]]


def _result(cell: dict[str, Any], folder: Path, queued: Sequence[Queued]) -> Result:
    told = run_status.of(cell, folder, queued)
    run = None if cell["run"] is None else folder / cell["run"]
    about: dict[str, Any] = {
        "values": cell["values"],
        "seed": cell["seed"],
        "words": tuple(cell["words"]),
        "run": run,
        "status": told.status,
        "reason": told.reason,
        "proved": None,
        "unproved_because": "it was not run",
        **_cell_of(cell["words"]),
    }
    if run is None:
        return Result(**about)
    try:
        about |= _read(run, done=told.status == "done")
    except Damaged as error:
        about |= {"status": "failed", "reason": f"damaged: {error}"}
    return Result(**about)


def _read(run: Path, *, done: bool) -> dict[str, Any]:
    """Return what a run directory says; raises Damaged where it contradicts itself, or could not be ours."""
    found: dict[str, Any] = {}
    proof = records.read(run / "proof.json", records.Proof)
    if proof is not None:
        found |= {"proved": proof.proved, "unproved_because": proof.reason}
    environment, plan = _environment(run), _plan(run)
    measured = _measured(run, environment, done=done)
    if plan is None:
        return {**found, "environment": environment, **measured}
    steps: list[int] = measured["curve"].steps
    if done and len(steps) != plan.steps:
        raise Damaged(f"metrics.jsonl has {len(steps)} of its {plan.steps} steps")
    if done and any(step != place for place, step in enumerate(steps, 1)):
        raise Damaged("metrics.jsonl has its steps in another order than they were made")
    if done and plan.data.validation_prefix and measured.get("eval_loss") is None:
        raise Damaged("metrics.jsonl has no loss of an evaluation at its end")
    return {**found, **_planned(run, plan), "environment": environment, **measured}


def _plan(run: Path) -> Plan | None:
    """Return the plan that the run was started with; raises Damaged where it is another."""
    if records.read(run / "plan.json", records.Planned) is None:
        return None
    try:
        tree = foreign.read_object(run / "plan.json")
        plan = Plan.from_dict(tree)
        same = run_id_of(tree) == plan.run_id
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"plan.json: {type(error).__name__}: {error}") from None
    if not same:
        raise Damaged("plan.json was changed: it is not the plan of this run")
    return plan


def _planned(run: Path, plan: Plan) -> dict[str, Any]:
    shown = records.read(run / "plan.json", records.Planned)
    return {
        "plan": plan.to_dict(),
        "zero": plan.zero,
        "precision": plan.precision,
        "devices": plan.topology.world_size,
        "predicted_memory_bytes": shown.memory.predicted_peak_bytes if shown and shown.memory else None,
        "predicted_step_seconds": shown.time.step_seconds if shown and shown.time else None,
    }


def _cell_of(words: Sequence[str]) -> dict[str, Any]:
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    zero = given.get("zero", "1")
    return {"zero": int(zero) if zero in ("0", "1", "2", "3") else None, "precision": given.get("precision", "bf16")}


def _environment(run: Path) -> records.Environment | None:
    starts = progress.attempts(run)
    return records.read(starts[-1] / "env.json", records.Environment) if starts else None


def _measured(run: Path, environment: records.Environment | None, *, done: bool) -> dict[str, Any]:
    """Return what metrics.jsonl, events.jsonl and summary.json have of a run."""
    summary = records.read(run / "summary.json", records.Summary) or records.Summary()
    curve, seconds, evaluation = Curve(), [], None
    for row in _rows(run / "metrics.jsonl"):
        if isinstance(row, EvaluationRecord):
            evaluation = row
            continue
        curve.steps.append(row.step)
        curve.loss.append(row.loss)
        curve.loss_scale.append(row.loss_scale)
        seconds.append(row.step_seconds)
        if row.overflow:
            curve.skipped.append(row.step)
    found: dict[str, Any] = {"curve": curve, **_events(run / "events.jsonl")}
    last = [one for one in curve.loss[-max(1, round(_LAST * len(curve.loss))) :] if one is not None]
    found["loss"] = statistics.fmean(last) if last else None
    found |= _spread(seconds[WARM_UP:] or seconds)
    for key in ("tokens_per_second", "mfu", "loss_scale", "wall_seconds"):
        found[key] = getattr(summary, key)
    for key in ("peak_memory_bytes", "skipped_steps", "tokens"):
        found[key] = getattr(summary, key)
    if done and evaluation is not None and evaluation.step == (curve.steps or [0])[-1]:
        found |= {"eval_loss": evaluation.eval_loss, "perplexity": evaluation.perplexity}
    loads = [one.load_average[0] for one in (environment, summary) if one and one.load_average]
    found["load"] = statistics.fmean(loads) if loads else None
    return found


def _spread(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return dict.fromkeys(("step_seconds", "step_seconds_low", "step_seconds_high"), seconds[0]) if seconds else {}
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"step_seconds": middle, "step_seconds_low": low, "step_seconds_high": high}


def _events(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"checksum": None, "has_gradients": False}
    for row in foreign.objects(file):
        if row.get("event") == "initialised":
            checksum = row.get("checksum")
            if not isinstance(checksum, str | None):
                raise Damaged(f"events.jsonl: checksum = {checksum!r} is no text")
            found["checksum"] = checksum
        found["has_gradients"] |= row.get("event") == "numerics"
    return found


def _rows(file: Path) -> Iterator[StepRecord | EvaluationRecord]:
    """Yield the rows that stand; a torn last line is of a run that is going, or was killed."""
    for row in foreign.objects(file):
        try:
            yield of_row(row)
        except ValueError as error:
            raise Damaged(f"{file.name}: {error}") from None
