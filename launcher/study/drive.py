"""Run a study here, one cell after another; whatever has a result already is not run again."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import rundir
from launcher.errors import EXIT_STOPPED, HalfstepError, Interrupted
from launcher.files import write_json
from launcher.lease import lease
from launcher.study import folder as folders
from launcher.study import proof, state
from launcher.study.file import Study
from launcher.study.grid import Cell, order
from launcher.submit import argv, local

LOG = "launch.log"
"""In the run directory: what its launches printed."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a call of `run` did."""

    ran: int
    failed: int
    kept: int
    """Cells that had a result already."""
    code: int
    """0, or 75 / 130 where it was asked to stop."""


def run(
    study: Study,
    cells: Sequence[Cell],
    folder: Path,
    *,
    starter: str,
    retry: bool,
    gate: bool,
    say: Callable[[str], None],
) -> Done:
    """Run every cell that has no result; `retry` also those that failed. What fails is a result, and the others go on.

    Raises RequestError where another process runs this study.
    """
    folders.write(folder, study, cells)
    with lease(folder):
        listed = {cell["run"]: cell for cell in folders.read(folder)["cells"]}
        queued = state.queue(folder, list(listed.values()))

        def now(cell: Cell) -> state.State:
            return state.of(listed[f"runs/{cell.folder}"], folder, queued)

        todo = [cell for cell in order(cells, study.seeds) if cell.plan is not None and cell.refused is None]
        waiting = [cell for cell in todo if now(cell).open or (retry and now(cell).status == "failed")]
        if gate and waiting:
            proof.run([cell.plan for cell in waiting if cell.plan], say)
        failed = 0
        for number, cell in enumerate(waiting, 1):
            code, words = _one(cell, folders.run_of(folder, cell), starter, study.limit)
            told = now(cell)
            say(f"[{number}/{len(waiting)}] {cell.name} seed={cell.seed}: {told.status}, {words or told.reason}")
            if code in (EXIT_STOPPED, Interrupted.exit_code):
                return Done(ran=number - 1, failed=failed, kept=len(todo) - len(waiting), code=code)
            failed += told.status == "failed"
    return Done(ran=len(waiting), failed=failed, kept=len(todo) - len(waiting), code=0)


def _one(cell: Cell, path: Path, starter: str, limit: float) -> tuple[int, str]:
    """Run one cell and return its exit code and, where it is done, what is said of it."""
    plan = cell.plan
    assert plan is not None, "what could not be planned is not run"
    rundir.write_plan(path, cell.request, plan)
    if proof.tell(path, plan)["refused"]:
        return 0, ""
    started, load = time.time(), os.getloadavg()
    command = argv.STARTERS[starter](plan, path)
    try:
        code = local.start(command, path, plan.topology.ranks_per_node, log=path / LOG, limit=limit)
        cause = "" if code == 0 else _last_words(path / LOG)
    except HalfstepError as error:
        code, cause = error.exit_code, error.what
    seconds = time.time() - started
    about: dict[str, Any] = {"code": code, "cause": cause, "seconds": seconds, "started": started}
    write_json(path / state.OUTCOME, {**about, "load_before": load, "load_after": os.getloadavg(), "starter": starter})
    if code:
        return code, ""
    summary = state.read_json(path / "summary.json")
    return 0, ", ".join(_figures(summary)) + f" ({seconds:.0f} s)"


def _figures(summary: dict[str, Any]) -> list[str]:
    loss, speed = summary.get("eval_loss") or summary.get("loss"), summary.get("tokens_per_second")
    found = [] if loss is None else [f"loss {loss:.4f}"]
    return found if speed is None else [*found, f"{speed:,.0f} tok/s"]


def _last_words(log: Path) -> str:
    """Return the first line of the last error that a launch printed, for a launch that wrote no cause."""
    try:
        lines = log.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:300]


def as_json(done: Done, folder: Path) -> str:
    """Return what was done as JSON."""
    return json.dumps({"folder": str(folder), **vars(done)}, indent=2)
