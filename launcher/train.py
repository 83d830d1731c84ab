"""Train one model: the table of contents of a training process.

deepspeed launcher/train.py [RUN.toml] key=value ... [--ds-config FILE]
torchrun ... launcher/train.py run=DIR       (--run DIR elsewhere; torchrun and accelerate take it for their own)
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # Started as a script, Python puts launcher/ itself on the path, where our names would shadow others' modules.
    sys.path[0] = next(str(f) for f in Path(__file__).resolve().parents if (f / "halfstep" / "__init__.py").is_file())

from halfstep.launcher import fault_injection, topology
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.plan.decide import decide as make_plan
from halfstep.launcher.plan.ds import packages
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import exits, run_directory, trust
from halfstep.launcher.rundir.records import Proof
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system import heap
from halfstep.launcher.system.files import explained
from halfstep.launcher.watchdog.heartbeat import begin
from halfstep.launcher.watchdog.stop import Stop

_PATIENCE = 5.0
"""Seconds for which a rank that leaves the telling to another one stays: the first that ends is the end of all."""


def decide(arguments: list[str], rank: topology.Rank) -> tuple[Path, Request, Plan]:
    """Return the run directory, the request and the plan: read from a run directory, or worked out from the words.

    A directory that others own or may write is not read from, nor written to, without consent.
    """
    consent, arguments = trust.CONSENT in arguments, [argument for argument in arguments if argument != trust.CONSENT]
    path = run_directory.named(arguments)
    if path is not None:
        trust.require_own(path, consent=consent)
        request, plan = Run(path).require_as_asked()
    else:
        request = load(arguments)
        world = topology.describe(rank.world_size, rank.local_world_size)
        plan = make_plan(request, world)
        path = run_directory.location(request, plan)
        trust.require_own(path, consent=consent)
    topology.check(rank, plan.topology.world_size, request.spec.nodes, request.spec.gpus_per_node)
    plan.require_allowed()
    try:
        packages.require(plan.deepspeed, plan.origins)  # a host that planned for others does not know what they have
    except HalfstepError as error:
        exits.write_refusal(path, error)  # torchrun and accelerate turn every code into 1
        raise
    return path, request, plan


def _stay(stop: Stop | None) -> bool:
    """Wait for whoever tells to end this rank, and say whether it did; the signal takes nothing from why it ends."""
    if stop is not None:
        stop.set_grace(0, lambda: None)  # or a signal would end it with the code of a stop, and a job begin again

    def told(number: int, frame: object) -> None:
        raise InterruptedError

    alone = False
    with contextlib.suppress(InterruptedError):
        signal.signal(signal.SIGTERM, told)
        time.sleep(_PATIENCE)
        alone = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return not alone


def _proof(plan: Plan) -> Proof:
    """Return what the parity gate knows here of a run, for its summary; no run ends because that cannot be said.

    Of an `hf:` model that takes a nano model, which no rank may make that is to train: where rank 0 alone had made one,
    the ranks of a mixture at stage 3 gathered in different orders.
    """
    if plan.model.name.startswith(("hf:", "run:")):
        return Proof(reason="the parity gate was not asked: `halfstep verify --run` does, with models of this family")
    from halfstep.launcher.parity.standing import standing

    try:
        stands = standing(plan)
    except (HalfstepError, OSError) as error:
        return Proof(reason=f"the parity gate could not be asked: {' '.join(str(error).split())}")
    return Proof(proved=stands.proved, reason=stands.reason)


def main(arguments: list[str]) -> int:
    """Run one training process and return its exit code."""
    if "-h" in arguments or "--help" in arguments:
        print(f"{__doc__}\n`halfstep plan --help` lists the run keys.")
        return 0
    arguments = [
        argument
        for argument in arguments
        if not argument.startswith(("--local_rank", "--local-rank")) and argument != "--debug"
    ]
    rank = topology.Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, source="none")
    stop = heartbeat = None
    try:
        rank = topology.from_environment()
        topology.prepare_environment(rank)
        path, request, plan = decide(arguments, rank)

        from halfstep.launcher.engine.ranks.doorway import Doorway  # needs no torch

        def leave_word(why: str) -> None:
            if rank.rank:  # who waits is rank 0, for all others
                Doorway(rank, trust.secret(path)).say_not_coming(why)

        stop, heartbeat = begin(rank.rank, plan.watch.startup, leave_word)
        fault_injection.hit("import", rank=rank.rank)
        if plan.topology.accelerator == "cpu":
            heap.settle()
        from halfstep.launcher.engine import session  # torch and DeepSpeed from here on

        code = session.run(path, request, plan, rank, stop, heartbeat, _proof(plan) if rank.rank == 0 else None)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is, this rank must end, or the others would wait for it
        if "--debug" in sys.argv:
            raise
        failure = explained(error, f"rank {rank.rank}, at the start")
        # Ranks of one host plan the same; who is still there after that was the only one.
        waits = failure.reported or (rank.local_rank and not heartbeat)
        ended_by_another = waits and _stay(stop)
        if not failure.reported and not ended_by_another:
            print(failure, file=sys.stderr, flush=True)
        code = failure.exit_code
    if heartbeat:
        heartbeat.end(code)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # Whatever the code: taking Python down beside threads of gloo or NCCL can wait for other ranks or abort (a thread
    # that wants Python's lock then ends the process: `terminate called without an active exception`).
    os._exit(code)
