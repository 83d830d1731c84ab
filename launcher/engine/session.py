"""One training process from joining the others to its exit code."""

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from halfstep.launcher import fault_injection
from halfstep.launcher.checkpoint import store
from halfstep.launcher.config.load import Request
from halfstep.launcher.engine.attempt import Attempt, prepared
from halfstep.launcher.engine.loop import train
from halfstep.launcher.engine.ranks import distributed, preflight, traffic
from halfstep.launcher.engine.state import restoring
from halfstep.launcher.errors import Fault, HalfstepError, OutOfDeviceMemory, OutOfHostMemory, Stopped
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import exits, run_directory, trust
from halfstep.launcher.rundir.lease import lease
from halfstep.launcher.rundir.records import Proof
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system import clock
from halfstep.launcher.system.files import explained, write_json
from halfstep.launcher.topology import Rank
from halfstep.launcher.watchdog.heartbeat import Heartbeat
from halfstep.launcher.watchdog.stop import Stop


def run(
    path: Path,
    request: Request,
    plan: Plan,
    rank: Rank,
    stop: Stop,
    heartbeat: Heartbeat,
    proof: Proof | None = None,
) -> int:
    """Train the plan in its run directory and return the exit code; every rank of the run calls this.

    `proof` is what rank 0 knows of the parity gate's verdict, for the summary.
    """
    heartbeat.mark("join")
    met = _meet(path, plan, rank, stop)
    distributed.join(rank, plan, met.store)
    reduced = traffic.bandwidth(distributed.device(rank, plan))
    stop.install()  # libraries may have put their own handlers there while they were imported
    with contextlib.ExitStack() as held:

        def open_directory() -> bool:
            run_directory.refuse_another_run(path, plan)
            held.enter_context(lease(path))
            done = Run(path).finished
            if done is not None and done.run_id == plan.run_id:
                return False
            store.sweep(path)
            return True

        if not distributed.on_rank_zero(open_directory):
            if rank.rank == 0:
                print(f"{path} is finished: summary.json has its result. Another out or request starts from scratch.")
            distributed.leave()
            return 0
        heartbeat.mark("load")
        choice = restoring.choose(path, plan, rank.rank, heartbeat.touch)

        def start_attempt() -> str:
            run_directory.write_plan(path, request, plan)
            about: dict[str, Any] = {"launcher": rank.source, "world_size": rank.world_size, "steps_done": choice.step}
            about["began"] = _began()
            where = run_directory.start_attempt(path, about, steps_done=choice.step)
            write_json(where.attempt / "preflight.json", {**met.seen, "all_reduce": reduced})
            return where.attempt.name

        where = run_directory.RunDir(path=path, attempt=path / "attempts" / distributed.on_rank_zero(start_attempt))
        if rank.rank == 0:
            stop.look_for(where.stop_file)
        heartbeat.set_attempt(where.attempt, rank.world_size)
        stop.set_grace(plan.checkpoint.grace, lambda: _out_of_grace(where, rank))
        try:
            attempt = Attempt(
                where=where, plan=plan, rank=rank, choice=choice, stop=stop, heartbeat=heartbeat, proof=proof
            )
            with prepared(attempt) as training:
                train(training)
        except BaseException as error:
            return _fail(where, rank, error)
        fault_injection.hit("exit", rank=rank.rank, step=plan.steps)
        if rank.rank == 0:  # the others are done before rank 0 has written the summary
            exits.write_exit(where.attempt, 0, "done", rank.rank)
        distributed.leave()
    return 0


def _meet(path: Path, plan: Plan, rank: Rank, stop: Stop) -> preflight.Met:
    """Hold the roll call; a start that it ends is written down for the job script."""
    run_directory.refuse_another_run(path, plan, reported=rank.local_rank != 0)
    secret = trust.secret(path) if rank.world_size > 1 else b""
    try:
        met = preflight.RollCall(rank, plan, secret, lambda: stop.asked).answer()
    except HalfstepError as error:
        if not error.reported and not isinstance(error, Fault | Stopped):
            exits.write_refusal(path, error)
        raise
    for stranger in met.seen.get("strangers", []):
        print(f"WARNING: sent away {stranger}", file=sys.stderr, flush=True)
    return met


def _began() -> float:
    """Return when this process was started, seconds since the epoch: what came before the attempt is part of it."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, proc(5)
    return clock.since_boot(ticks / os.sysconf("SC_CLK_TCK"))


def _out_of_grace(where: RunDir, rank: Rank) -> None:
    newest = next(
        (candidate.folder.name for candidate in store.candidates(where.path) if candidate.manifest), "there is none yet"
    )
    stopped = Stopped(
        "the time to stop in was over before the state was saved",
        where=f"checkpoint.grace; the last good checkpoint: {newest}",
        fix="start the same command again to resume from there",
    )
    if exits.write_exit(where.attempt, stopped.exit_code, stopped.what, rank.rank) is None:
        print(stopped, file=sys.stderr, flush=True)


def _fail(where: RunDir, rank: Rank, error: BaseException) -> int:
    """Write down how this rank failed, say it if no other rank has, and return the exit code."""
    log = where.rank_log(rank.rank)
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # the disk may be what failed
        traceback.print_exception(error, file=file)
    failure = _explain(error, log)
    # A connection that broke is what a rank's death looks like to the others: whoever knows of it comes first.
    write = exits.write_follow_up if isinstance(error, dist.DistError | RuntimeError) else exits.write_exit
    kind = exits.Kind.LOST_RANK if isinstance(error, dist.DistError) else exits.kind_of_error(failure)
    cause = write(where.attempt, failure.exit_code, failure.what, rank.rank, kind)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    # Where nothing can be written any more, none is first: then the rank says it that is meant to.
    if cause is None and not (failure.reported and exits.read_exit(where.attempt) is None):
        print(failure, file=sys.stderr, flush=True)
    return (
        failure.exit_code if cause is None else cause
    )  # of the rank that failed first, and broke this one's connection


def _explain(error: BaseException, log: Path) -> HalfstepError:
    if isinstance(error, HalfstepError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfDeviceMemory(
            f"out of device memory: {str(error).splitlines()[0]}",
            where=str(log),
            fix="take a smaller batch.micro, activation_checkpointing=true, or a higher zero",
        )
    # torch's allocator for the host has no error type of its own (c10/core/impl/alloc_cpu.cpp).
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return OutOfHostMemory(
            f"out of host memory: {(str(error).splitlines() or ['MemoryError'])[0]}",
            where=str(log),
            fix="take a smaller batch.micro, activation_checkpointing=true, or a higher zero",
        )
    return explained(error, str(log)) if isinstance(error, Exception) else Fault.of(error, where=str(log))
