"""One training process from joining the others to its summary."""

import contextlib
import errno
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from launcher import exits, faults, rundir
from launcher.checkpoint import store
from launcher.engine import distributed, randomness, restoring
from launcher.engine.build import build
from launcher.engine.feed import Feed
from launcher.engine.guard import Guard
from launcher.engine.loop import Listeners, Outside, train
from launcher.engine.pace import Pace
from launcher.engine.restoring import Choice
from launcher.engine.saving import Saver
from launcher.engine.witness import Witness
from launcher.errors import Fault, HalfstepError, NumericsError, RefusedError, Stopped
from launcher.heart import Heart
from launcher.lease import lease
from launcher.plan import present
from launcher.plan.plan import Plan
from launcher.rundir import RunDir
from launcher.spec.load import Request
from launcher.stop import Stop
from launcher.topology import Rank
from models.build import initial_statistics


def run(path: Path, request: Request, plan: Plan, rank: Rank, stop: Stop, heart: Heart) -> int:
    """Train the plan in its run directory and return the exit code; every rank of the run calls this."""
    heart.mark("join")
    distributed.join(rank, plan)
    stop.install()  # libraries may have put their own handlers there while they were imported
    with contextlib.ExitStack() as held:

        def open_directory() -> bool:
            rundir.refuse_another_run(path, plan)
            held.enter_context(lease(path))
            done = rundir.finished(path)
            if done is not None and done["run_id"] == plan.run_id:
                return False
            store.sweep(path)
            return True

        if not distributed.on_rank_zero(open_directory):
            if rank.rank == 0:
                print(f"{path} is finished: summary.json has its result. Another out, or another request, starts anew.")
            distributed.leave()
            return 0
        heart.mark("load")
        choice = restoring.choose(path, plan, rank.rank, lambda: heart.mark("load"))

        def start_attempt() -> RunDir:
            rundir.write_plan(path, request, plan)
            about: dict[str, Any] = {"launcher": rank.source, "world_size": rank.world_size, "steps_done": choice.step}
            about["began"] = _began()
            return rundir.start_attempt(path, about, steps_done=choice.step)

        where: RunDir = distributed.on_rank_zero(start_attempt)
        stop.attempt = where.attempt
        heart.set_attempt(where.attempt, rank.world_size)
        stop.set_grace(plan.checkpoint.grace, lambda: _out_of_grace(where, rank))
        try:
            _train(where, plan, rank, choice, stop, heart)
        except BaseException as error:
            return _fail(where, rank, error)
        faults.hit("exit", rank=rank.rank, step=plan.steps)
        if rank.rank == 0:  # the others are done before rank 0 has written the summary
            exits.write_exit(where.attempt, 0, "done", rank.rank)
        distributed.leave()
    return 0


