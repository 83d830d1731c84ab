"""Resume from a checkpoint: choose the newest good one, and fill an engine of any world size, stage and precision.

Whoever wrote which piece of a parameter, each rank reads the elements that it holds now. The weights that the network
computes with are not stored: they are their masters, rounded, in every cell.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.launcher import fault_injection
from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Damaged, File, Manifest
from halfstep.launcher.checkpoint.shards import Shards
from halfstep.launcher.checkpoint.store import Candidate
from halfstep.launcher.config import precisions
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.state import module_buffers, rng, saving, training_state
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import environment
from halfstep.launcher.watchdog.heartbeat import Heartbeat


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a start resumes from; all ranks make the same."""

    checkpoint: Candidate | None
    damaged: tuple[Candidate, ...] = ()
    """Newer ones, or others, that are no good."""
    seconds: float = 0.0
    """Spent reading and hashing."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.checkpoint.step if self.checkpoint else 0


def choose(run: Path, plan: Plan, rank: int, beat: Callable[[], None]) -> Choice:
    """Find the newest checkpoint whose every byte is as written; the ranks share the reading. A collective call.

    Raises RequestError where checkpoints exist and none is good, where one is of another run, and where one must be
    there and is not.
    """
    if plan.checkpoint.resume == "never":
        return Choice(checkpoint=None)
    began, refuse = time.perf_counter(), partial(RequestError, reported=rank != 0)  # all ranks come to the same
    candidates = [_received(run, tree) for tree in distributed.on_rank_zero(lambda: _sent(store.candidates(run)))]
    damaged = [candidate for candidate in candidates if candidate.manifest is None]
    for candidate in candidates:
        if candidate.manifest is None:
            continue
        _refuse_another(candidate, candidate.manifest, plan, refuse)
        if not plan.can_save:
            raise refuse(
                f"{candidate.folder.name} cannot be loaded to where this run keeps its states",
                where="offload=nvme",
                fix="take offload=cpu, or start from scratch with checkpoint.resume=never",
            )
        world = plan.topology.world_size
        reasons = distributed.gather_objects(shards.damaged(candidate.folder, candidate.manifest, beat, rank, world))
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            seconds = time.perf_counter() - began
            return Choice(checkpoint=candidate, damaged=tuple(damaged), seconds=seconds)
        damaged.append(replace(candidate, reason=reason))
    if damaged:
        causes = "; ".join(f"{candidate.folder.name}: {candidate.reason}" for candidate in damaged[:4])
        raise refuse(
            f"none of the {len(damaged)} checkpoint(s) is good: {causes}",
            where=str(store.home(run)),
            fix="restore one from a copy, or start from scratch: checkpoint.resume=never keeps these in attempts/, "
            "another out leaves them",
        )
    if plan.checkpoint.resume == "must":
        raise refuse(
            "there is no checkpoint to resume from",
            where=f"checkpoint.resume=must and {store.home(run)}",
            fix="check out=DIR, or leave checkpoint.resume=auto to start from scratch",
        )
    return Choice(checkpoint=None)


def _sent(candidates: Iterable[Candidate]) -> list[dict[str, Any]]:
    """Return candidates as JSON carries them: all ranks choose among what rank 0 sees."""
    return [
        {
            "folder": candidate.folder.name,
            "step": candidate.step,
            "manifest": asdict(candidate.manifest) if candidate.manifest else None,
            "reason": candidate.reason,
        }
        for candidate in candidates
    ]


def _received(run: Path, tree: dict[str, Any]) -> Candidate:
    manifest = tree["manifest"]
    if manifest is not None:
        manifest = Manifest(**{**manifest, "files": tuple(File(**file) for file in manifest["files"])})
    folder = store.home(run) / tree["folder"]
    return Candidate(folder=folder, step=tree["step"], manifest=manifest, reason=tree["reason"])


def _refuse_another(candidate: Candidate, manifest: Manifest, plan: Plan, refuse: Callable[..., RequestError]) -> None:
    old, new = manifest.identity, plan.identity
    changed = plan.changed_from(old)
    if changed:
        differences = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:3])
        raise refuse(
            f"{candidate.folder.name} is a checkpoint of a different run: {differences}",
            where=str(candidate.folder),
            fix="move it away, or choose another out",
        )
    if candidate.step > plan.steps:
        raise refuse(
            f"the run has done {candidate.step} steps, and {plan.steps} were asked for",
            where=str(candidate.folder),
            fix=f"ask for steps={candidate.step} or more, or choose another out",
        )


def restore(
    engine: Engine, plan: Plan, choice: Choice, guard: Guard, rank: int, heartbeat: Heartbeat
) -> dict[str, Any]:
    """Fill engine, guard and random generators from the chosen checkpoint; return what the event tells of it.

    A collective call. Raises RefusedError on every rank where the engine that came out computes something else than
    the one that was saved.
    """
    assert choice.checkpoint is not None
    assert choice.checkpoint.manifest is not None
    manifest, folder = choice.checkpoint.manifest, choice.checkpoint.folder
    began = time.perf_counter()
    fault_injection.hit("load", rank=rank, step=manifest.step)
    shapes = training_state.shapes(engine)
    if shapes != manifest.model["parameters"]:
        raise _cannot(folder, "its parameters are not those of the model that was built")
    files = _open(folder, manifest)
    training_state.create_optimizer_states(engine, manifest.optimizer["states"], manifest.optimizer["steps"])
    try:
        for piece in training_state.fragments(engine):
            for state, view in training_state.tensors(engine, piece).items():
                values = files.read(piece.name, state, piece.start, piece.length)
                if values is not None:
                    view.copy_(torch.from_numpy(values))
                heartbeat.touch()
        module_buffers.restore(engine, files, rank)
    except Damaged as damage:
        raise _cannot(folder, str(damage)) from None
    heartbeat.mark("load", manifest.step)
    training_state.refresh_weights(engine)
    heartbeat.mark("load", manifest.step)
    engine.global_steps = manifest.step
    engine.micro_steps = manifest.step * plan.batch.accumulation
    engine.global_samples = manifest.step * plan.batch.global_
    engine.skipped_steps = manifest.guard["skipped_steps"]
    guard.restore(manifest.guard)
    difference, bound = _compare(engine, plan, files)
    if difference > bound:
        raise _cannot(folder, f"the engine's logits differ by {difference:g} from those that were saved with it")
    # A checkpoint that was converted to another number of ranks has none.
    drawn = files.sidecar(rank).get("rng") if manifest.world_size == plan.topology.world_size else None
    if drawn:
        _restore_random(folder, rank, drawn)
    else:
        rng.seed(plan, rank, manifest.step)
    here = environment.versions()
    return {
        "step": manifest.step,
        "folder": folder.name,
        "from": {"world_size": manifest.world_size, "zero": manifest.zero, "precision": manifest.precision},
        "random_states": "restored" if drawn else "seeded again: they belong to another number of ranks",
        "logits_differ_by": difference,
        "other_versions": {
            name: f"{manifest.versions.get(name)} -> {here.get(name)}"
            for name in sorted({*manifest.versions, *here})
            if manifest.versions.get(name) != here.get(name)
        },
        "verify_seconds": round(choice.seconds, 6),
        "seconds": round(time.perf_counter() - began, 6),
    }


def _open(folder: Path, manifest: Manifest) -> Shards:
    try:
        return Shards(folder, manifest)
    except Damaged as damage:
        raise _cannot(folder, str(damage)) from None


def _restore_random(folder: Path, rank: int, drawn: dict[str, Any]) -> None:
    try:
        rng.restore(drawn)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _cannot(folder, f"the random states of rank {rank} are no such states: {error}") from None


def _compare(engine: Engine, plan: Plan, files: Shards) -> tuple[float, float]:
    """Return how far this engine's logits are from those of the engine that was saved, and how far they may be.

    To the bit in the same cell on the same machine; another order of summation, or rounding to another precision,
    moves the last digits. What goes wrong in a reshape moves the first.
    """
    saved = files.probe()
    logits = saving.probe(engine, plan)
    if saved is None or not np.isfinite(saved).all():
        return 0.0, 0.0  # a run that is about to be stopped by its guard
    if saved.size != logits.size:
        raise _cannot(files.folder, f"{saved.size} logits were saved with it, and the engine computes {logits.size}")
    own = float(np.max(np.abs(logits - saved.reshape(-1))))
    worst = max(distributed.gather_objects(own if np.isfinite(own) else float("inf")))
    coarse = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
    bound = max(coarse[precisions.of(kind).products] for kind in (plan.precision, files.manifest.precision))
    return worst, bound * max(1.0, float(np.max(np.abs(saved))))


def _cannot(folder: Path, reason: str) -> RefusedError:
    return RefusedError(
        f"{folder.name} cannot be loaded: {reason}",
        where=str(folder),
        fix="move it away to resume from an older one; `halfstep checkpoint verify` says which are good",
    )
