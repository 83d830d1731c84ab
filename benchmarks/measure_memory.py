"""Measure the resident memory of real CPU runs against what the planner predicted: `make measure`.

Every row is a run of two DeepSpeed ranks, started as a user starts it. It keeps the workload it was made with, so that
`--score` predicts again, and `--fit` the constants of forecast/memory.py, without running again.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfstep.launcher.forecast import memory, workload
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system.machine import free_port
from halfstep.models.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory-cpu.json"
BIN = Path(sys.executable).parent

SIZES = {
    "gpt2-14m": "model=gpt2-nano model.layers=6 model.width=384 model.heads=6 model.vocabulary=8192",
    "gpt2-69m": "model=gpt2-nano model.layers=8 model.width=768 model.heads=12 model.vocabulary=16384",
    "gpt2-nano": "model=gpt2-nano",
    "gpt2-nano-4096": "model=gpt2-nano model.vocabulary=4096",
    "llama-119m": "model=llama-nano model.layers=8 model.width=1024 model.heads=16 model.vocabulary=24576",
}
GRID = ("gpt2-14m", "gpt2-69m", "llama-119m")
COMMON = "steps=4 eval.every=0 eval.sequences=2 checkpoint.every=0 checkpoint.at_end=false log.every=1"
CELLS = list(itertools.product(range(4), ("fp32", "bf16", "fp16")))


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield (kind, size, words) of every row: the grid of cells, then sweeps of batch, sequence and more."""
    for size, (zero, precision), checkpointing in itertools.product(GRID, CELLS, ("false", "true")):
        yield (
            "grid",
            size,
            f"zero={zero} precision={precision} activation_checkpointing={checkpointing} sequence=128 batch.global=2",
        )
    for precision, checkpointing in itertools.product(("fp32", "bf16"), ("false", "true")):
        cell = f"zero=2 precision={precision} activation_checkpointing={checkpointing}"
        for micro in (4, 8, 16):
            yield "batch", "gpt2-14m", f"{cell} sequence=128 batch.global={2 * micro} batch.micro={micro}"
        for sequence in (512, 1024, 2048):
            yield "sequence", "gpt2-14m", f"{cell} sequence={sequence} batch.global=2"
    for zero, precision in itertools.product(range(4), ("fp32", "bf16")):
        yield "nano", "gpt2-nano", f"zero={zero} precision={precision} sequence=64 batch.global=8 batch.micro=2"
    for zero, precision in CELLS:
        yield (
            "vocabulary",
            "gpt2-nano-4096",
            f"zero={zero} precision={precision} sequence=128 batch.global=32 batch.micro=8",
        )
    for zero in range(4):
        yield "accumulation", "gpt2-69m", f"zero={zero} precision=bf16 sequence=128 batch.global=8 batch.micro=1"
    for zero, offload in ((1, "optimizer-cpu"), (2, "optimizer-cpu"), (3, "optimizer-cpu"), (3, "cpu")):
        yield "offload", "gpt2-69m", f"zero={zero} precision=bf16 offload={offload} sequence=128 batch.global=2"


