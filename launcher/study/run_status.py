"""How far one run of a study is: queued, running, done, or failed and why."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import (
    EXIT_NUMERICS,
    EXIT_REFUSED,
    EXIT_REQUEST,
    EXIT_STALLED,
    EXIT_STOPPED,
    Interrupted,
    RefusedError,
)
from halfstep.launcher.rundir import lease, progress, records
from halfstep.launcher.submit import jobs, slurm
from halfstep.launcher.submit.local import TIMED_OUT
from halfstep.launcher.submit.slurm import Queued

OUTCOME = "outcome.json"
"""In the run directory: how a launch ended that the study started itself."""
_MEMORY = ("the host is out of memory", "out of device memory", "out of host memory")


@dataclass(frozen=True, kw_only=True)
class State:
    """One run, now."""

    status: str
    """`refused`, `missing`, `queued`, `running`, `stopped` (to be gone on with), `done` or `failed`."""
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    by_proof: bool = False
    """Whether the parity gate is what refused it: asked again, it may say something else."""

    def to_do(self, *, retry: bool, gate: bool) -> bool:
        """Tell whether there is something to run: also what failed, for `retry`, and what only the gate refused."""
        again = (retry and self.status == "failed") or (gate and self.by_proof)
        return again or self.status in ("missing", "stopped")


def of(cell: dict[str, Any], folder: Path, queued: Sequence[Queued] = ()) -> State:
    """Return the state of a cell of study.json; a run whose records cannot be believed has failed, and says which."""
    run = None if cell["run"] is None else folder / cell["run"]
    if cell["refused"] is not None or run is None:
        return State(status="refused", reason=cell["refused"] or "it could not be planned")
    try:
        return _of(run, queued)
    except records.Damaged as error:
        return State(status="failed", reason=f"damaged: {error}")


def _of(run: Path, queued: Sequence[Queued]) -> State:
    proof = records.read(run / "proof.json", records.Proof)
    if proof is not None and proof.refused:
        return State(status="refused", reason=proof.refused, by_proof=True)
    last, plan = records.reached(run / "metrics.jsonl"), records.read(run / "plan.json", records.PlannedSteps)
    summary = records.read(run / "summary.json", records.Summary)
    seen: dict[str, Any] = {
        "step": last and last.step,
        "steps": plan and plan.steps,
        "loss": last and last.loss,
    }
    if summary is not None and summary.status == "done":
        return State(status="done", **seen)
    living = jobs.alive(run, queued) if queued else []
    if living and living[0].waits:
        return State(status="queued", reason=living[0].reason, **seen)
    if living or lease.holder(run) is not None:
        return State(status="running", reason=living[0].reason if living else "", **seen)
    return _ended(run, seen)


def _ended(run: Path, seen: dict[str, Any]) -> State:
    """Return how a run ended by what was written last: by a rank, by a start that was refused, or by the study."""
    starts = progress.attempts(run)
    files = [*(one / "exit.json" for one in starts[-1:]), run / "refused.json", run / OUTCOME]
    written = [end for file in files if (end := records.read(file, records.Outcome)) is not None]
    ends = [end for end in written if end.code]
    if not ends:
        why = "summary.json is missing" if written else "nobody wrote how it ended" if starts else ""
        return State(status="stopped" if starts else "missing", reason=why, **seen)
    last = max(ends, key=lambda end: end.time)
    code, cause = last.code, " ".join(last.cause.split())
    if code in (EXIT_STOPPED, Interrupted.exit_code):
        return State(status="stopped", reason=cause, **seen)
    return State(status="failed", reason=f"{kind(code, cause)}: {cause}" if cause else kind(code, cause), **seen)


def kind(code: int, cause: str) -> str:
    """Return in a word or three why a run failed."""
    if any(word in cause for word in _MEMORY):
        return "out of memory"
    known = {EXIT_NUMERICS: "diverged", EXIT_STALLED: "stalled", TIMED_OUT: "timed out", EXIT_REFUSED: "refused"}
    known[EXIT_REQUEST] = "request"
    return known.get(code, f"crashed ({code})")


def queue(folder: Path, cells: Sequence[dict[str, Any]]) -> Sequence[Queued]:
    """Return this user's SLURM jobs, if any of these cells was ever sent to SLURM from here."""
    sent = any(cell["run"] is not None and (folder / cell["run"] / "jobs.jsonl").exists() for cell in cells)
    if not sent or shutil.which("squeue") is None:
        return ()
    try:
        return slurm.queue()
    except RefusedError:  # no controller answers: what the run directories say is still true
        return ()
