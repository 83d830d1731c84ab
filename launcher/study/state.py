"""How far one run of a study is: queued, running, done, or failed and why."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import lease
from launcher.errors import (
    EXIT_NUMERICS,
    EXIT_REFUSED,
    EXIT_REQUEST,
    EXIT_STALLED,
    EXIT_STOPPED,
    Interrupted,
    RefusedError,
)
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
    by_proof: bool = False
    """Whether the parity gate is what refused it: asked again, it may say something else."""

    def to_do(self, *, retry: bool, gate: bool) -> bool:
        """Tell whether there is something to run: also what failed, for `retry`, and what only the gate refused."""
        again = (retry and self.status == "failed") or (gate and self.by_proof)
        return again or self.status in ("missing", "stopped")


def of(cell: dict[str, Any], folder: Path, queued: Sequence[Queued] = ()) -> State:
    """Return the state of a cell of study.json."""
    run = None if cell["run"] is None else folder / cell["run"]
    if cell["refused"] is not None or run is None:
        return State(status="refused", reason=cell["refused"] or "it could not be planned")
    if (proof := read_json(run / "proof.json")).get("refused"):
        return State(status="refused", reason=str(proof["refused"]), by_proof=True)
    last = jobs.last_step(run / "metrics.jsonl")
    seen: dict[str, Any] = {
        "step": whole(last.get("step")),
        "steps": whole(read_json(run / "plan.json").get("steps")),
        "loss": number(last.get("loss")),
    }
    if read_json(run / "summary.json").get("status") == "done":
        return State(status="done", **seen)
    living = jobs.alive(run, queued) if queued else []
    if living and living[0].waits:
        return State(status="queued", reason=living[0].reason, **seen)
    if living or lease.holder(run) is not None:
        return State(status="running", reason=living[0].reason if living else "", **seen)
    return _ended(run, seen)


def _ended(run: Path, seen: dict[str, Any]) -> State:
    """Return how a run ended by what was written last: by a rank, by a start that was refused, or by the study."""
    attempts = sorted(one for one in (run / "attempts").glob("[0-9]*") if one.is_dir())
    told = [read_exit(attempts[-1]) or {}] if attempts else []
    told += [read_json(run / "refused.json"), read_json(run / OUTCOME)]
    found = [one for one in told if whole(one.get("code")) and number(one.get("time")) is not None]
    if not found:
        why = "nobody wrote how it ended" if attempts else ""
        return State(status="stopped" if attempts else "missing", reason=why, **seen)
    last = max(found, key=lambda one: one["time"])
    code, cause = last["code"], " ".join(str(last.get("cause") or "").split())
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


def number(value: Any) -> float | None:
    """Return a finite number, or None for whatever else stands in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def whole(value: Any) -> int | None:
    """Return a whole number, or None for whatever else stands in its place."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


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
    if not sent or shutil.which("squeue") is None:
        return ()
    try:
        return slurm.queue()
    except RefusedError:  # no controller answers: what the run directories say is still true
        return ()
