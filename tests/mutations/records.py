"""Readers of what a run leaves behind: its records, its checkpoints, its place in a study and in a queue."""

import contextlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fakes import studied
from mutations import mutate
from mutations.driver import Case, Reader, command, file_cases, same

from halfstep.launcher.metrics import numerics_history, numerics_report
from halfstep.launcher.parity import cases as gate_cases
from halfstep.launcher.parity import verdict
from halfstep.launcher.rundir import exits, goodput, lease, prediction_errors
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.study import report, report_data, sections
from halfstep.launcher.submit import inside, jobs, slurm
from halfstep.launcher.topology import Topology
from halfstep.launcher.watchdog import stalls

PARAMETERS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(7, dtype=np.float32)}
PROBE = np.arange(32, dtype=np.float32).reshape(16, 2)


def all_readers(folder: Path, corpus: Path) -> list[Reader]:
    """Return the readers of records, with what they read made in a folder."""
    where, run = _study(folder, corpus)
    return [
        *_of_run(run),
        *_of_study(where, run),
        _verdict(folder),
        _lease(run),
        _stalls(folder / "stalls"),
    ]


def _study(folder: Path, corpus: Path) -> tuple[Path, Path]:
    """Make a study of four finished runs; return its folder and one of the runs, with every record there is."""
    file = folder / "mine.toml"
    file.write_text(
        f'[base]\nmodel = "gpt2-nano"\ndata = "{corpus}"\nsteps = 6\n"batch.global" = 8\nsequence = 64\n'
        '[axes]\nzero = [1, 2]\nprecision = ["fp32", "fp16"]\n[seeds]\nvalues = [0]\n'
    )
    where = folder / "study"
    _, cells = studied.started(where, file)
    runs = [studied.finish(where, cell, 4.0, memory=1e9) for cell in cells]
    run = runs[-1]
    attempt = run / "attempts" / "0001"
    rows = [
        {"event": "start", "attempt": "0001", "steps_done": 0, "time": 1e9},
        {"event": "initialised", "checksum": "aa", "time": 1e9 + 0.1},
        {"event": "training", "time": 1e9 + 0.2},
        {"event": "repaired", "repairs": ["one"], "time": 1e9 + 0.3},
        {"event": "overflow", "step": 1, "first": [{"parameter": "w", "rank": 0}], "time": 1e9 + 1},
        {
            "event": "loss_not_finite",
            "step": 2,
            "ranks": [0],
            "first_activation": {"module": "m", "rank": 0},
            "time": 1e9,
        },
        {"event": "saved", "step": 3, "seconds": 0.5, "time": 1e9 + 3},
        {"event": "evaluated", "step": 6, "seconds": 0.5, "time": 1e9 + 6},
        {
            "event": "numerics",
            "step": 2,
            "scale": 8.0,
            "time": 1e9 + 2,
            "layers": {
                "h.0": {
                    "elements": 10,
                    "grad_max": 0.1,
                    "zero": 0.1,
                    "underflow_unscaled": 0.2,
                    "underflow_scaled": 0.0,
                }
            },
        },
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = json.loads((attempt / "env.json").read_text())
    env |= {"began": 1e9 - 1, "time": 1e9, "steps_done": 0, "environment": {"SLURM_JOB_ID": "", "RANK": "0"}}
    (attempt / "env.json").write_text(json.dumps(env))
    (run / "jobs.jsonl").write_text(json.dumps({"job": "12", "script": str(run / "job.sbatch"), "time": 1.0}) + "\n")
    (run / "starts.jsonl").write_text(
        json.dumps({"job": "", "start": "0", "newest": 0, "code": 137, "time": 1.0}) + "\n"
    )
    (run / "refused.json").write_text(json.dumps({"job": "9", "start": "0", "code": 2, "cause": "x", "time": 1.0}))
    (run / "outcome.json").write_text(json.dumps({"code": 0, "cause": "", "seconds": 1.0, "started": 1.0, "time": 2.0}))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"step_seconds": 0.064, "loss": 4.1, "eval_loss": 4.0, "communication_bytes": 1000}
    (run / "summary.json").write_text(json.dumps(summary))
    return where, run


