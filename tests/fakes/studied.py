"""Finished runs of a study, written by hand: the files that a real run leaves, with chosen numbers in them."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfstep.launcher.plan import facts
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.study import grid, study_file, study_folder
from halfstep.launcher.topology import Topology

WORLD = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")


def cells_of(study: study_file.Study) -> list[grid.Cell]:
    """Plan a study's cells for two CPU ranks."""
    return grid.cells(study, lambda request: resolve(request, WORLD, facts.read(request.spec)))


def started(where: Path, file: Path, arguments: Sequence[str] = ()) -> tuple[study_file.Study, list[grid.Cell]]:
    """Make a study's folder in which nothing has run."""
    study = study_file.read(str(file), arguments)
    cells = cells_of(study)
    study_folder.write(where, study, cells)
    return study, cells


def finish(
    where: Path,
    cell: grid.Cell,
    loss: float,
    *,
    speed: float = 1000.0,
    memory: float = 1e9,
    proved: bool | None = True,
    steps: int | None = None,
    checksum: str = "aa",
    tasks: dict[str, dict[str, float | None]] | None = None,
    tasks_before: dict[str, dict[str, float | None]] | None = None,
    curve: Callable[[int], float] = lambda step: 2.0 * math.exp(-step / 8),
) -> Path:
    """Write what a finished run leaves: losses fall to `loss`, which is the validation loss as well."""
    run = study_folder.run_of(where, cell)
    assert cell.plan is not None
    steps = cell.plan.steps if steps is None else steps
    run_directory.write_plan(run, cell.request, cell.plan)
    scale = 65536.0 if cell.plan.precision == "fp16" else None
    rows = [
        {"step": step, "tokens": step * 64, "loss": loss + curve(step), "lr": 1e-3, "grad_norm": 1.0,
         "loss_scale": scale, "overflow": False, "skipped_steps": 0, "step_seconds": 64 / speed, "data_seconds": 0.0,
         "tokens_per_second": speed, "mfu": None, "peak_memory_bytes": int(memory), "time": 1e9 + step}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    evaluation: dict[str, Any] = {"step": steps, "eval_loss": loss, "perplexity": math.exp(loss), "time": 1e9 + steps}
    if tasks is not None:
        evaluation["tasks"] = tasks
    if tasks_before is not None:
        rows.insert(0, {**evaluation, "step": 0, "tasks": tasks_before})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, evaluation]))
    summary = {"status": "done", "run_id": cell.plan.run_id, "tokens_per_second": speed, "mfu": None,
               "peak_memory_bytes": int(memory), "skipped_steps": 0, "loss_scale": scale, "wall_seconds": 30.0,
               "tokens": steps * 64, "load_average": [1.0, 1.0, 1.0]}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "events.jsonl").write_text(json.dumps({"event": "initialised", "checksum": checksum, "time": 1e9}) + "\n")
    attempt = run / "attempts" / "0001"
    attempt.mkdir(parents=True, exist_ok=True)
    about = {"host": "n1", "cpu": "a processor", "versions": {"torch": "2.13.0"}, "load_average": [1.0, 1.0, 1.0]}
    (attempt / "env.json").write_text(json.dumps({**about, "code_revision": "abc"}))
    (attempt / "exit.json").write_text(json.dumps({"code": 0, "cause": "done", "kind": "done", "rank": 0, "time": 1e9}))
    (run / "proof.json").write_text(json.dumps({"proved": proved, "reason": "" if proved else "its repairs are off"}))
    return run


def fail(where: Path, cell: grid.Cell, code: int, cause: str) -> Path:
    """Write what a failed run leaves."""
    run = finish(where, cell, 5.0)
    (run / "summary.json").unlink()
    (run / "attempts" / "0001" / "exit.json").write_text(
        json.dumps({"code": code, "cause": cause, "rank": 0, "time": 1e9})
    )
    return run
