"""Choose the checkpoint that something is made of, and make sure that it is what was written."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Damaged, Manifest
from halfstep.launcher.checkpoint.store import Candidate
from halfstep.launcher.errors import RequestError
from halfstep.launcher.rundir import records
from halfstep.launcher.rundir.run_reader import rows
from halfstep.launcher.system.fields import checked


@dataclass(frozen=True, kw_only=True)
class Source:
    """A good checkpoint of a run."""

    run: Path
    folder: Path
    manifest: Manifest


def choose(run: Path, step: int | None, again: str) -> Source:
    """Return the checkpoint of a step, or the newest, after reading every byte of it.

    `again` is the command that is being run, without `--step`; an error ends in it. Raises RequestError where there is
    no such checkpoint and where it is damaged: an older one is proposed, never taken silently.
    """
    candidates = list(store.candidates(run))
    if not candidates:
        raise none_there(run)
    if step is None:
        chosen = candidates[0]
    else:
        matching = [candidate for candidate in candidates if candidate.step == step]
        if not matching:
            raise no_such_step(run, step, [candidate.step for candidate in candidates])
        chosen = matching[0]
    if chosen.manifest is None:
        raise _damaged(run, chosen, chosen.reason or "it is damaged", candidates, again)
    reason = shards.damaged(chosen.folder, chosen.manifest, lambda: None)
    if reason and not os.path.lexists(chosen.folder):
        raise RequestError(
            f"the checkpoint of step {chosen.step} was deleted while it was read: its run keeps newer ones",
            where=str(chosen.folder),
            fix=f"{again}, which takes the newest",
        )
    if reason:
        raise _damaged(run, chosen, reason, candidates, again)
    return Source(run=run, folder=chosen.folder, manifest=chosen.manifest)


def none_there(run: Path) -> RequestError:
    """Return what to say of a run without checkpoints, and of a path that is no run."""
    if not run.is_dir():
        return RequestError(f"there is no folder {run}", where=f"RUN {run}", fix="check the path")
    return RequestError(
        f"{run} has no checkpoints",
        where=str(store.home(run)),
        fix="start the run with checkpoint.every=N or checkpoint.at_end=true, or name the run directory itself",
    )


def incomplete(chosen: Source, damage: Damaged) -> RequestError:
    """Return what to say where a checkpoint lacks a part of what it should hold."""
    return RequestError(
        f"the checkpoint of step {chosen.manifest.step} is incomplete: {damage}",
        where=str(chosen.folder),
        fix="take another with --step",
    )


def no_such_step(run: Path, step: int, there: list[int]) -> RequestError:
    """Return what to say where no checkpoint is of the step asked for."""
    return RequestError(
        f"there is no checkpoint of step {step}",
        where=f"--step {step}, in {store.home(run)}",
        fix=f"take one of {', '.join(map(str, sorted(there, reverse=True)[:12]))}",
    )


def _damaged(run: Path, chosen: Candidate, reason: str, candidates: list[Candidate], again: str) -> RequestError:
    others = [
        candidate.step for candidate in candidates if candidate.manifest is not None and candidate.step != chosen.step
    ]
    older = next((step for step in others if step < chosen.step), None)
    other = older if older is not None else next(iter(others), None)
    return RequestError(
        f"the checkpoint of step {chosen.step} is damaged: {reason}",
        where=str(chosen.folder),
        fix=f"{again} --step {other}"
        if other is not None
        else "restore it from a copy: the run has no other that looks good",
    )


def losses(run: Path) -> dict[int, float | None]:
    """Return the training loss of every step that metrics.jsonl has; lines that cannot be read are left out."""
    losses: dict[int, float | None] = {}
    for row in rows(run / "metrics.jsonl"):
        with contextlib.suppress(ValueError):  # not one of ours
            if "loss" in row:
                reached = checked(records.Reached, row)
                losses[reached.step] = reached.loss
    return losses
