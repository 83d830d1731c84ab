"""Compare our training loop with the smallest DeepSpeed loop one can write, over the same model and batches.

    python benchmarks/overhead.py [--precision fp32 bf16] [--rounds 8] [--steps 24]

Both run in the same two processes, in alternation, so that the machine's load meets both. Prints, for each precision,
the median ratio of our tokens per second to the plain loop's, and its spread over the rounds. Target: at least 0.98.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 5
"""Steps before those that are measured. In the fifth Halfstep counts what is sent, once a run (engine/meter.py)."""


def main() -> int:
    """Prepare a corpus, start the ranks once for each precision, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--zero", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--model", default="gpt2-nano")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24, help="steps measured in each round")
    parser.add_argument("--data", type=Path, help="a prepared corpus (default: the standard library's sources)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or Path(scratch) / "data"
        if arguments.data is None:
            prepare = ["data", "prepare", "--source", "stdlib", "--out", str(data), "--vocab-size", "4096"]
            subprocess.run([sys.executable, "-m", "halfstep", *prepare], cwd=ROOT, check=True)
        for precision in arguments.precision:
            result = Path(scratch) / f"{precision}.json"
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            job = json.dumps({**vars(arguments), "data": str(data), "precision": precision, "result": str(result)})
            starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
            subprocess.run([*starter, __file__, "--worker", job], env=environment, check=True)
            _report(precision, json.loads(result.read_text()))
    return 0


def _report(precision: str, rounds: list[dict[str, float]]) -> None:
    ratios = [times["ours"] / times["plain"] for times in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{precision}: ratio {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}, "
        f"{len(ratios)} rounds); ours {statistics.median(r['ours'] for r in rounds):,.0f} tok/s, "
        f"plain {statistics.median(r['plain'] for r in rounds):,.0f} tok/s",
        flush=True,
    )
    assert low <= middle <= high


def worker(job: dict) -> None:
    """Run the rounds on one rank; rank 0 writes the throughputs."""
    from halfstep.launcher import topology

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    from halfstep.launcher.config.load import load
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve

    keys = [f"model={job['model']}", f"data={job['data']}", f"zero={job['zero']}", f"precision={job['precision']}"]
    steps = job["steps"] + WARMUP
    request = load([*keys, f"steps={steps}", "schedule.kind=constant", "eval.every=0"])
    world = topology.describe(rank.world_size, rank.local_world_size)
    plan = resolve(request, world, facts.read(request.spec))
    distributed.join(rank, plan, file_store(Path(f"{job['result']}.store"), rank))
    rounds = []
    for number in range(job["rounds"]):
        pair = {"ours": _ours, "plain": _plain}
        order = list(pair) if number % 2 == 0 else list(reversed(pair))
        rounds.append({name: pair[name](plan, rank) for name in order})
    if rank.rank == 0:
        Path(job["result"]).write_text(json.dumps(rounds))
    distributed.leave()


def _ours(plan, rank) -> float:
    """Return the tokens per second of Halfstep's loop, records written to a file as in a real run."""
    import tempfile as temporary

    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.feed import Feed
    from halfstep.launcher.engine.loop import train
    from halfstep.launcher.engine.numerics.guard import Guard
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.training import Training
    from halfstep.launcher.metrics.sinks import JsonLines

    device = distributed.device(rank, plan)
    moments: list[float] = []
    with temporary.NamedTemporaryFile() as file:
        sink = JsonLines(Path(file.name))

        def tell(record) -> None:
            sink.write(record)
            moments.append(time.perf_counter())

        engine, repairs = build(plan)
        guard = Guard(engine, plan, repairs, lambda kind, **details: None, rank.rank)
        train(Training(engine=engine, plan=plan, feed=Feed(plan, rank, device), guard=guard, on_step=tell))
    return _throughput(plan, moments)


def _plain(plan, rank) -> float:
    """Return the tokens per second of a loop with nothing in it but DeepSpeed, the model and the loss."""
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.feed import Feed
    from halfstep.launcher.engine.ranks import distributed

    device = distributed.device(rank, plan)
    stock = dataclasses.replace(plan, numerics=dataclasses.replace(plan.numerics, repairs=False))
    engine, _ = build(stock)
    feed = Feed(plan, rank, device)
    batches = [list(feed.micro_batches(step)) for step in range(1, plan.steps + 1)]
    engine.train()
    moments = []
    for step in batches:
        for batch in step:
            engine.backward(batch.loss(batch.logits(engine)))
            engine.step()
        moments.append(time.perf_counter())
    return _throughput(plan, moments)


def _throughput(plan, moments: list[float]) -> float:
    tokens = (len(moments) - WARMUP) * plan.batch.global_ * plan.sequence
    return tokens / (moments[-1] - moments[WARMUP - 1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
        os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
    else:
        sys.exit(main())
