"""Train one model: the table of contents of a training process.

deepspeed launcher/train.py [RUN.toml] key=value ... [--ds-config FILE]
deepspeed launcher/train.py --run DIR        (also under torchrun, accelerate launch, srun, or plain python)
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a script, Python puts launcher/ itself on the path, where our names would shadow others' modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launcher import rundir, topology
from launcher.errors import HalfstepError, RequestError, TopologyError
from launcher.plan import facts
from launcher.plan.resolve import Plan, resolve
from launcher.spec.load import Request, load


def decide(words: list[str], rank: topology.Rank) -> tuple[Path, Request, Plan]:
    """Return the run directory, the request and the plan: read from `--run DIR`, or worked out from the words."""
    if words[:1] == ["--run"]:
        if len(words) != 2:
            raise RequestError(
                "--run takes one run directory and nothing else", where="the command line", fix="--run DIR"
            )
        path = Path(words[1]).absolute()
        request, plan = rundir.read_plan(path)
    else:
        request = load(words)
        world = topology.describe(rank.world_size, rank.local_world_size)

        def count_parameters(config: dict) -> int:
            from launcher.engine.build import count_parameters

            return count_parameters(config)

        plan = resolve(request, world, facts.read(request.spec, count_parameters))
        path = rundir.location(request, plan)
    asked = (request.spec.nodes or 1) * request.spec.gpus_per_node if request.spec.gpus_per_node else None
    for planned in (plan.topology.world_size, asked):
        if planned is not None and planned != rank.world_size:
            raise TopologyError(
                f"{rank.world_size} ranks were started, {planned} were planned",
                where=f"the environment set by {rank.source}, and nodes x gpus_per_node or plan.json",
                fix=f"start {planned} ranks, or plan for {rank.world_size}",
            )
    plan.require_allowed()
    return path, request, plan


def main(words: list[str]) -> int:
    """Run one training process and return its exit code."""
    if "-h" in words or "--help" in words:
        print(__doc__ + "\n`halfstep plan --help` lists the run keys.")
        return 0
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank")) and word != "--debug"]
    rank = topology.Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, source="none")
    try:
        rank = topology.from_environment()
        topology.prepare_environment(rank)
        path, request, plan = decide(words, rank)
        from launcher.engine import session  # torch and DeepSpeed from here on

        return session.run(path, request, plan, rank)
    except HalfstepError as error:
        if "--debug" in sys.argv:
            raise
        if rank.local_rank == 0:  # the others of this host have the same to say
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    if code:
        os._exit(code)  # a rank that failed must not wait for the others while Python takes its process group down
