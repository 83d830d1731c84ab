"""Measure Halfstep on one GPU beside what a user would pick instead: python3 benchmarks/gpu.py --out DIR [--dry-run].

In under eight minutes, without a network: throughput, MFU and peak memory of the cases in gpu_cases.py, each timed in a
process of its own with nobody else on the GPU, in turn with the peers of peer_run.py; the first loss and the memory of
all twelve cells and the parity gate, untimed and beside each other; and where the time of a step goes. Writes
DIR/<device>.json after every process, and prints a table at the end. What does not fit into the time or the memory is
left out, and named. --dry-run does the same with nano models on a CPU: it proves the program and says nothing of a GPU.
"""

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import breakdown, gpu_cases, gpu_device, gpu_report, gpu_rows
from benchmarks.gpu_cases import Case, Task
from halfstep.launcher import topology
from halfstep.launcher.config.load import load
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.forecast import hardware
from halfstep.launcher.plan.decide import decide
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import environment
from halfstep.launcher.system import assets, machine

ROOT = Path(__file__).resolve().parents[1]
BUDGET, DRY_BUDGET = 460.0, 170.0
"""Seconds for everything."""
PROFILED_STEPS = 3
_RESERVE = 5.0
"""Seconds before the end after which nothing is started."""
_PATIENCE = 120.0
"""Seconds after which a process that should long have ended is."""
_SETTLE = 10.0
"""Seconds that a GPU has to be free again after a process."""
_GATE_ONLY = ("world_size=1", "zero=1", "precision=bf16", "family=gpt2", "optimizer=adamw")
"""Of the gate, what a dry run runs."""