def measure(only: list[str]) -> None:
    """Run every case that has no row yet, in the order of `only`."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["size"], row["words"]) for row in rows}
    chosen = [case for text in only or [""] for case in cases() if text in " ".join(case)]
    with tempfile.TemporaryDirectory() as scratch:
        data = _data(Path(scratch))
        for kind, size, keys in dict.fromkeys(case for case in chosen if case[1:] not in done):
            row = _run(Path(scratch) / "run", data, kind, size, keys)
            if "failed" in row:
                print(f"FAILED {size} {keys}: {row['failed']}", flush=True)
                continue
            rows.append(row)
            _write(rows)
            print(
                f"{row['seconds']:5.0f} s  {row.get('peak_memory_bytes', 0) / 2**20:7.0f} MiB  {size} {keys}",
                flush=True,
            )


def _data(scratch: Path) -> Path:
    out = scratch / "data"
    arguments = ["data", "prepare", "--source", "stdlib", "--out", str(out), "--vocab-size", "512"]
    subprocess.run([BIN / "halfstep", *arguments], check=True, capture_output=True)
    return out


def _run(out: Path, data: Path, kind: str, size: str, keys: str) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    every = [*SIZES[size].split(), *COMMON.split(), *keys.split(), f"data={data}", f"out={out}"]
    port = f"--master_port={free_port()}"
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", port, str(ROOT / "launcher" / "train.py")]
    began = time.time()
    done = subprocess.run([*command, *every], cwd=ROOT, capture_output=True, text=True, env=_environment())
    row: dict[str, Any] = {"kind": kind, "size": size, "words": keys, "seconds": round(time.time() - began, 1)}
    if done.returncode:
        return {**row, "failed": (done.stdout + done.stderr)[-300:]}
    made = estimate.workload_of(Plan.from_dict(json.loads((out / "plan.json").read_text())))
    summary = json.loads((out / "summary.json").read_text())
    return {**row, "setting": dataclasses.asdict(made), "peak_memory_bytes": summary["peak_memory_bytes"]}


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LOCAL_SIZE", "RANK", "WORLD_SIZE")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def workloads_of(rows: list[dict[str, Any]]) -> list[workload.Workload]:
    """Return what every row was made with."""
    workloads = []
    for row in rows:
        tree = dict(row["setting"])
        scaling = tuple((key, value) for key, value in tree["shape"]["rope_scaling"])
        tree["shape"] = Shape(**{**tree["shape"], "rope_scaling": scaling})
        workloads.append(workload.Workload(**tree))
    return workloads


def fitted_on(row: dict[str, Any]) -> bool:
    """Tell whether the constants are fitted to a row; all others are only compared."""
    return "precision=fp16" not in row["words"] and (
        row["kind"] in ("nano", "accumulation", "batch") or (row["kind"] == "grid" and row["size"] == "gpt2-69m")
    )


def score() -> None:
    """Print each row's error, and the largest of every kind."""
    rows = json.loads(RESULTS.read_text())["rows"]
    errors: dict[str, list[float]] = {}
    for row, made in zip(rows, workloads_of(rows), strict=True):
        needed, seen = memory.forecast(made), row["peak_memory_bytes"]
        error = needed.peak_bytes / seen - 1
        half = " in fp16, as fp32 copies" if "precision=fp16" in row["words"] else ""
        part = "fitted on" if fitted_on(row) else f"held out, {row['kind']} of {row['size']}{half}"
        errors.setdefault(part, []).append(error)
        sizes = f"{needed.peak_bytes / 2**20:6.0f} predicted {seen / 2**20:6.0f} MiB seen"
        print(f"{100 * error:+6.1f} %  {sizes}  {needed.peak_at:<18}  {row['size']} {row['words']}")
    everything = [error for part in errors.values() for error in part]
    for part, values in [*errors.items(), ("all", everything)]:
        within = sum(abs(error) <= 0.05 for error in values)
        mean = statistics.fmean(map(abs, values))
        worst = max(values, key=abs)
        spread = f"mean {100 * mean:.1f} %, worst {100 * worst:+.1f} %"
        print(f"{part:<56} {within:3d} of {len(values):3d} within 5 %, {spread}")


def fit() -> None:
    """Print the constants of launcher/forecast/memory.py that fit the chosen rows best, in relative least squares."""
    import numpy

    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if fitted_on(row)]
    left, right = [], []
    for row, made in zip(rows, workloads_of(rows), strict=True):
        seen, tensors = row["peak_memory_bytes"], max(phase.bytes for phase in memory.phases_on(made))
        left.append([value / seen for value in (1, made.zero > 0, memory.heap_bytes(made))])
        right.append((seen - tensors) / seen)
    constants, *_ = numpy.linalg.lstsq(numpy.array(left), numpy.array(right), rcond=None)
    rank, sharded = (f"{value / 2**20:.0f} MiB" for value in constants[:2])
    print(f"{len(rows)} rows: CPU_RANK {rank}, CPU_RANK_SHARDED {sharded}, CPU_HEAP {constants[2]:.2f}")


def _write(rows: list[dict[str, Any]]) -> None:
    about = {"machine": _cpu(), "python": platform.python_version(), "torch": _version("torch")}
    about |= {"deepspeed": _version("deepspeed"), "ranks": 2, "metric": "VmHWM of the largest rank"}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(f'{{\n "about": {json.dumps(about)},\n "rows": [\n{lines}\n ]\n}}\n')


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="TEXT", action="append", default=[], help="run the cases whose description has it"
    )
    parser.add_argument("--score", action="store_true", help="compare the rows that are there with the forecast")
    parser.add_argument("--fit", action="store_true", help="fit the constants to the rows that are there")
    arguments = parser.parse_args()
    if arguments.fit:
        fit()
    else:
        if not arguments.score:
            measure(arguments.only)
        score()
