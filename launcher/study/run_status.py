"""How far one run of a study is: queued, running, done, or failed and why."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RefusedError
from halfstep.launcher.rundir import lease
from halfstep.launcher.rundir.exits import REFUSAL, Kind
from halfstep.launcher.rundir.records import Damaged
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.submit import jobs, slurm
from halfstep.launcher.submit.slurm import Queued

OUTCOME = "outcome.json"
"""In the run directory: how a launch ended that the study started itself."""
_FAILURES = {
    Kind.OUT_OF_DEVICE_MEMORY: "out of memory",
    Kind.OUT_OF_HOST_MEMORY: "out of memory",
    Kind.DISK_FULL: "disk full",
    Kind.NUMERICS: "diverged",
    Kind.STALL: "stalled",
    Kind.TIMED_OUT: "timed out",
    Kind.REFUSED: "refused",
    Kind.REQUEST: "request",
}
"""What a report calls them; the others have crashed."""


@dataclass(frozen=True, kw_only=True)
class State:
    """One run, now."""

    status: str
    """`refused`, `missing`, `queued`, `running`, `stopped` (to be resumed), `done` or `failed`."""
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
        return _of(Run(run), queued)
    except Damaged as error:
        return State(status="failed", reason=error.what)


def _of(run: Run, queued: Sequence[Queued]) -> State:
    if run.proof is not None and run.proof.refused:
        return State(status="refused", reason=run.proof.refused, by_proof=True)
    reached, planned = run.reached, run.planned
    seen: dict[str, Any] = {
        "step": reached and reached.step,
        "steps": planned and planned.steps,
        "loss": reached and reached.loss,
    }
    if run.summary is not None and run.summary.status == "done":
        return State(status="done", **seen)
    living = jobs.alive(run.path, queued) if queued else []
    if living and living[0].waits:
        return State(status="queued", reason=living[0].reason, **seen)
    if living or lease.holder(run.path) is not None:
        return State(status="running", reason=living[0].reason if living else "", **seen)
    return _ended(run, seen)


def _ended(run: Run, seen: dict[str, Any]) -> State:
    """Return how a run ended by what was written last: by a rank, by a start that was refused, or by the study."""
    written = [end for end in (run.exit, run.ending(REFUSAL), run.ending(OUTCOME)) if end is not None]
    ends = [end for end in written if end.code]
    if not ends:
        why = "summary.json is missing" if written else "nobody wrote how it ended" if run.attempts else ""
        return State(status="stopped" if run.attempts else "missing", reason=why, **seen)
    last = max(ends, key=lambda end: end.time)
    cause = " ".join(last.cause.split())
    if last.kind in (Kind.STOPPED, Kind.INTERRUPTED):
        return State(status="stopped", reason=cause, **seen)
    failure = _FAILURES.get(last.kind, f"crashed ({last.code})")
    return State(status="failed", reason=f"{failure}: {cause}" if cause else failure, **seen)


def queue(folder: Path, cells: Sequence[dict[str, Any]]) -> Sequence[Queued]:
    """Return this user's SLURM jobs, if any of these cells was ever sent to SLURM from here."""
    sent = any(cell["run"] is not None and (folder / cell["run"] / "jobs.jsonl").exists() for cell in cells)
    if not sent or shutil.which("squeue") is None:
        return ()
    try:
        return slurm.queue()
    except RefusedError:  # no controller answers: what the run directories say is still true
        return ()
