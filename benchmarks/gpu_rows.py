"""What benchmarks/gpu.py writes down of one process: the row of a run, of a peer, of a cell."""

import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks import gpu_report
from benchmarks.gpu_cases import Case
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.run_reader import Run


def of_run(path: Path, case: Case, began: float) -> dict[str, Any]:
    """Return what a run directory says of a timed run; a step lasts from one record to the next."""
    run = Run(path)
    try:
        plan, steps = run.plan, run.steps()
    except HalfstepError as error:
        return {"outcome": None, "detail": error.what}
    row: dict[str, Any] = {
        "outcome": None if run.finished is None else "done",
        "run_id": plan.run_id,
        "compile": plan.compile,
        **_predicted(plan),
        "predicted_step_seconds": (plan.time or {}).get("step_seconds"),
    }
    if run.exit is not None and run.finished is None:
        row["outcome"] = run.exit.what
    if not steps:
        return row
    moments = [step.time for step in steps]
    lasted = [after - before for before, after in itertools.pairwise(moments)]
    return {
        **row,
        **gpu_report.speed(lasted[case.warmup - 1 :], case.micro * case.sequence, _flops(plan), plan.peak_flops),
        "peak_bytes": max(step.peak_memory_bytes for step in steps),
        "seconds_to_first_step": round(moments[0] - began, 2),
        "first_loss": steps[0].loss,
        "last_loss": steps[-1].loss,
    }


def of_peer(result: Path, case: Case, plan: Plan, began: float) -> dict[str, Any]:
    """Return what a peer wrote of its steps; Halfstep's count of FLOPs is taken for all alike."""
    try:
        seen = json.loads(result.read_text())
    except (OSError, ValueError):
        return {"outcome": None}
    if seen["outcome"] != "done":
        return seen
    timed = seen["step_seconds"][case.warmup :]
    return {
        "outcome": "done",
        **gpu_report.speed(timed, case.micro * case.sequence, _flops(plan), plan.peak_flops),
        "peak_bytes": seen["peak_reserved_bytes"],
        "seconds_to_first_step": round(seen["first_step_at"] - began, 2),
        "first_loss": seen["losses"][0],
        "last_loss": seen["losses"][-1],
    }


def of_cell(path: Path) -> dict[str, Any]:
    """Return the losses of a cell's run and its memory beside the plan's."""
    try:
        plan, steps = Run(path).plan, Run(path).steps()
    except HalfstepError as error:
        return {"outcome": error.what}
    return {
        "outcome": "done" if Run(path).finished else "not done",
        "losses": [step.loss for step in steps],
        "peak_bytes": max((step.peak_memory_bytes for step in steps), default=None),
        **_predicted(plan),
    }


def _predicted(plan: Plan) -> dict[str, Any]:
    return {f"predicted_{name}_bytes": plan.memory[f"predicted_{name}_bytes"] for name in ("peak", "low", "high")}


def _flops(plan: Plan) -> float:
    assert plan.model.flops_per_token is not None, "the benchmark's models are families whose arithmetic is known"
    return plan.model.flops_per_token


def last_lines(log: Path, count: int = 3) -> str:
    """Return how a process ended, as far as its log says."""
    try:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " / ".join(line.strip()[:200] for line in lines[-count:])