# --- one run

RECORDS: tuple[tuple[str, Callable[[bytes, random.Random], mutate.Mutation]], ...] = (
    ("plan.json", mutate.of_json),
    ("summary.json", mutate.of_json),
    ("metrics.jsonl", mutate.of_rows),
    ("events.jsonl", mutate.of_rows),
    ("attempts/0001/env.json", mutate.of_json),
    ("attempts/0001/exit.json", mutate.of_json),
)


def _of_run(run: Path) -> list[Reader]:
    cases = file_cases(*((run / name, way) for name, way in (*RECORDS, ("jobs.jsonl", mutate.of_rows))))
    ends = file_cases(
        *((run / name, way) for name, way in (
            ("attempts/0001/env.json", mutate.of_json), ("attempts/0001/exit.json", mutate.of_json),
            ("refused.json", mutate.of_json), ("starts.jsonl", mutate.of_rows), ("summary.json", mutate.of_json),
        ))
    )  # fmt: skip
    scored = file_cases((run / "plan.json", mutate.of_json), (run / "summary.json", mutate.of_json))
    pair = file_cases(*((run / name, way) for name, way in RECORDS[:4]))
    planned = file_cases(
        (run / "plan.json", mutate.of_json),
        (run / "request.toml", mutate.of_toml),
        (run / "origins.json", mutate.of_json),
    )
    return [
        Reader(
            name="jobs",
            read=lambda case: _jobs(run),
            cases=cases,
            judge=lambda case, row: _judge_row(run, row),
            count=900,
        ),
        Reader(
            name="plan score",
            read=lambda case: prediction_errors.run(run),
            cases=scored,
            judge=lambda case, seen: _judge_score(run, seen),
            count=500,
        ),
        Reader(
            name="numerics",
            read=lambda case: _numerics(run),
            cases=pair,
            judge=lambda case, tree: _judge_numerics(run, tree),
            count=600,
        ),
        Reader(
            name="goodput",
            read=lambda case: goodput.of(run, now=1e9 + 30),
            cases=cases,
            judge=lambda case, seen: _judge_goodput(seen),
            count=500,
        ),
        Reader(
            name="inside end",
            read=lambda case: inside.main(["end", str(run), "75", ""]),
            cases=ends,
            judge=lambda case, code: _judge_end(run, code),
            count=500,
        ),
        Reader(
            name="how it ended",
            read=lambda case: (exits.read_exit(run / "attempts" / "0001"), exits.read_refusal(run)),
            cases=ends,
            judge=lambda case, pair: _judge_exit(run, pair),
            count=300,
        ),
        Reader(
            name="read_plan",
            read=lambda case: Run(run).require_as_asked()[1].to_dict(),
            cases=planned,
            judge=lambda case, tree: _judge_plan(run, tree),
            count=500,
        ),
    ]


def _jobs(run: Path) -> dict[str, Any]:
    slurm_queue = slurm.queue
    slurm.queue = lambda *_: []
    try:
        assert command(["jobs", str(run)]) == command(["jobs", "--json", str(run)]) == 0
        rows = jobs.survey([run])
    finally:
        slurm.queue = slurm_queue
    return rows[0].to_dict() if rows else {"state": "no plan"}


