"""How far one run of a study is: queued, running, done, or failed and why."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import lease
from launcher.errors import EXIT_NUMERICS, EXIT_STALLED, EXIT_STOPPED
from launcher.submit import jobs, slurm
from launcher.submit.local import TIMED_OUT
from launcher.submit.slurm import Queued
from launcher.watch.exits import read_exit

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

    @property
    def open(self) -> bool:
        """Whether there is still something to run."""
        return self.status in ("missing", "stopped")


def of(cell: dict[str, Any], folder: Path, queued: Sequence[Queued] = ()) -> State:
    """Return the state of a cell of study.json."""
    run = None if cell["run"] is None else folder / cell["run"]
    if cell["refused"] is not None or run is None:
        return State(status="refused", reason=cell["refused"] or "it could not be planned")
    if (proof := read_json(run / "proof.json")).get("refused"):
        return State(status="refused", reason=proof["refused"])
    steps = read_json(run / "plan.json").get("steps")
    last = jobs.last_step(run / "metrics.jsonl")
    seen: dict[str, Any] = {"step": last.get("step"), "steps": steps, "loss": last.get("loss")}
    if read_json(run / "summary.json").get("status") == "done":
        return State(status="done", **seen)
    living = jobs.alive(run, queued) if queued else []
    if living and living[0].waits:
        return State(status="queued", reason=living[0].reason, **seen)
    if living or lease.holder(run) is not None:
        return State(status="running", reason=living[0].reason if living else "", **seen)
    return _ended(run, seen)


def _ended(run: Path, seen: dict[str, Any]) -> State:
    attempts = sorted(one for one in (run / "attempts").glob("[0-9]*") if one.is_dir())
    outcome = read_json(run / OUTCOME)
    found = (read_exit(attempts[-1]) if attempts else None) or (outcome if outcome.get("code") else None)
    if found is None:
        return State(
            status="stopped" if attempts else "missing", reason="nobody wrote how it ended" if attempts else ""
        )
    code, cause = int(found["code"]), " ".join(str(found.get("cause", "")).split())
    if code in (EXIT_STOPPED, 130) or (code >= 128 and outcome.get("interrupted")):
        return State(status="stopped", reason=cause, **seen)
    return State(status="failed", reason=f"{kind(code, cause)}: {cause}" if cause else kind(code, cause), **seen)


def kind(code: int, cause: str) -> str:
    """Return in a word or three why a run failed."""
    if any(word in cause for word in _MEMORY):
        return "out of memory"
    known = {EXIT_NUMERICS: "diverged", EXIT_STALLED: "stalled", TIMED_OUT: "timed out"}
    return known.get(code, f"crashed ({code})")


def read_json(file: Path) -> dict[str, Any]:
    """Return a file's object, empty where there is none that can be read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def queue(folder: Path, cells: Sequence[dict[str, Any]]) -> Sequence[Queued]:
    """Return this user's SLURM jobs, if any of these cells was ever sent to SLURM from here."""
    sent = any(cell["run"] is not None and (folder / cell["run"] / "jobs.jsonl").exists() for cell in cells)
    return slurm.queue() if sent and shutil.which("squeue") else ()