def _began() -> float:
    """Return when this process was started, seconds since the epoch: what came before the attempt is part of it."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, proc(5)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _out_of_grace(where: RunDir, rank: Rank) -> None:
    newest = next((one.folder.name for one in store.candidates(where.path) if one.manifest), "there is none yet")
    told = Stopped(
        "the time to stop in was over before the state was saved",
        where=f"checkpoint.grace; the last good checkpoint: {newest}",
        fix="start the same command again to go on from there",
    )
    if exits.write_exit(where.attempt, told.exit_code, told.what, rank.rank) is None:
        print(told, file=sys.stderr, flush=True)


def _fail(where: RunDir, rank: Rank, error: BaseException) -> int:
    """Write down how this rank failed, say it if no other rank has, and return the exit code."""
    log = where.rank_log(rank.rank)
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # the disk may be what failed
        traceback.print_exception(error, file=file)
    told = _explain(error, log)
    # A connection that broke is what a rank's death looks like to the others: whoever knows of it comes first.
    write = exits.write_follow_up if isinstance(error, dist.DistError | RuntimeError) else exits.write_exit
    cause = write(where.attempt, told.exit_code, told.what, rank.rank)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if cause is None:
        print(told, file=sys.stderr, flush=True)
    return told.exit_code if cause is None else cause  # of the rank that failed first, and broke this one's connection


def _explain(error: BaseException, log: Path) -> HalfstepError:
    if isinstance(error, HalfstepError):
        return error
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


def _train(where: RunDir, plan: Plan, rank: Rank, choice: Choice, stop: Stop, heart: Heart) -> None:
    distributed.quiet_deepspeed(where.rank_log(rank.rank))
    with Witness(where, plan, writes=rank.rank == 0, steps_done=choice.step) as witness:
        _say_what_is_coming(witness, where, plan, choice)
        heart.mark("build")
        faults.hit("init", rank=rank.rank)
        engine, repairs = build(plan)
        distributed.set_timeouts(plan.watch.timeout)
        randomness.seed(plan, rank.rank, 0)
        witness.event(
            "built",
            optimizer=type(engine.optimizer).__name__,
            compiled=engine.is_compiled,
            activation_checkpointing=engine.module.is_activation_checkpointing,
        )
        witness.repaired(repairs.active)
        guard = Guard(engine, plan, repairs, witness.event, rank.rank)
        saver = Saver(
            engine,
            plan,
            where,
            guard,
            event=witness.event,
            sync_records=witness.sync,
            beat=lambda: heart.mark("save"),
            damaged=frozenset(one.step for one in choice.damaged),
        )
        if choice.checkpoint is not None:
            heart.mark("load", choice.step)
            found = restoring.restore(engine, plan, choice, guard, rank.rank, lambda: heart.mark("load", choice.step))
            witness.resumed(found)
            saver.last_step = choice.step
        elif plan.model.weights is None:
            witness.event("initialised", mean_and_std=initial_statistics(engine.module))

        def asked() -> str | None:
            if rank.rank == 0 and stop.asked is None and where.stop_file.exists():
                stop.ask("the file STOP")
            return stop.asked

        outside = Outside(mark=heart.mark, asked=asked, saver=saver, pace=Pace(engine, plan))
        tell = Listeners(step=witness.step, evaluation=witness.evaluation, event=witness.event)
        feed = Feed(plan, rank, distributed.device(rank, plan))
        evaluated = all(distributed.gather_objects(witness.evaluated(choice.step)))
        witness.event("training", first_step=choice.step + 1)
        heart.set_timeout(plan.watch.timeout)
        try:
            train(engine, plan, feed, tell, guard, outside, done=choice.step, evaluated=evaluated)
        except (NumericsError, Stopped) as error:  # every rank raises it after the same step
            _leave_early(where, rank, engine, witness, error)
            raise
        if rank.rank == 0:
            witness.summarise("done")


def _say_what_is_coming(witness: Witness, where: RunDir, plan: Plan, choice: Choice) -> None:
    for line in [*present.headline(plan), f"run directory {where.path}", *present.warnings(plan)]:
        witness.screen.say(line)
    if choice.step:
        witness.take_over()
    for one in choice.damaged:
        witness.event("checkpoint_damaged", folder=one.folder.name, reason=one.reason)
        witness.screen.say(f"WARNING: checkpoint {one.folder.name} is damaged and passed over: {one.reason}")
    if fault := faults.set_here():
        witness.event("fault_set", fault=fault)
        witness.screen.say(f"WARNING: {faults.VARIABLE}={fault}: this run is being broken on purpose")


def _leave_early(
    where: RunDir, rank: Rank, engine: DeepSpeedEngine, witness: Witness, error: NumericsError | Stopped
) -> None:
    """Write down how far it went; all ranks leave together."""
    finite = all(distributed.gather_objects(_weights_are_finite(engine)))
    witness.event("stopped", reason=error.what, where=error.where, weights_finite=finite)
    if rank.rank == 0:
        witness.summarise("diverged" if isinstance(error, NumericsError) else "stopped")
        with contextlib.suppress(OSError):
            where.stop_file.unlink(missing_ok=True)  # it has been done; the next start is meant to go on
    distributed.gather_objects(None)  # a launcher ends everybody when one rank fails: let rank 0 write first


def _weights_are_finite(engine: DeepSpeedEngine) -> bool:
    # At stage 3 a rank holds its part of a parameter beside it.
    return all(bool(getattr(one, "ds_tensor", one).isfinite().all()) for one in engine.module.parameters())
