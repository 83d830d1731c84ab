"""Compare how long a save stops the loop: ours against DeepSpeed's own `engine.save_checkpoint`, of one engine.

    python benchmarks/save_stall.py [--model gpt2-124m] [--layers 6] [--zero 2] [--precision fp16] [--rounds 8]

Both save the same state of the same two processes to the same disk, in alternation and with training steps between
them. Ours stands still for writing and hashing and, at the end of the next step, for what syncing then still needs;
DeepSpeed's does not sync, hash or commit at all. Prints seconds per GB of what each writes and the ratio of the stalls,
with its spread. Target: at most 1.15.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Prepare a corpus, start two ranks, and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--zero", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="training steps after each save")
    parser.add_argument("--data", type=Path, help="a prepared corpus (default: the standard library's sources)")
    parser.add_argument("--disk", type=Path, help="where to save (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.disk) as scratch:
        data = arguments.data or Path(scratch) / "data"
        if arguments.data is None:
            prepare = ["data", "prepare", "--source", "stdlib", "--out", str(data), "--vocab-size", "4096"]
            subprocess.run([sys.executable, "-m", "halfstep", *prepare], cwd=ROOT, check=True)
        result = Path(scratch) / "result.json"
        job = {**vars(arguments), "data": str(data), "result": str(result), "scratch": scratch, "disk": None}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
        starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*starter, __file__, "--worker", json.dumps(job)], env=environment, check=True)
        _report(json.loads(result.read_text()))
    return 0


def _report(rounds: list[dict[str, float]]) -> None:
    for name in ("ours", "deepspeed"):
        per_gb = [pair[name] / (pair[f"{name}_bytes"] / 1e9) for pair in rounds]
        size = rounds[0][f"{name}_bytes"] / 1e9
        print(f"{name:>9}: {statistics.median(per_gb):.2f} s/GB of {size:.2f} GB, "
              f"stall {statistics.median(pair[name] for pair in rounds):.2f} s (median of {len(rounds)})")  # fmt: skip
    ratios = [pair["ours"] / pair["deepspeed"] for pair in rounds]
    per_gb = [(pair["ours"] / pair["ours_bytes"]) / (pair["deepspeed"] / pair["deepspeed_bytes"]) for pair in rounds]
    for what, values in (("of the stalls", ratios), ("of seconds per GB", per_gb)):
        low, _, high = statistics.quantiles(values, n=4)
        print(f"ratio {what}: {statistics.median(values):.3f} (quartiles {low:.3f} to {high:.3f})", flush=True)


def _worker(job: dict) -> None:
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.feed import Feed
    from halfstep.launcher.engine.loop import train
    from halfstep.launcher.engine.numerics import guard
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store
    from halfstep.launcher.engine.state import saving
    from halfstep.launcher.engine.training import Training
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve
    from halfstep.launcher.rundir import run_directory

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    keys = [f"model={job['model']}", f"model.layers={job['layers']}", f"data={job['data']}", "sequence=64",
             f"zero={job['zero']}", f"precision={job['precision']}", "batch.global=4", "batch.micro=2",
             "eval.every=0", "checkpoint.keep=2", "fp16.initial_scale_power=8"]  # fmt: skip
    steps = (2 * job["rounds"] + 1) * job["steps"]
    request = load([*keys, f"steps={steps}", f"out={job['scratch']}/run"])
    plan = resolve(request, topology.describe(2, 2), facts.read(request.spec))
    distributed.join(rank, plan, file_store(Path(job["scratch"]) / "store", rank))
    where = Path(job["scratch"]) / "run"

    def directory() -> str:
        run_directory.write_plan(where, request, plan)
        return run_directory.start_attempt(where, {}).attempt.name

    run = run_directory.RunDir(path=where, attempt=where / "attempts" / distributed.on_rank_zero(directory))
    engine, repairs = build(plan)
    own_guard = guard.Guard(engine, plan, repairs, lambda *_, **__: None, rank.rank)
    events: list[dict] = []
    saver = saving.Saver(
        engine, plan, run, own_guard,
        event=lambda kind, **more: events.append({"kind": kind, **more}),
        sync_records=lambda: None, beat=lambda: None, mark=lambda step: None,
    )  # fmt: skip
    feed = Feed(plan, rank, engine.device)
    rounds: list[dict[str, float]] = []
    theirs: dict[int, tuple[float, float]] = {}
    peer = Path(job["scratch"]) / "deepspeed"

    def step(record: object) -> None:
        number = record.step  # type: ignore[attr-defined]
        saver.finish()
        if number % job["steps"]:
            return
        distributed.gather_objects(None)
        if (number // job["steps"]) % 2:
            saver.begin(number, 1e-4)
            return
        begun = time.perf_counter()
        engine.save_checkpoint(str(peer), tag=f"step-{number}")
        seconds = max(distributed.gather_objects(time.perf_counter() - begun))
        size = sum(file.stat().st_size for file in (peer / f"step-{number}").iterdir())
        theirs[number] = (seconds, size)
        distributed.gather_objects(None)  # all have looked
        if rank.rank == 0:
            shutil.rmtree(peer / f"step-{number}")
        distributed.gather_objects(None)

    train(Training(engine=engine, plan=plan, feed=feed, guard=own_guard, evaluated=True, on_step=step))
    saver.finish()
    ours = [event for event in events if event["kind"] == "saved"]
    stalls = distributed.gather_objects([event["seconds"] for event in ours])
    for place, (event, (seconds, size)) in enumerate(zip(ours, theirs.values(), strict=False)):
        stall = max(own[place] for own in stalls)
        rounds.append({"ours": stall, "ours_bytes": event["bytes"], "deepspeed": seconds, "deepspeed_bytes": size})
    if rank.rank == 0:
        Path(job["result"]).write_text(json.dumps(rounds[1:]))  # the first of each pays for warming up
    distributed.leave()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(json.loads(sys.argv[2]))
        os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
    else:
        sys.exit(main())
