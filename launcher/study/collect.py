"""What a study's run directories say: one result for each run, and nothing from anywhere else."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import records
from halfstep.launcher.rundir.metric_rows import EvaluationRecord
from halfstep.launcher.rundir.records import Damaged, damaged
from halfstep.launcher.rundir.run_reader import Run, rows
from halfstep.launcher.study import run_status
from halfstep.launcher.submit.slurm import Queued

WARM_UP = 5
"""Steps at a start that do not count for timing, as in summary.json."""
_LAST = 0.1
"""Share of the steps that the final training loss is the mean of."""
_OF_SUMMARY = (
    "tokens_per_second",
    "mfu",
    "loss_scale",
    "wall_seconds",
    "peak_memory_bytes",
    "skipped_steps",
    "tokens",
)


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
    arguments: tuple[str, ...]
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
    tasks: dict[str, float | None] = field(default_factory=dict)
    """What the last evaluation's tasks came to, by `task.metric`."""
    tasks_before: dict[str, float | None] = field(default_factory=dict)
    """The same before the first step: what the model could do that was fine-tuned."""
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
    state = run_status.of(cell, folder, queued)
    path = None if cell["run"] is None else folder / cell["run"]
    about: dict[str, Any] = {
        "values": cell["values"],
        "seed": cell["seed"],
        "arguments": tuple(cell["words"]),
        "run": path,
        "status": state.status,
        "reason": state.reason,
        "proved": None,
        "unproved_because": "it was not run",
        **_cell_of(cell["words"]),
    }
    if path is None:
        return Result(**about)
    try:
        about |= _read(Run(path), done=state.status == "done")
    except Damaged as error:
        about |= {"status": "failed", "reason": error.what}
    return Result(**about)


def _read(run: Run, *, done: bool) -> dict[str, Any]:
    """Return what a run directory says; raises Damaged where it contradicts itself, or could not be ours."""
    about: dict[str, Any] = {"environment": run.attempts[-1].environment if run.attempts else None}
    if run.proof is not None:
        about |= {"proved": run.proof.proved, "unproved_because": run.proof.reason}
    elif run.summary is not None:
        unknown = "the parity gate was not asked"
        about |= {"proved": run.summary.proved, "unproved_because": run.summary.unproved_because or unknown}
    about |= _measured(run, about["environment"], done=done)
    if run.planned is None:
        return about
    steps: list[int] = about["curve"].steps
    metrics = run.path / "metrics.jsonl"
    if done and len(steps) != run.plan.steps:
        raise damaged(metrics, f"it has {len(steps)} of its {run.plan.steps} steps")
    if done and any(step != place for place, step in enumerate(steps, 1)):
        raise damaged(metrics, "it has its steps in another order than they were made")
    if done and run.plan.data.validation_windows and about.get("eval_loss") is None:
        raise damaged(metrics, "it has no loss of an evaluation at its end")
    return {**about, **_planned(run.plan, run.planned)}


def _planned(plan: Plan, shown: records.Planned) -> dict[str, Any]:
    return {
        "plan": plan.to_dict(),
        "zero": plan.zero,
        "precision": plan.precision,
        "devices": plan.topology.world_size,
        "predicted_memory_bytes": shown.memory.predicted_peak_bytes if shown.memory else None,
        "predicted_step_seconds": shown.time.step_seconds if shown.time else None,
    }


def _cell_of(arguments: Sequence[str]) -> dict[str, Any]:
    given = {key: value for key, _, value in (word.partition("=") for word in arguments)}
    zero = given.get("zero", "1")
    return {"zero": int(zero) if zero in ("0", "1", "2", "3") else None, "precision": given.get("precision", "bf16")}


def _measured(run: Run, environment: records.Environment | None, *, done: bool) -> dict[str, Any]:
    """Return what metrics.jsonl, events.jsonl and summary.json have of a run."""
    steps, summary = run.steps(), run.summary or records.Summary()
    curve = Curve(
        steps=[row.step for row in steps],
        loss=[row.loss for row in steps],
        loss_scale=[row.loss_scale for row in steps],
        skipped=[row.step for row in steps if row.overflow],
    )
    last = [loss for loss in curve.loss[-max(1, round(_LAST * len(curve.loss))) :] if loss is not None]
    seconds = [row.step_seconds for row in steps]
    loads = [record.load_average[0] for record in (environment, summary) if record and record.load_average]
    return {
        "curve": curve,
        **_events(run.path / "events.jsonl"),
        "loss": statistics.fmean(last) if last else None,
        **_spread(seconds[WARM_UP:] or seconds),
        **{key: getattr(summary, key) for key in _OF_SUMMARY},
        **(_last_evaluation(run) if done else {}),
        "tasks_before": next((_tasks(row) for row in run.evaluations() if row.step == 0), {}),
        "load": statistics.fmean(loads) if loads else None,
    }


def _last_evaluation(run: Run) -> dict[str, Any]:
    """Return the loss of the evaluation after the last step; nothing where there is none."""
    last = (run.steps() or [None])[-1]
    evaluation = (run.evaluations() or [None])[-1]
    if evaluation is None or evaluation.step != (last.step if last else 0):
        return {}
    return {"eval_loss": evaluation.eval_loss, "perplexity": evaluation.perplexity, "tasks": _tasks(evaluation)}


def _tasks(evaluation: EvaluationRecord) -> dict[str, float | None]:
    judged = (evaluation.tasks or {}).items()
    return {f"{task}.{metric}": value for task, metrics in judged for metric, value in metrics.items()}


def _spread(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return dict.fromkeys(("step_seconds", "step_seconds_low", "step_seconds_high"), seconds[0]) if seconds else {}
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"step_seconds": middle, "step_seconds_low": low, "step_seconds_high": high}


def _events(file: Path) -> dict[str, Any]:
    """Return what the events of all attempts say: only the first has initialised the weights."""
    checksum, has_gradients = None, False
    for row in rows(file):
        if row.get("event") == "initialised":
            checksum = row.get("checksum")
            if not isinstance(checksum, str | None):
                raise damaged(file, f"checksum = {checksum!r} is no text")
        has_gradients |= row.get("event") == "numerics"
    return {"checksum": checksum, "has_gradients": has_gradients}
