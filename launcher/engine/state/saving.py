"""Save the training state: every rank writes its own part, all agree that it is on the disk, rank 0 lets it appear.

What DeepSpeed's own checkpoint lacks (T16 to T19): hashes, a commit that is one rename, RNG states, the guard's state.
A rank writes its masters and optimizer states while the loop stands still; syncing continues beside the next step, and
at the end of that step, before anything is written about it, the checkpoint appears.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from halfstep.launcher import fault_injection
from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Corpus, File, Manifest, Model, PartOfData
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.state import module_buffers, rng, training_state
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import DiskFull, HalfstepError, RefusedError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import environment
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.system.files import FULL

_SPARE = 1 << 20
"""Bytes a rank needs besides its tensors: headers, sidecar, manifest."""


@dataclass(kw_only=True)
class _Pending:
    """A checkpoint on its way."""

    step: int
    folder: Path
    manifest: Manifest | None
    """Without its files; rank 0's."""
    synced: "Future[list[File]] | None" = None
    error: str | None = None
    full: bool = False
    """Whether the error is that the disk is full."""
    stalled: float = 0.0


class Saver:
    """Writes one rank's part of every checkpoint of a run; all ranks call alike."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        where: RunDir,
        guard: Guard,
        *,
        event: Callable[..., None],
        sync_records: Callable[[], None],
        beat: Callable[[], None],
        mark: Callable[[int], None],
        damaged: frozenset[int] = frozenset(),
        last_step: int = 0,
    ) -> None:
        self._engine, self._plan, self._where, self._guard = engine, plan, where, guard
        self._event, self._sync_records, self._beat, self._mark = event, sync_records, beat, mark
        self._damaged = damaged
        self._rank = dist.get_rank()
        self._pool = ThreadPoolExecutor(1)
        self._pending: _Pending | None = None
        self.last_step = last_step
        """The newest step that is safe on the disk; 0 = none."""

    @property
    def pending(self) -> bool:
        """Whether a save was begun and is not finished; the same on every rank."""
        return self._pending is not None

    def begin(self, step: int, rate: float) -> None:
        """Write the state after an optimizer step; `finish` makes a checkpoint of it. A collective call.

        Raises RefusedError on every rank where there is not enough space, unless the plan continues without.
        """
        self.finish()
        if step == self.last_step:
            return
        started = time.perf_counter()
        fault_injection.hit("save.begin", rank=self._rank, step=step)
        if lost := training_state.left_out(self._engine):
            raise RefusedError(
                f"the state of {type(training_state.base_optimizer(self._engine)).__name__} cannot be saved: "
                f"{', '.join(lost)}",
                where="ds.optimizer.type",
                fix="take AdamW or SGD, or save nothing: checkpoint.every=0 checkpoint.at_end=false",
            )
        pieces = [*self._pieces(probe(self._engine, self._plan)), *module_buffers.pieces(self._engine)]
        self._mark(step)
        needed = sum(distributed.gather_objects(sum(piece.bytes for piece in pieces) + _SPARE))
        attempt, distrusted = self._where.attempt.name, step in self._damaged
        try:
            prepared: str | None = distributed.on_rank_zero(
                lambda: self._prepare(step, attempt, needed, distrusted=distrusted)
            )
        except HalfstepError as error:
            self._failed(step, error)
            return
        if prepared is None:  # a good one stands there: of an attempt that died between saving and the next step
            self.last_step = step
            return
        folder = Path(prepared)
        manifest = self._manifest(step, rate) if self._rank == 0 else None
        self._pending = _Pending(step=step, folder=folder, manifest=manifest)
        try:
            files = self._write(folder, step, pieces)
        except OSError as error:
            self._pending.error, self._pending.full = error.strerror or str(error), error.errno in FULL
        else:
            self._pending.synced = self._pool.submit(self._sync, folder, step, files)
        self._mark(step)  # whoever hangs in its own part is a mark behind those that wait for it
        self._pending.stalled = time.perf_counter() - started

    def finish(self) -> None:
        """Wait until every rank's part is on the disk and let the checkpoint appear. A collective call."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.perf_counter()
        files: list[File] = []
        if pending.synced is not None:
            try:
                files = pending.synced.result()
            except OSError as error:
                pending.error, pending.full = error.strerror or str(error), error.errno in FULL
        self._mark(pending.step)
        outcome = distributed.gather_objects([pending.error, [asdict(file) for file in files]])
        reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(outcome) if reason]
        everything = tuple(File(**file) for _, own in outcome for file in own)
        if not reasons:
            for point in ("save.manifest", "save.rename"):  # where rank 0 is meanwhile
                if self._rank:
                    fault_injection.hit(point, rank=self._rank, step=pending.step)
            reasons = distributed.on_rank_zero(lambda: self._commit(pending, everything))
        if reasons:
            self._lost(pending, reasons)
            return
        self.last_step = pending.step
        stalled = pending.stalled + time.perf_counter() - began
        size = sum(file.bytes for file in everything)
        self._event("saved", step=pending.step, bytes=size, seconds=round(stalled, 6))

    def _prepare(self, step: int, attempt: str, needed: int, *, distrusted: bool) -> str | None:
        """Make room and a folder for a save, and return the folder; None where a good checkpoint stands already."""
        self._prune()
        folder = store.prepare(self._where.path, step, attempt, needed, distrusted=distrusted)
        return None if folder is None else str(folder)

    def _commit(self, pending: _Pending, files: tuple[File, ...]) -> list[str]:
        """Make the checkpoint appear, prune, and return what kept it from appearing."""
        assert pending.manifest is not None, "rank 0 has it"
        try:
            self._sync_records()  # the rows of the steps that the checkpoint has behind it must not be lost after it
            store.commit(pending.folder, replace(pending.manifest, files=files))
        except OSError as error:
            pending.full = error.errno in FULL
            return [f"rank 0: {error.strerror or error}"]
        self._damaged -= {pending.step}
        self._prune()
        return []

    def _prune(self) -> None:
        """Delete what need not be kept; before a save as well, for its space."""
        keep = self._plan.checkpoint
        try:
            store.prune(self._where.path, keep.keep, keep.keep_every, distrusted=self._damaged)
        except OSError as error:  # an old one too many harms nobody
            self._event("prune_failed", reason=str(error))

    def _lost(self, pending: _Pending, reasons: list[str]) -> None:
        if self._rank == 0:
            shutil.rmtree(pending.folder, ignore_errors=True)
        full = any(distributed.gather_objects(pending.full))
        error = (DiskFull if full else RefusedError)(
            f"the checkpoint of step {pending.step} could not be written ({'; '.join(reasons[:3])})",
            where=str(pending.folder.parent),
            fix="fix that and start the same command again; checkpoint.on_failure=continue trains on without",
            reported=self._rank != 0,
        )
        self._failed(pending.step, error)

    def _failed(self, step: int, error: HalfstepError) -> None:
        self._event("save_failed", step=step, reason=error.what)
        if self._plan.checkpoint.on_failure == "stop":
            last = f"the last good one is of step {self.last_step}" if self.last_step else "there is none yet"
            error.what += f"; {last}"
            raise error

    def _pieces(self, logits: np.ndarray) -> Iterator[shards.Piece]:
        """Yield this rank's share: what it alone holds and, at stage 0, its part of what all hold."""
        if self._rank == 0:
            yield shards.Piece(key=shards.PROBE, length=logits.size, array=lambda: logits)
        for name, _, length, views in self._held():
            for state, view in views.items():
                yield shards.Piece(key=f"{name}/{state}", length=length, array=_reader(view))

    def _held(self) -> Iterator[tuple[str, int, int, dict[str, torch.Tensor]]]:
        """Yield (parameter, first element, length, views) of what this rank writes."""
        world = self._plan.topology.world_size
        for piece in training_state.fragments(self._engine):
            views, first, length = training_state.tensors(self._engine, piece), 0, piece.length
            if self._plan.zero == 0:
                share = -(-piece.length // world)
                first = min(self._rank * share, piece.length)
                length = min(share, piece.length - first)
                views = {state: view.narrow(0, first, length) for state, view in views.items()}
            if length:
                yield piece.name, piece.start + first, length, views

    def _write(self, folder: Path, step: int, pieces: list[shards.Piece]) -> list[File]:
        name, written = shards.rank_name(self._rank), iter(range(len(pieces)))

        def beat() -> None:
            self._beat()
            if next(written) == len(pieces) // 2:
                fault_injection.hit("save.shard", rank=self._rank, step=step)

        tensors = shards.write(folder / f"{name}.safetensors", pieces, beat)
        held = {parameter: [start, length] for parameter, start, length, _ in self._held()}
        sidecar = shards.write_json(folder / f"{name}.json", {"pieces": held, "rng": rng.states()})
        return [tensors, sidecar]

    def _sync(self, folder: Path, step: int, files: list[File]) -> list[File]:
        fault_injection.hit("save.sync", rank=self._rank, step=step)
        for file in files:
            shards.sync(folder / file.name)
        return files

    def _manifest(self, step: int, rate: float) -> Manifest:
        plan, pieces = self._plan, training_state.fragments(self._engine)
        counts = [training_state.step_count(self._engine, piece) for piece in pieces]
        kept = {state for piece in pieces for state in training_state.tensors(self._engine, piece)} - {shards.MASTER}
        batch, data = plan.batch, Corpus(path=plan.data.path, digest=plan.data.digest)
        if plan.data.parts:  # any of them has the tokenizer
            data["parts"] = [PartOfData(path=part.path, digest=part.digest) for part in plan.data.parts]
        model: Model = {
            "name": plan.model.name,
            "config": plan.model.config,
            "vocabulary": plan.model.vocabulary,
            "parameters": training_state.shapes(self._engine),
            "buffers": module_buffers.described(self._engine),
        }
        if plan.lora is not None:
            model["adapters"] = module_buffers.adapters(plan, plan.lora)
        return Manifest(
            step=step,
            tokens=step * batch.global_ * plan.sequence,
            run_id=plan.run_id,
            identity=plan.identity,
            model=model,
            world_size=plan.topology.world_size,
            zero=plan.zero,
            precision=plan.precision,
            batch={"global": batch.global_, "micro": batch.micro, "accumulation": batch.accumulation},
            sequence=plan.sequence,
            data=data,
            optimizer={
                "kind": type(training_state.base_optimizer(self._engine)).__name__,
                "states": sorted(kept),
                "steps": max((count for count in counts if count is not None), default=0.0),
            },
            guard=self._guard.state(),
            lr=rate,
            versions=environment.versions(),
            attempt=self._where.attempt.name,
            time=time.time(),
            files=(),
        )


def _reader(view: torch.Tensor) -> Callable[[], np.ndarray]:
    return lambda: view.detach().float().cpu().numpy()


@torch.no_grad()
def probe(engine: Engine, plan: Plan) -> np.ndarray:
    """Return the engine's logits for a few fixed tokens, flat fp32: what is made of a checkpoint can be compared.

    A collective call at stage 3.
    """
    tokens = shards.probe_tokens(plan.sequence, plan.model.vocabulary)
    was_training = engine.module.training
    engine.eval()
    with torch.compiler.set_stance("force_eager"):  # another shape: compiling for it would take longer than saving
        logits = engine(input_ids=torch.tensor([tokens], device=engine.device)).logits
    engine.train(was_training)
    return logits.float().cpu().numpy().reshape(-1)