def _record(file: Path) -> Any:
    """Return another reading of a record: its object, None where there is no file, ValueError for what is none."""
    if not file.exists() and not file.is_symlink():
        return None
    if file.is_symlink() or not file.is_file():
        raise ValueError("no file")
    tree = mutate.parsed_json(file.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError("no object")
    return tree


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _judge_row(run: Path, row: dict[str, Any]) -> str | None:
    if row["state"] == "no plan":
        return None if not (run / "plan.json").is_file() else "a run with a plan is not listed"
    try:
        plan, summary = _record(run / "plan.json"), _record(run / "summary.json")
    except ValueError:
        return None if row["state"] == "damaged" else f"a damaged record is shown as {row['state']}"
    if row["state"] == "damaged":
        return None
    if plan is not None and row["steps"] != plan.get("steps"):
        return f"steps {plan.get('steps')!r} are shown as {row['steps']!r}"
    done = summary is not None and summary.get("status") == "done"
    if done != (row["state"] == "done"):
        return f"status {summary and summary.get('status')!r} is shown as {row['state']}"
    last = _last_step(run / "metrics.jsonl")
    if last is not None and (row["step"], row["loss"]) != (last.get("step"), last.get("loss")):
        return f"step {last.get('step')!r}, loss {last.get('loss')!r} are shown as {row['step']!r}, {row['loss']!r}"
    return None


def _last_step(file: Path) -> dict[str, Any] | None:
    if file.is_symlink() or not file.is_file():
        return None
    for line in reversed(file.read_bytes()[-65536:].splitlines()):
        with contextlib.suppress(ValueError):
            row = mutate.parsed_json(line)
            if isinstance(row, dict) and "loss" in row:
                return row
    return None


def _judge_score(run: Path, seen: prediction_errors.Comparison) -> str | None:
    plan, summary = _record(run / "plan.json"), _record(run / "summary.json")
    time, memory = plan.get("time") or {}, plan.get("memory") or {}
    expected = {
        "predicted_step_seconds": time.get("step_seconds"),
        "measured_step_seconds": summary.get("step_seconds"),
        "predicted_peak_bytes": memory.get("predicted_peak_bytes"),
        "measured_peak_bytes": summary.get("peak_memory_bytes"),
        "measured_sent_bytes": summary.get("communication_bytes"),
    }
    for name, value in expected.items():
        if getattr(seen, name) != value or not _number(value):
            return f"{name}: {value!r} was read as {getattr(seen, name)!r}"
    if seen.cell != f"zero={plan['zero']} precision={plan['precision']}":
        return f"the cell is {seen.cell}"
    for line in prediction_errors.table([seen]):
        assert "nan" not in line
    return None


def _numerics(run: Path) -> dict[str, Any]:
    seen = numerics_history.read(run)
    tree = numerics_history.to_dict(seen)
    json.dumps(tree, allow_nan=False)
    numerics_report.lines(seen)
    return tree


def _judge_numerics(run: Path, tree: dict[str, Any]) -> str | None:
    plan = _record(run / "plan.json")
    if plan is not None and (tree["planned_steps"], tree["precision"]) != (plan.get("steps"), plan.get("precision")):
        return f"plan.json says {plan.get('steps')!r} {plan.get('precision')!r}, not {tree['planned_steps']!r}"
    *whole, last = (run / "metrics.jsonl").read_bytes().split(b"\n")
    rows = [mutate.parsed_json(line) for line in [*whole, *([last] if _is_row(last) else [])]]
    steps = [row for row in rows if "eval_loss" not in row]
    if (tree["steps"], tree["loss_scale_last"]) != (steps[-1]["step"], steps[-1]["loss_scale"]):
        return f"the last row is {steps[-1]!r}"[:200]
    return None


def _judge_goodput(seen: goodput.Goodput) -> str | None:
    parts = [seen.productive_seconds, *seen.lost_seconds.values(), seen.wall_seconds]
    if not all(math.isfinite(item) and item >= -1e-6 for item in parts):
        return f"parts that are no times: {parts}"
    if not math.isclose(sum(parts[:-1]), parts[-1], rel_tol=1e-9, abs_tol=1e-3):
        return f"parts that do not add up: {parts}"
    share = seen.to_dict()["goodput"]
    return None if share is None or 0 <= share <= 1 + 1e-9 else f"goodput {share}"


def _judge_end(run: Path, code: int) -> str | None:
    """A job whose ranks end with 75 goes back to its queue, unless a record of this start has another end."""
    if code in (75, 76):  # 76: three starts that came no further, as starts.jsonl has it
        return None
    for file in (run / "refused.json", run / "attempts" / "0001" / "exit.json"):
        with contextlib.suppress(ValueError):
            seen = _record(file) or {}
            if seen.get("code") == code and code in (0, 2, 3):
                return None
    return f"it ends with {code}"


def _judge_exit(run: Path, pair: tuple[Any, Any]) -> str | None:
    for file, value in zip((run / "attempts" / "0001" / "exit.json", run / "refused.json"), pair, strict=True):
        if value is None:
            continue
        tree = _record(file)
        if tree is None or (value.code, value.cause) != (tree["code"], tree.get("cause", "")):
            return f"{file.name} says {tree!r}, not {value!r}"
    return None


def _judge_plan(run: Path, tree: dict[str, Any]) -> str | None:
    expected = mutate.parsed_json((run / "plan.json").read_bytes())
    known = {key: value for key, value in expected.items() if key in tree}
    shown = json.loads(json.dumps({key: tree[key] for key in known}))
    known = json.loads(json.dumps(known))
    different = [key for key in known if not same(known[key], shown[key])]
    return f"it was read otherwise: {different}" if different else None


# --- a study


def _of_study(where: Path, run: Path) -> list[Reader]:
    files = [
        (run / name, way) for name, way in (*RECORDS, ("proof.json", mutate.of_json), ("outcome.json", mutate.of_json))
    ]
    once = file_cases(*files)
    itself = file_cases((where / "study.json", mutate.of_json))
    return [
        Reader(
            name="study report",
            read=lambda case: _report(where),
            cases=once,
            judge=lambda case, tree: _judge_report(where, run, tree),
            count=700,
            some=10,
        ),
        Reader(
            name="study.json",
            read=lambda case: _report(where),
            cases=itself,
            judge=lambda case, tree: _judge_study(where, tree),
            count=500,
            some=10,
        ),
        Reader(name="study status", read=lambda case: command(["study", "status", str(where)]), cases=once, count=400),
        Reader(name="study pages", read=lambda case: _pages(where), cases=once, count=60, some=1),
    ]


def _report(where: Path) -> dict[str, Any]:
    made = sections.make(where)
    report_data.as_csv(made)
    report.markdown(made, {})
    report.html(made, {})
    return json.loads(report_data.as_json(made))


def _pages(where: Path) -> None:
    """Write everything, pictures too, which takes a second."""
    assert command(["study", "report", str(where)]) == 0
    json.loads((where / "results.json").read_text())


def _judge_report(where: Path, run: Path, tree: dict[str, Any]) -> str | None:
    (row,) = [item for item in tree["runs"] if item["run"] == str(run.relative_to(where))]
    if row["status"] != "done":
        return None if row["reason"] or row["status"] in ("missing", "stopped") else f"{row['status']} without a reason"
    summary = _record(run / "summary.json")
    for key in ("tokens_per_second", "peak_memory_bytes", "wall_seconds", "skipped_steps"):
        if row[key] != summary.get(key) or not _number(row[key]):
            return f"{key}: {summary.get(key)!r} is reported as {row[key]!r}"
    rows = [mutate.parsed_json(line) for line in (run / "metrics.jsonl").read_bytes().splitlines() if _is_row(line)]
    losses = [item["loss"] for item in rows if "eval_loss" not in item]
    evaluations = [item["eval_loss"] for item in rows if "eval_loss" in item]
    if not math.isclose(row["loss"] or 0.0, losses[-1] or 0.0, rel_tol=1e-12) or row["eval_loss"] != evaluations[-1]:
        return f"losses {losses[-1]!r} and {evaluations[-1]!r} are reported as {row['loss']!r} and {row['eval_loss']!r}"
    return None


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(mutate.parsed_json(line), dict)
    except ValueError:
        return False


def _judge_study(where: Path, tree: dict[str, Any]) -> str | None:
    about = mutate.parsed_json((where / "study.json").read_bytes())
    if tree["reference"] != about["study"]["reference"] or len(tree["runs"]) != len(about["cells"]):
        return "it was read otherwise"
    for row, cell in zip(tree["runs"], about["cells"], strict=True):
        if (row["values"], row["seed"], row["run"]) != (cell["values"], cell["seed"], cell["run"]):
            return f"the cell {cell!r} was read as {row!r}"[:200]
        if row["run"] and not (where / row["run"]).resolve().is_relative_to(where.resolve() / "runs"):
            return f"{row['run']} lies outside"
    return None


# --- what is kept elsewhere


def _verdict(folder: Path) -> Reader:
    here = Topology(world_size=1, ranks_per_node=1, accelerator="cpu")
    case = {"zero": 2, "precision": "bf16", "accumulation": 1, "clip": 1.0, "world_size": 1, "optimizer": "adamw",
            "family": "gpt2", "activation_checkpointing": False, "offload": "none",
            "compile": False, "fused_head": False, "keep_fp32": [],
            "documents": "plain", "lora": [], "keys": [],
            "config": "", "router_loss": None}  # fmt: skip
    assert set(case) == set(gate_cases.Case.__dataclass_fields__)
    file = folder / "verdict.json"
    file.write_text(
        json.dumps({"conditions": {}, "time": 1.0, "cells": [{**case, "ok": True}, {**case, "zero": 3, "ok": False}]})
    )
    cases = file_cases((file, mutate.of_json))

    def ask(_: Case) -> Any:
        kept, verdict.file = verdict.file, lambda here: file
        try:
            return verdict.read(here), verdict.proved(here, [case])
        finally:
            verdict.file = kept

    def judge(_: Case, seen: Any) -> str | None:
        cells, proved = seen
        known = _record(file)["cells"] if cells else []
        if any(cell not in known for cell in cells):
            return "it made cells up"
        text = json.dumps(case, sort_keys=True)
        ours = [cell for cell in cells if json.dumps({key: cell.get(key) for key in case}, sort_keys=True) == text]
        return None if proved == (ours[-1]["ok"] if ours else None) else f"proved is {proved}, cells are {ours}"[:200]

    return Reader(name="verdict", read=ask, cases=cases, judge=judge, count=400)


def _lease(run: Path) -> Reader:
    file = run / "lease"
    file.write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "since": 1.0, "launch": None, "job": None, "start": "0"})
    )
    cases = file_cases((file, mutate.of_json))

    def judge(_: Case, holder: Any) -> str | None:
        if holder is None:
            return None
        return None if holder == _record(file) else f"{holder!r} is not what it says"[:200]

    reader = Reader(name="lease", read=lambda case: lease.holder(run), cases=cases, judge=judge, count=400)
    content = file.read_bytes()
    file.unlink()

    def only_here(draw: random.Random) -> Case:
        """The other readers find no lease."""
        file.write_bytes(content)
        case = cases(draw)

        def undo() -> None:
            mutate.remove(file)

        return Case(what=case.what, apply=case.apply, undo=undo, given=case.given)

    reader.cases = only_here
    return reader


def _stalls(attempt: Path) -> Reader:
    attempt.mkdir()
    for rank in (0, 1):
        stalls.write(
            attempt,
            stalls.Report(rank=rank, host="n1", pid=5, phase="step", step=3, count=7, process_state="S", seconds=61.0),
        )
    cases = file_cases((attempt / "stall-rank-1.json", mutate.of_json))

    def name(_: Case) -> Any:
        seen = stalls.read(attempt)
        return [item.rank for item in stalls.culprits(seen)], str(stalls.stalled(stalls.culprits(seen), "here"))

    return Reader(name="stall reports", read=name, cases=cases, count=300)
