"""One training process from joining the others to its summary."""

import contextlib
import traceback
from pathlib import Path

from launcher import rundir
from launcher.engine import distributed
from launcher.engine.build import build
from launcher.engine.feed import Feed
from launcher.engine.loop import Listeners, train
from launcher.engine.witness import Witness
from launcher.errors import HalfstepError
from launcher.plan import present
from launcher.plan.resolve import Plan
from launcher.rundir import RunDir
from launcher.spec.load import Request
from launcher.topology import Rank


def run(path: Path, request: Request, plan: Plan, rank: Rank) -> int:
    """Train the plan in its run directory and return the exit code; every rank of the run calls this."""
    distributed.join(rank, plan)
    with contextlib.ExitStack() as held:

        def open_directory() -> RunDir | None:
            held.enter_context(rundir.lease(path))
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
            with where.rank_log(rank.rank).open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
            code = (
                error.exit_code
                if isinstance(error, HalfstepError)
                else 130
                if isinstance(error, KeyboardInterrupt)
                else 1
            )
            cause = error.what if isinstance(error, HalfstepError) else f"{type(error).__name__}: {error}"
            rundir.write_exit(where.attempt, code, cause, rank.rank)
            raise
        rundir.write_exit(where.attempt, 0, "done", rank.rank)
        distributed.leave()
    return 0


def _train(where: RunDir, plan: Plan, rank: Rank) -> None:
    distributed.quiet_deepspeed(where.rank_log(rank.rank))
    device = distributed.device(rank, plan)
    with Witness(where, plan, writes=rank.rank == 0) as witness:
        for line in [*present.headline(plan), f"run directory {where.path}", *present.warnings(plan)]:
            witness.screen.say(line)
        engine = build(plan, device)
        train(engine, plan, Feed(plan, rank, device), Listeners(step=witness.step, evaluation=witness.evaluation))
        if rank.rank == 0:
            witness.summarise()
