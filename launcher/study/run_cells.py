"""Run a study here, one cell after another; whatever has a result already is not run again."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import EXIT_STOPPED, HalfstepError, Interrupted
from halfstep.launcher.rundir import layout, run_directory
from halfstep.launcher.rundir.exits import kind_of_code, kind_of_error, read_exit
from halfstep.launcher.rundir.lease import lease, reserved
from halfstep.launcher.rundir.records import Damaged
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.study import proof, run_status
from halfstep.launcher.study import study_folder as folders
from halfstep.launcher.study.grid import Cell, order
from halfstep.launcher.study.study_file import Study
from halfstep.launcher.submit import argv, local
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import cannot_write, open_append, write_json

LOG = "launch.log"
"""In the run directory: what its launches printed."""
_TAIL = 1 << 20
"""Bytes of that which are searched for a cause."""


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
    with lease(folder):
        folders.write(folder, study, cells)
        listed = {cell["run"]: cell for cell in folders.read(folder)["cells"]}
        queued = run_status.queue(folder, list(listed.values()))

        def now(cell: Cell) -> run_status.State:
            return run_status.of(listed[f"runs/{cell.folder}"], folder, queued)

        allowed = [cell for cell in order(cells, study.seeds) if cell.plan is not None and cell.refused is None]
        before = {cell.folder: now(cell) for cell in allowed}
        waiting = [cell for cell in allowed if before[cell.folder].to_do(retry=retry, gate=gate)]
        verdicts = _prove(allowed, waiting, folder, say) if gate else []
        counts = {"done": 0, "failed": 0, "refused": 0}
        for number, cell in enumerate(waiting, 1):
            code, outcome = _run_cell(cell, folders.run_of(folder, cell), starter, study.limit, verdicts)
            state = now(cell)
            stopped = code in (EXIT_STOPPED, Interrupted.exit_code)
            # What a launcher prints last of a stop is its own; the run wrote down after which step it was.
            figures = state.reason if stopped else outcome or state.reason
            say(f"[{number}/{len(waiting)}] {cell.name} seed={cell.seed}: {state.status}, {figures}")
            if stopped:
                break
            counts[state.status] = counts.get(state.status, 0) + 1
        else:
            code = 0
        kept = sum(state.status in ("done", "failed") for state in before.values()) - sum(
            before[cell.folder].status == "failed" for cell in waiting
        )
    return Done(ran=counts["done"] + counts["failed"], failed=counts["failed"], kept=kept, code=code)


def _prove(
    allowed: Sequence[Cell], waiting: Sequence[Cell], folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the gate for what waits, and for what ran without it on this hardware and is told now."""
    late = [
        cell
        for cell in allowed
        if cell not in waiting and cell.plan and proof.can_be_told_again(folders.run_of(folder, cell), cell.plan)
    ]
    verdicts = proof.run([cell.plan for cell in (*waiting, *late) if cell.plan], say)
    for cell in late:
        if cell.plan is not None:
            proof.tell(folders.run_of(folder, cell), cell.plan, verdicts)
    return verdicts


def _run_cell(
    cell: Cell, path: Path, starter: str, limit: float, verdicts: Sequence[dict[str, Any]]
) -> tuple[int, str]:
    """Run one cell and return its exit code and, where it is done, what is said of it."""
    plan = cell.plan
    assert plan is not None, "what could not be planned is not run"
    started, load, before = time.time(), os.getloadavg(), set(layout.attempts(path))
    launch = uuid.uuid4().hex
    try:
        with reserved(path, launch):
            run_directory.write_plan(path, cell.request, plan)
            if proof.tell(path, plan, verdicts)["refused"]:
                return 0, ""
            with cannot_write(path):
                (path / run_status.OUTCOME).unlink(missing_ok=True)
                os.close(open_append(path / LOG))
            command, ranks = argv.STARTERS[starter](plan, path), plan.topology.ranks_per_node
            code = local.start(command, path, ranks, launch=launch, log=path / LOG, limit=limit)
        cause, kind = "" if code == 0 else _last_words(path / LOG), kind_of_code(code)
    except HalfstepError as error:  # of this run; the others are none the worse for it
        code, cause, kind = error.exit_code, error.what, kind_of_error(error)
    ended = time.time()
    about: dict[str, Any] = {"code": code, "cause": cause, "kind": kind, "seconds": ended - started, "started": started}
    about |= {"load_before": load, "load_after": os.getloadavg(), "starter": starter}
    # Whoever was there wrote the cause before this, and knows it better.
    about["time"] = started if _has_ended(path, before) else ended
    with cannot_write(path):
        write_json(path / run_status.OUTCOME, about)
    if code:
        return code, cause
    return 0, ", ".join(_figures(path)) + f" ({ended - started:.0f} s)"


def _has_ended(path: Path, before: set[Path]) -> bool:
    """Tell whether an attempt that was not there before wrote how it ended."""
    return any(read_exit(attempt) is not None for attempt in set(layout.attempts(path)) - before)


def _figures(path: Path) -> list[str]:
    try:
        summary = Run(path).summary
    except Damaged as error:
        return [error.what]
    if summary is None:
        return []
    loss, speed = summary.loss if summary.eval_loss is None else summary.eval_loss, summary.tokens_per_second
    figures = [] if loss is None else [f"loss {loss:.4f}"]
    return figures if speed is None else [*figures, f"{speed:,.0f} tok/s"]


def _last_words(log: Path) -> str:
    """Return the first line of the last error that a launch printed, for a launch that wrote no cause."""
    try:
        with foreign.open_regular(log) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read(_TAIL).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:300]


def to_dict(done: Done, folder: Path) -> dict[str, Any]:
    """Return what was done as JSON has it."""
    return {"folder": str(folder), **vars(done)}
