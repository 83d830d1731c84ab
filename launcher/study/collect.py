"""What a study's run directories say: one result for each run, and nothing from anywhere else."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.plan.plan import Plan
from launcher.plan.resolve import run_id_of
from launcher.study import state
from launcher.submit.slurm import Queued

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
    environment: dict[str, Any] = field(default_factory=dict)
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
    told = state.of(cell, folder, queued)
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
    except _Damaged as error:
        about |= {"status": "failed", "reason": f"damaged: {error}"}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # Somebody has edited a file by hand: what cannot be read is no result, and is said.
        about |= {
            "status": "failed",
            "reason": f"damaged: its records cannot be read ({type(error).__name__}: {error})",
        }
    return Result(**about)


class _Damaged(Exception):
    """A run directory contradicts itself."""


def _read(run: Path, *, done: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    proof, plan = state.read_json(run / "proof.json"), state.read_json(run / "plan.json")
    if proof:
        proved = proof.get("proved")
        found |= {
            "proved": proved if isinstance(proved, bool) else None,
            "unproved_because": str(proof.get("reason", "")),
        }
    environment = _environment(run)
    if plan:
        found |= _planned(plan)
    measured = _measured(run, environment, done=done)
    if done and plan and len(measured["curve"].steps) != plan["steps"]:
        raise _Damaged(f"metrics.jsonl has {len(measured['curve'].steps)} of its {plan['steps']} steps")
    if done and plan and plan["data"]["validation_prefix"] and measured.get("eval_loss") is None:
        raise _Damaged("metrics.jsonl has no loss of an evaluation at its end")
    return {**found, "environment": environment, **measured}


def _planned(tree: dict[str, Any]) -> dict[str, Any]:
    """Return what a plan says, if it is the one that the run was started with."""
    plan = Plan.from_dict(tree)
    if run_id_of(plan) != plan.run_id:
        raise _Damaged("plan.json was changed: it is not the plan of this run")
    memory, time = tree["memory"], tree.get("time") or {}
    return {
        "plan": tree,
        "zero": plan.zero,
        "precision": plan.precision,
        "devices": plan.topology.world_size,
        "predicted_memory_bytes": state.whole(memory.get("predicted_peak_bytes")),
        "predicted_step_seconds": state.number(time.get("step_seconds")),
    }


def _cell_of(words: Sequence[str]) -> dict[str, Any]:
    given = dict(word.split("=", 1) for word in words)
    zero = given.get("zero", "1")
    return {"zero": int(zero) if zero.isdigit() else None, "precision": given.get("precision", "bf16")}


def _environment(run: Path) -> dict[str, Any]:
    attempts = sorted(one for one in (run / "attempts").glob("[0-9]*") if one.is_dir())
    found = state.read_json(attempts[-1] / "env.json") if attempts else {}
    return {**found, "versions": found["versions"] if isinstance(found.get("versions"), dict) else {}} if found else {}


def _measured(run: Path, environment: dict[str, Any], *, done: bool) -> dict[str, Any]:
    """Return what metrics.jsonl, events.jsonl and summary.json have of a run."""
    summary, seconds, evaluation = state.read_json(run / "summary.json"), [], None
    curve = Curve()
    for row in _rows(run / "metrics.jsonl"):
        if "eval_loss" in row:
            evaluation = row
            continue
        curve.steps.append(int(row["step"]))
        curve.loss.append(state.number(row["loss"]))
        curve.loss_scale.append(state.number(row["loss_scale"]))
        seconds.append(float(row["step_seconds"]))
        if row["overflow"]:
            curve.skipped.append(int(row["step"]))
    found: dict[str, Any] = {"curve": curve, **_events(run / "events.jsonl")}
    last = [one for one in curve.loss[-max(1, round(_LAST * len(curve.loss))) :] if one is not None]
    found["loss"] = statistics.fmean(last) if last else None
    found |= _spread(seconds[WARM_UP:] or seconds)
    for key in ("tokens_per_second", "mfu", "loss_scale", "wall_seconds"):
        found[key] = state.number(summary.get(key))
    for key in ("peak_memory_bytes", "skipped_steps", "tokens"):
        found[key] = state.whole(summary.get(key))
    if done and evaluation is not None and evaluation["step"] == (curve.steps or [0])[-1]:
        found |= {key: state.number(evaluation[key]) for key in ("eval_loss", "perplexity")}
    loads = [one["load_average"][0] for one in (environment, summary) if one.get("load_average")]
    found["load"] = state.number(statistics.fmean(loads)) if loads else None
    return found


def _spread(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return dict.fromkeys(("step_seconds", "step_seconds_low", "step_seconds_high"), seconds[0]) if seconds else {}
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"step_seconds": middle, "step_seconds_low": low, "step_seconds_high": high}


def _events(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"checksum": None, "has_gradients": False}
    for row in _rows(file):
        if row.get("event") == "initialised":
            checksum = row.get("checksum")
            found["checksum"] = checksum if isinstance(checksum, str) else None
        found["has_gradients"] |= row.get("event") == "numerics"
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that stand; a torn last line is of a run that is going, or was killed."""
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