class Bench:
    """One measurement: what is left of the time, and the results so far."""

    def __init__(self, out: Path, scratch: Path, device: gpu_device.Device, *, dry: bool, budget: float) -> None:
        self._scratch, self._device, self._dry = scratch, device, dry
        self._began = time.monotonic()
        self._deadline = self._began + budget
        self._file = out / (f"dry-run-{device.slug}.json" if dry else f"{device.slug}.json")
        self._seen: dict[tuple[str, str], float] = {}
        """Seconds that a task took when it was run before."""
        self._plans: dict[str, dict[str, Any]] = {}
        """What was timed of ours, by case."""
        self._started = 0
        self.result: dict[str, Any] = {
            "dry_run": dry,
            "device": device.name,
            "driver": device.driver,
            "memory_bytes": device.memory_bytes,
            "cores": machine.usable_cores(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "revision": environment.code_revision(),
            "versions": environment.versions(),
            "rows": [],
            "cells": [],
            "breakdowns": [],
            "skipped": [],
        }

    def run(self, tasks: list[Task]) -> None:
        """Run the tasks that fit, in their order."""
        self._write_corpus()
        for task in tasks:
            reason = self._why_not(task)
            if reason is None:
                began = time.monotonic()
                {"proof": self._prove, "profile": self._profile}.get(task.kind, self._time)(task)
                self._seen[task.kind, task.case.name if task.case else ""] = time.monotonic() - began
            else:
                self.result["skipped"].append({"what": task.name, "reason": reason})
            self._write()
            self._say(f"{task.name}: {reason or 'done'}")

    @property
    def _left(self) -> float:
        return self._deadline - _RESERVE - time.monotonic()

    def _expected(self, task: Task) -> float:
        return self._seen.get((task.kind, task.case.name if task.case else ""), task.seconds)

    def _why_not(self, task: Task) -> str | None:
        """Say why a task is left out: the time, another's plan, or the memory; None where it is not."""
        expected = self._expected(task)
        if expected > self._left:
            return f"{max(0.0, self._left):.0f} s are left, it takes about {expected:.0f}"
        if task.case is None:
            return None
        try:
            plan = self._plan(task.case)
        except HalfstepError as error:
            return f"it cannot be planned: {error.what}"
        if task.kind == "ours" and plan.memory["verdict"] == "does not fit":
            peak, size = plan.memory["predicted_peak_bytes"], plan.memory["capacity_bytes"]
            return f"its plan needs {peak / 2**30:.1f} GiB of {size / 2**30:.1f}"
        same = self._planned_alike(task.case, plan) if task.kind == "ours" else None
        return f"its plan is that of {same}" if same else None

    def _planned_alike(self, case: Case, plan: Plan) -> str | None:
        """Return a case that was timed and whose plan does the same, though it was asked for in other terms."""
        does = _doing(plan)
        return next((name for name, other in self._plans.items() if other == does and name != case.name), None)

    # processes

    def _words(self, case: Case) -> list[str]:
        command = [*case.run_keys(), f"data={self._scratch / 'corpus'}"]
        # In some containers the driver does not say what the GPU is.
        named = hardware.described(self._device.name)
        return command + (
            [f"hardware={named.name}"] if named and self._device.index and not machine.device_name() else []
        )

    def _plan(self, case: Case) -> Plan:
        kind = "cuda" if self._device.index else "cpu"
        world = dataclasses.replace(topology.describe(1, 1), accelerator=kind)
        return decide(load(self._words(case)), world, on_this_host=True)

    def _environment(self) -> dict[str, str]:
        numbered = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in numbered}
        kept |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        # The first start compiles, as on any new machine; those after it do not.
        kept |= {name: str(self._scratch / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        return kept | (
            {"CUDA_VISIBLE_DEVICES": self._device.index} if self._device.index else {"DS_ACCELERATOR": "cpu"}
        )

    def _start(self, command: list[Any], log: Path) -> subprocess.Popen:
        with log.open("ab") as sink:
            return subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=sink,
                stderr=sink,
                env=self._environment(),
                cwd=ROOT,
                start_new_session=True,  # ended as a whole where the time is over
            )

    def _finish(self, process: subprocess.Popen, task: Task | None = None) -> str | None:
        """Wait as long as there is time, and no task several times as long as expected; return what went wrong."""
        # A dry run may share its cores with anything.
        patience = self._left if self._dry else max(_PATIENCE, 4 * self._expected(task) if task else 0)
        try:
            code = process.wait(timeout=max(1.0, min(self._left, patience)))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "it was not done in its time"
            raise
        return None if code == 0 else f"exit code {code}"

    def _alone(self) -> str | None:
        """Say who is on the GPU that should be free; what a process held may go a moment after it."""
        until = time.monotonic() + _SETTLE
        while (strangers := self._device.strangers()) is not None and time.monotonic() < until:
            time.sleep(0.5)
        return strangers

    def _write_corpus(self) -> None:
        count = gpu_cases.DRY_CORPUS_TOKENS if self._dry else gpu_cases.CORPUS_TOKENS
        command = [ROOT / "benchmarks" / "random_corpus.py", self._scratch / "corpus", count, self._tokens_below]
        log = self._scratch / "corpus.log"
        problem = self._finish(self._start(command, log))
        if problem:
            raise SystemExit(f"the corpus cannot be written: {problem}\n{gpu_rows.last_lines(log)}")

    @property
    def _tokens_below(self) -> int:
        return gpu_cases.DRY_VOCABULARY if self._dry else gpu_cases.VOCABULARY

    # tasks

    def _time(self, task: Task) -> None:
        """Time one process and add its row."""
        case, out = task.case, self._folder(task.name)
        assert case is not None, "only the proof has no case"
        row = {"case": case.name, "who": task.kind, "micro": case.micro, "sequence": case.sequence, "zero": case.zero}
        row |= {"model": case.model, "precision": case.precision}
        if strangers := self._alone():
            self._skip(task, f"the GPU is not free: {strangers}")
            return
        began = time.time()
        log = out / "log"
        if task.kind == "ours":
            self._plans[case.name] = _doing(self._plan(case))
            problem = self._finish(
                self._start([assets.train_script(), *self._words(case), f"out={out / 'run'}"], log), task
            )
            row |= gpu_rows.of_run(out / "run", case, began)
        else:
            plan, job, result = self._plan(case), out / "job.json", out / "result.json"
            job.write_text(json.dumps(self._peer_job(task.kind, case, plan, result)))
            problem = self._finish(self._start([ROOT / "benchmarks" / "peer_run.py", job], log), task)
            row |= gpu_rows.of_peer(result, case, plan, began)
        if strangers := self._alone():
            self._skip(task, f"not counted, the GPU was shared: {strangers}")
            return
        if row["outcome"] is None:
            row |= {"outcome": problem or "it left no result", "detail": gpu_rows.last_lines(log)}
        self.result["rows"].append(row)

    def _peer_job(self, who: str, case: Case, plan: Plan, result: Path) -> dict[str, Any]:
        names = ("micro", "sequence", "zero", "precision")
        return {
            **{name: getattr(case, name) for name in names},
            "who": who,
            "config": plan.model.config,
            "steps": case.warmup + case.steps,
            "tokens_below": self._tokens_below,
            "compiler": "aot_eager" if self._dry else "inductor",
            "result": str(result),
        }

    def _profile(self, task: Task) -> None:
        """Run a case once more with the profiler over its last steps and add where their time goes."""
        case, out = task.case, self._folder(task.name)
        assert case is not None, "only the proof has no case"
        short = [f"steps={case.warmup + PROFILED_STEPS}", f"out={out / 'run'}"]
        command = [word for word in self._words(case) if not word.startswith("steps=")]
        trace, log = out / "trace.json", out / "log"
        script = ROOT / "benchmarks" / "profile_run.py"
        problem = self._finish(self._start([script, trace, PROFILED_STEPS, *command, *short], log), task)
        if problem or not trace.exists():
            self._skip(task, f"{problem or 'no trace was written'}: {gpu_rows.last_lines(log)}")
            return
        spent = breakdown.of_trace(json.loads(trace.read_text()), PROFILED_STEPS)
        step = gpu_report.median_step(self.result["rows"], case.name, "ours")
        self.result["breakdowns"].append({"case": case.name, **spent.to_dict(step if self._device.index else None)})

    def _prove(self, task: Task) -> None:
        """Run every cell's first steps and the parity gate, several at once: nothing here is timed."""
        cells, out = gpu_cases.cells(self._dry), self._folder("proof")
        gate_out, gate_log = out / "gate.json", out / "gate.log"
        only = [word for choice in _GATE_ONLY for word in ("--only", choice)] if self._dry else []
        with gate_out.open("wb") as sink, gate_log.open("wb") as errors:
            gate = subprocess.Popen(
                [sys.executable, "-m", "halfstep", "verify", "--json", *only],
                stdout=sink,
                stderr=errors,
                env=self._environment(),
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            self._run_cells(cells, out)
        finally:
            problem = self._finish(gate)
        try:
            self.result["verify"] = json.loads(gate_out.read_text())
        except ValueError:
            self._skip(task, f"the parity gate: {problem or 'no result'}: {gpu_rows.last_lines(gate_log)}")

    def _run_cells(self, cells: list[Case], out: Path) -> None:
        waiting, width = list(cells), self._side_by_side(cells)
        while waiting:
            batch, waiting = waiting[:width], waiting[width:]
            started = []
            for case in batch:
                run = out / case.name
                command = [assets.train_script(), *self._words(case), f"out={run}"]
                started.append((case, run, self._start(command, out / f"{case.name}.log")))
            for case, run, process in started:
                problem = self._finish(process)
                row = {"cell": case.name, "zero": case.zero, "precision": case.precision, **gpu_rows.of_cell(run)}
                if problem:
                    row |= {"outcome": problem, "detail": gpu_rows.last_lines(out / f"{case.name}.log")}
                self.result["cells"].append(row)

    def _side_by_side(self, cells: list[Case]) -> int:
        """Return how many cells run at once: as many as have room, and cores to start on."""
        cores = max(1, machine.usable_cores() // 4)
        plans = [self._plan(case).memory for case in cells]
        largest = max(memory["predicted_high_bytes"] + memory["outside_bytes"] for memory in plans)
        room = int(0.8 * self._device.memory_bytes) // largest if self._device.memory_bytes else 2
        return max(1, min(4, cores, room))

    # records

    def _folder(self, name: str) -> Path:
        self._started += 1
        folder = self._scratch / f"{self._started:02d}-{name.replace(' ', '-')}"
        folder.mkdir()
        return folder

    def _skip(self, task: Task, reason: str) -> None:
        self.result["skipped"].append({"what": task.name, "reason": reason})

    def _write(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self._began, 1)
        self.result["ratios"] = gpu_report.ratios(self.result["rows"])
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n")
        partial.replace(self._file)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s  {text}", file=sys.stderr, flush=True)

    @property
    def file(self) -> Path:
        """Where the results are."""
        return self._file


def _doing(plan: Plan) -> dict[str, Any]:
    """Return what a plan does, whoever asked for it and how."""
    return {name: value for name, value in plan.to_dict().items() if name not in ("run_id", "identity", "origins")}


def main(given: list[str] | None = None) -> int:
    """Measure, write the file and print the table; exit code 1 where there is no GPU and no dry run was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for <device>.json")
    parser.add_argument("--dry-run", action="store_true", help="nano models on this CPU: no figure of a GPU")
    parser.add_argument(
        "--seconds", type=float, help=f"for everything (default {BUDGET:.0f}; a dry run {DRY_BUDGET:.0f})"
    )
    arguments = parser.parse_args(given)
    dry = arguments.dry_run
    device = gpu_device.Device(name=machine.cpu_model(), index="") if dry else gpu_device.first_gpu()
    if device is None:
        print("no GPU here: nothing was measured (--dry-run tries the program on a CPU)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="halfstep-gpu-") as scratch:
        budget = arguments.seconds or (DRY_BUDGET if dry else BUDGET)
        bench = Bench(arguments.out, Path(scratch), device, dry=dry, budget=budget)
        bench.run(gpu_cases.dry_tasks() if dry else gpu_cases.tasks())
    print("\n".join(gpu_report.table(bench.result)))
    print(f"\nwritten to {bench.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
