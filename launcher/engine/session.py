"""One training process from joining the others to its summary."""

import contextlib
import errno
import sys
import traceback
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from launcher import exits, faults, rundir
from launcher.engine import distributed
from launcher.engine.build import build
from launcher.engine.feed import Feed
from launcher.engine.loop import Listeners, train
from launcher.engine.witness import Witness
from launcher.errors import Fault, HalfstepError, Interrupted, NumericsError, RefusedError
from launcher.lease import lease
from launcher.plan import present
from launcher.plan.plan import Plan
from launcher.rundir import RunDir
from launcher.spec.digest import digest
from launcher.spec.load import Request
from launcher.topology import Rank
from models.build import initial_statistics


def run(path: Path, request: Request, plan: Plan, rank: Rank) -> int:
    """Train the plan in its run directory and return the exit code; every rank of the run calls this."""
    distributed.join(rank, plan)
    with contextlib.ExitStack() as held:

        def open_directory() -> RunDir | None:
            rundir.refuse_another_run(path, plan)
            held.enter_context(lease(path))
            rundir.write_plan(path, request, plan)
            done = rundir.finished(path)
            if done is not None and done["run_id"] == plan.run_id:
                return None
            return rundir.start_attempt(path, {"launcher": rank.source, "world_size": rank.world_size})

        where: RunDir | None = distributed.on_rank_zero(open_directory)
        if where is None:
            if rank.rank == 0:
                print(f"{path} is finished: summary.json has its result. Another out, or another request, starts anew.")
            distributed.leave()
            return 0
        try:
            _train(where, plan, rank)
        except BaseException as error:
            return _fail(where, rank, error)
        if rank.rank == 0:  # the others are done before rank 0 has written the summary
            exits.write_exit(where.attempt, 0, "done", rank.rank)
        distributed.leave()
    return 0


def _fail(where: RunDir, rank: Rank, error: BaseException) -> int:
    """Write down how this rank failed, say it if no other rank has, and return the exit code."""
    log = where.rank_log(rank.rank)
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # the disk may be what failed
        traceback.print_exception(error, file=file)
    told = _explain(error, log)
    cause = exits.write_exit(where.attempt, told.exit_code, told.what, rank.rank)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if cause is None and not isinstance(error, KeyboardInterrupt):
        print(told, file=sys.stderr, flush=True)
    return told.exit_code if cause is None else cause  # of the rank that failed first, and broke this one's connection


def _explain(error: BaseException, log: Path) -> HalfstepError:
    if isinstance(error, HalfstepError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", where="the keyboard", fix="start the same command again")
    if isinstance(error, torch.OutOfMemoryError):
        return RefusedError(
            f"out of device memory: {str(error).splitlines()[0]}",
            where=str(log),
            fix="take a smaller batch.micro, activation_checkpointing=true, or a higher zero",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RefusedError(
            "the disk is full",
            where=str(error.filename or log.parents[2]),
            fix="free some space, or write elsewhere: out=DIR",
        )
    return Fault.of(error, where=str(log))


def _train(where: RunDir, plan: Plan, rank: Rank) -> None:
    distributed.quiet_deepspeed(where.rank_log(rank.rank))
    device = distributed.device(rank, plan)
    with Witness(where, plan, writes=rank.rank == 0) as witness:
        for line in [*present.headline(plan), f"run directory {where.path}", *present.warnings(plan)]:
            witness.screen.say(line)
        if fault := faults.set_here():
            witness.event("fault_set", fault=fault)
            witness.screen.say(f"WARNING: {faults.VARIABLE}={fault}: this run is being broken on purpose")
        engine, repairs = build(plan)
        torch.manual_seed(int(digest([plan.seed, rank.rank]), 16) % 2**63)  # dropout, different on every rank
        witness.event(
            "built",
            optimizer=type(engine.optimizer).__name__,
            compiled=engine.is_compiled,
            activation_checkpointing=engine.module.is_activation_checkpointing,
        )
        witness.repaired(repairs.active)
        if plan.model.weights is None:
            witness.event("initialised", mean_and_std=initial_statistics(engine.module))
        tell = Listeners(step=witness.step, evaluation=witness.evaluation, event=witness.event)
        try:
            train(engine, plan, Feed(plan, rank, device), tell, repairs)
        except NumericsError as error:  # every rank raises it after the same step
            finite = all(distributed.gather_objects(_weights_are_finite(engine)))
            witness.event("stopped", reason=error.what, where=error.where, weights_finite=finite)
            if rank.rank == 0:
                witness.summarise("diverged")
            distributed.gather_objects(None)  # a launcher ends everybody when one rank fails: let rank 0 write first
            raise
        if rank.rank == 0:
            witness.summarise("done")


def _weights_are_finite(engine: DeepSpeedEngine) -> bool:
    # At stage 3 a rank holds its part of a parameter beside it.
    return all(bool(getattr(one, "ds_tensor", one).isfinite().all()) for one in engine.module.parameters())
