"""Two ranks of an engine; in each of its groups rank 0 waits for rank 1, which does not come."""

import sys
import time

import torch
import torch.distributed as dist

from halfstep.launcher import topology
from halfstep.launcher.config.load import load
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.resolve import resolve

if __name__ == "__main__":
    rank = topology.from_environment()
    topology.prepare_environment(rank)
    request = load(sys.argv[1:])
    plan = resolve(request, topology.describe(2, 2), facts.read(request.spec))
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.preflight import RollCall

    distributed.join(rank, plan, RollCall(rank, plan, b"of this test").answer().store)
    engine, _ = build(plan)
    distributed.set_timeouts(1.0)
    groups = {"world": dist.group.WORLD, "data-parallel": engine.data_parallel_group}
    for name, group in groups.items():
        if rank.rank == 1:
            continue
        began = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=group)
            print(f"group {name}: joined?", flush=True)
        except RuntimeError as error:
            reason = "timed out" if "imed out" in str(error) else str(error)
            print(f"group {name}: {reason} after {time.monotonic() - began:.1f} s", flush=True)
    time.sleep(8 * rank.rank)  # rank 1 lives until rank 0 has given up on both
