"""One rank of the sweep: take families through plan, training, resume, export and generation, many in one start.

torchrun ... tests/models/sweep_rank.py JOB.json     (rank 0 writes a line of JSON for each family)

What `launcher/train.py` does once in a process is done here again and again; below it is the code that trains.
"""

import gc
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch.distributed as dist
import transformers

from halfstep.launcher import topology
from halfstep.launcher.checkpoint import store
from halfstep.launcher.checkpoint.manifest import read
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.engine import attempt as attempt_page
from halfstep.launcher.engine.attempt import Attempt
from halfstep.launcher.engine.loop import train
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.ranks.places import file_store
from halfstep.launcher.engine.state import restoring
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.export.generate import generate
from halfstep.launcher.export.write_export import export
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.rundir.run_directory import RunDir

STEPS = 3
WORDS = ["sequence=48", "batch.global=4", "batch.micro=2", "checkpoint.every=2", "eval.every=0", "eval.sequences=2"]
PRECISIONS = ("fp32", "bf16", "fp16")
CLOSE = {"fp32": 1e-6, "bf16": 3e-3, "fp16": 3e-4}
"""How far the loss of an export may be from that of the run, relatively, in the coarser precision of the two."""


def cells(place: int) -> tuple[tuple[int, str], ...]:
    """Return two (stage, precision) of a family: stage 3 and another, so that every pair comes up every 18 families."""
    first, second = (place % 3, PRECISIONS[place // 3 % 3]), (3, PRECISIONS[(place + 1 + place // 9) % 3])
    return (first, second) if place // 3 % 2 == 0 else (second, first)


class Sweep:
    """What all families share."""

    def __init__(self, job: dict[str, Any], rank: topology.Rank) -> None:
        self.rank, self.home, self.data = rank, Path(job["home"]), job["data"]
        self.world = topology.describe(rank.world_size, rank.local_world_size)
        self.engines: list[Any] = []
        build = attempt_page.build

        def build_and_keep(plan: Plan) -> Any:
            engine, repairs = build(plan)
            self.engines.append(engine)
            return engine, repairs

        attempt_page.build = build_and_keep

    def plan(self, *keys: str) -> tuple[Request, Plan]:
        """Plan as every rank does."""
        request = load([*WORDS, f"data={self.data}", *keys])
        plan = resolve(request, self.world, facts.read(request.spec))
        plan.require_allowed()
        return request, plan

    def train(self, request: Request, plan: Plan, path: Path) -> dict[str, Any]:
        """Run one attempt in a run directory, from its newest checkpoint if there is one; return what it left."""
        choice = restoring.choose(path, plan, self.rank.rank, lambda: None)

        def start() -> str:
            run_directory.write_plan(path, request, plan)
            return run_directory.start_attempt(path, {}, steps_done=choice.step).attempt.name

        where = RunDir(path=path, attempt=path / "attempts" / distributed.on_rank_zero(start))
        stub = SimpleNamespace(mark=lambda *_: None, touch=lambda: None, set_timeout=lambda _: None, asked=None)
        given: dict[str, Any] = {"choice": choice, "stop": stub, "heartbeat": stub}
        try:
            with attempt_page.prepared(Attempt(where=where, plan=plan, rank=self.rank, **given)) as training:
                train(training)
        finally:
            while self.engines:
                self.engines.pop().destroy()
            gc.collect()
        rows = [json.loads(line) for line in where.metrics.read_text().splitlines()]
        events = [json.loads(line) for line in where.events.read_text().splitlines()]
        return {
            "losses": [row["loss"] for row in rows if "loss" in row],
            "routers": [row["router_loss"] for row in rows if "loss" in row],
            "norms": [row["grad_norm"] for row in rows if "loss" in row],
            "evaluations": [row["eval_loss"] for row in rows if "eval_loss" in row],
            "causal": next(event for event in reversed(events) if event["event"] == "causal"),
        }

    def files(self, path: Path, step: int) -> list[str]:
        """Return the hashes of a checkpoint's files, once all ranks are done with it."""
        dist.barrier()
        hashes = [file.xxh3 for file in read(store.home(path) / store.folder_name(step)).files]
        dist.barrier()
        return hashes

    def on_rank_zero(self, action: Any) -> Any:
        """Run something on rank 0 alone, in a process that has no GPU to share; others wait."""
        return distributed.on_rank_zero(action)


def run_twice(sweep: Sweep, row: dict[str, Any], name: str, keys: list[str], zero: int, precision: str) -> Path:
    """Train one cell of a family, resume from its middle, and note whether both came to the same bits."""
    path = sweep.home / f"{row['family']}-{name}"
    request, plan = sweep.plan(*keys, f"zero={zero}", f"precision={precision}", f"steps={STEPS}", f"out={path}")
    row["stage"] = f"train {name}"
    run = sweep.train(request, plan, path)
    last = sweep.files(path, STEPS)
    row[name] = {"zero": zero, "precision": precision, "parameters": plan.model.parameters, **run}
    row["stage"] = f"resume {name}"
    if sweep.rank.rank == 0:
        shutil.rmtree(store.home(path) / store.folder_name(STEPS))
    dist.barrier()
    again = sweep.train(request, plan, path)
    same = again["losses"] == run["losses"] and again["norms"] == run["norms"]
    row[name]["resumed"] = same and sweep.files(path, STEPS) == last
    row[name]["buffers"] = len(read(store.home(path) / store.folder_name(STEPS)).model["buffers"])
    return path


def take_through(sweep: Sweep, family: str, chosen: list[list[Any]], row: dict[str, Any]) -> None:
    """Take one family through everything; `row` says how far it came."""
    home = sweep.home / f"{family}-config"
    row["stage"] = "config"
    if sweep.rank.rank == 0:
        home.mkdir()
        (home / "config.json").write_text(json.dumps(tiny.config(family), default=str))
    dist.barrier()
    row["stage"] = "plan"
    path = run_twice(sweep, row, "fresh", [f"model=hf:{home}"], *chosen[0])
    row["stage"] = "export"
    exported = sweep.home / f"{family}-export"
    row["export"] = sweep.on_rank_zero(lambda: export(path, exported).compare)
    row["stage"] = "generate"
    row["generated"] = sweep.on_rank_zero(lambda: generate(exported, "def ", max_new_tokens=4).new_tokens)
    row["stage"] = "plan loaded"
    path = run_twice(sweep, row, "loaded", [f"model=hf:{exported}"], *chosen[1])
    row["stage"] = "export loaded"
    again = sweep.home / f"{family}-export-again"
    row["export_loaded"] = sweep.on_rank_zero(lambda: export(path, again, dtype="bf16").compare)
    row["stage"] = "done"


def main(job_file: Path) -> None:
    """Take the job's families through, one after another."""
    job = json.loads(job_file.read_text("utf-8"))
    rank = topology.from_environment()
    topology.prepare_environment(rank)
    sweep = Sweep(job, rank)
    request = load([*WORDS, "model=gpt2-nano", f"data={sweep.data}", "watch.startup=60", "watch.timeout=60"])
    meeting = file_store(job_file.with_suffix(f".{os.environ['MASTER_PORT']}"), rank)
    distributed.join(rank, resolve(request, sweep.world, facts.read(request.spec)), meeting)
    transformers.logging.disable_progress_bar()
    with Path(job["out"]).open("a", encoding="utf-8") as out:
        for family, chosen in job["families"]:
            row, began = {"family": family}, time.perf_counter()
            if rank.rank == 0:
                print(f"-- {family}", flush=True)
            try:
                take_through(sweep, family, chosen, row)
            except HalfstepError as error:  # on every rank alike
                row |= {"refused": error.what, "fix": error.fix, "code": error.exit_code}
            except Exception as error:
                row |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            row["seconds"] = round(time.perf_counter() - began, 2)
            if rank.rank == 0 or "error" in row:
                out.write(json.dumps({**row, "rank": rank.rank}, default=str) + "\n")
                out.flush()
            if "error" in row:
                os._exit(1)  # whoever fails alone leaves the others in a collective call: the rest needs a new start
            for folder in sweep.home.glob(f"{family}-*") if rank.rank == 0 else []:
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
    distributed.leave()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
