"""Readers of what people and other programs write: run files, words, sites, hosts, tables, variables, SLURM's lists."""

import contextlib
import csv
import io
import json
import math
import random
import re
import subprocess
from pathlib import Path
from typing import Any

from mutations import mutate
from mutations.driver import Case, Reader, command, file_cases

from halfstep.launcher.config import task_file
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.load import load
from halfstep.launcher.config.schema import run_keys
from halfstep.launcher.forecast import hardware
from halfstep.launcher.forecast.published import score
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.study import study_file
from halfstep.launcher.submit import hostfile, render, site_file
from halfstep.launcher.submit.job import Job
from halfstep.launcher.tasks import task_rows
from halfstep.launcher.topology import Topology

WORLD = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
TASK = """\
name = "mine"
data = "asked.jsonl"
prompt = "Q: {text} {meta.n}"
reference = "{right}"
metrics = ["accuracy", "macro_f1"]
limit = 3
batch = 4
too_long = "cut"
[answer]
kind = "choices"
choices = ["a 0", "a 1"]
per_token = true
"""
RUN = """\
data = "{corpus}"
zero = 2
precision = "bf16"
steps = 10
seed = 3
sequence = 64
activation_checkpointing = true
[model]
name = "gpt2-nano"
dropout = 0.1
[batch]
global = 8
micro = 2
[optimizer]
lr = 1e-3
clip = 1.0
[schedule]
warmup = 2
kind = "cosine"
[checkpoint]
every = 5
keep = 2
[eval]
every = 5
[fp16]
window = 100
[ds]
wall_clock_breakdown = false
"zero_optimization.overlap_comm" = false
"""
STUDY = """\
exclude = [{{ zero = 0, precision = "fp16" }}]
[base]
model = "gpt2-nano"
data = "{corpus}"
steps = 6
"batch.global" = 8
sequence = 64
[axes]
zero = [0, 1]
precision = ["fp32", "fp16"]
policy = [{{ name = "small", "fp16.window" = 10 }}, {{ name = "large", "fp16.window" = 100 }}]
[seeds]
values = [0, 1]
[compare]
reference = {{ zero = 1, precision = "fp32", policy = "small" }}
price = 2.5
currency = "EUR"
[limits]
seconds = 60
"""
SITE = """\
description = "ours"
[slurm]
partition = "gpu"
account = "me"
time = "2:00:00"
signal = "USR1"
notice = 120
memory = "0"
exclusive = true
options = ["--reservation=x"]
[node]
gpus = 2
gpu_type = "a100"
cpus_per_task = 4
interface = "ib0"
[environment]
python = "/usr/bin/python3"
modules = ["cuda/12"]
setup = ["source /x/activate"]
forward = ["HF_HOME"]
variables = { NCCL_DEBUG = "WARN" }
shared = ["/"]
[container]
kind = "apptainer"
image = "/x.sif"
mounts = ["/a"]
"""
DEVICES = """\
[mine]
match = ["Mine 9"]
labels = ["mine-9"]
half = 1e14
fp32 = 1e13
bandwidth = 1e12
memory = 32e9
node = 4
"""
# What a plan has under another name than the run key that asks for it.
PLANNED = {"zero": "zero", "precision": "precision", "steps": "steps", "seed": "seed", "sequence": "sequence",
           "batch.global": "batch.global", "batch.micro": "batch.micro", "checkpoint.every": "checkpoint.every",
           "checkpoint.keep": "checkpoint.keep", "eval.every": "eval_every", "optimizer.clip": "clip"}  # fmt: skip


def all_readers(folder: Path, corpus: Path) -> list[Reader]:
    """Return the readers of what people write, with what they read made in a folder."""
    return [
        *_of_requests(folder, corpus),
        _study(folder, corpus),
        _task(folder),
        _site(folder, corpus),
        _hostfile(folder),
        _hardware(folder),
        _rows(folder),
    ]


def _plan(arguments: list[str]) -> dict[str, Any] | None:
    """Plan by the command, and return what it decides; None where it refuses."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = command(["plan", "--json", *arguments])
    if not out.getvalue():
        assert code in (2, 3), code
        return None
    tree = json.loads(out.getvalue(), parse_constant=lambda word: _fail(f"{word} in the plan"))
    assert code == (2 if tree["refused_by"] else 0), code
    return tree


def _fail(why: str) -> Any:
    raise AssertionError(why)


def _shows(asked: dict[str, Any], tree: dict[str, Any] | None) -> str | None:
    """Return which run key a plan does not have as it was asked; what is refused is not decided."""
    if tree is None or tree["refused_by"]:
        return None
    decided = flatten(tree)
    for key, place in PLANNED.items():
        if asked.get(key, "") != "" and not _equal(asked[key], decided[place]):
            return f"{key}={asked[key]!r} was planned as {decided[place]!r}"[:200]
    return None


def _equal(asked: Any, decided: Any) -> bool:
    if isinstance(asked, bool) != isinstance(decided, bool) and not isinstance(asked, str):
        return False
    if str(asked).strip() == str(decided):
        return True
    try:
        return float(asked) == float(decided)
    except (TypeError, ValueError, OverflowError):
        return False


# --- requests


def _of_requests(folder: Path, corpus: Path) -> list[Reader]:
    run_file = folder / "run.toml"
    run_file.write_text(RUN.format(corpus=corpus))
    config = folder / "ds.json"
    config.write_text(
        json.dumps(
            {
                "train_batch_size": 8,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000},
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            }
        )
    )
    base = ["model=gpt2-nano", f"data={corpus}", "batch.global=8", "sequence=64"]
    keys = sorted(key for key in run_keys() if key not in ("out", "data", "model.name", "model", "ds_config"))

    def arguments(draw: random.Random) -> Case:
        key = (
            draw.choice(keys)
            if draw.random() < 0.8
            else draw.choice(("ds.fp16.enabled", "ds.x", "ds.", "", "x", "ds.zero_optimization.stage"))
        )
        value = str(draw.choice((*mutate.TEXTS, *mutate.NUMBERS, "nan", "inf", "[1]", "{}", "[" * 5000))).replace(
            "\0", ""
        )
        return Case(what=f"{key}={value[:40]!r}", given=[*base, f"{key}={value}"])  # fmt: skip

    def judge_words(case: Case, tree: dict[str, Any] | None) -> str | None:
        key, _, value = case.given[-1].partition("=")
        return _shows({key: value}, tree)

    def judge_file(case: Case, tree: dict[str, Any] | None) -> str | None:
        if tree is None:
            return None
        asked = mutate.parsed_toml(run_file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        return "it is no TOML, and was planned" if asked is None else _shows(flatten(asked), tree)

    def judge_config(case: Case, tree: dict[str, Any] | None) -> str | None:
        if tree is None or tree["refused_by"]:
            return None
        asked, decided = flatten(json.loads(_json_of(config.read_bytes()))), flatten(tree["deepspeed"])
        wrong = [key for key, value in asked.items() if value is not None and decided.get(key, value) != value]
        return f"{wrong[0]} = {asked[wrong[0]]!r} became {decided[wrong[0]]!r}"[:200] if wrong else None

    given_config = [
        f"data={corpus}",
        "model=gpt2-nano",
        "sequence=64",
        "batch.global=8",
        "batch.micro=2",
        "zero=2",
        "precision=bf16",
    ]
    return [
        Reader(
            name="run file",
            read=lambda case: _plan([str(run_file)]),
            cases=file_cases((run_file, mutate.of_toml)),
            judge=judge_file,
            count=600,
        ),
        Reader(
            name="words of a request",
            read=lambda case: _plan(case.given),
            cases=arguments,
            judge=judge_words,
            count=800,
        ),
        Reader(
            name="DeepSpeed config",
            read=lambda case: _plan([*given_config, "--ds-config", str(config)]),
            cases=file_cases((config, mutate.of_json)),
            judge=judge_config,
            count=600,
        ),
    ]


def _json_of(content: bytes) -> str:
    """Return the text of a DeepSpeed file without what DeepSpeed's own reader allows beside JSON: a byte-order mark."""
    return content.decode("utf-8-sig")


# --- studies, sites, hosts, devices, tables


def _study(folder: Path, corpus: Path) -> Reader:
    file = folder / "cells.toml"
    file.write_text(STUDY.format(corpus=corpus))

    def judge(case: Case, study: study_file.Study) -> str | None:
        tree = mutate.parsed_toml(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if tree is None:
            return "it is no TOML, and was read"
        seeds, limit = tree.get("seeds", {}).get("values", [0]), tree.get("limits", {}).get("seconds", 0)
        if list(study.seeds) != seeds or study.limit != limit or len(study.axes) != len(flatten(tree.get("axes", {}))):
            return f"seeds {seeds!r} and limit {limit!r} were read as {study.seeds!r} and {study.limit!r}"
        base = flatten(tree.get("base", {}))
        return (
            None if study.base.get("steps") == base.get("steps") else f"steps were read as {study.base.get('steps')!r}"
        )

    return Reader(
        name="study file",
        read=lambda case: study_file.read(str(file)),
        cases=file_cases((file, mutate.of_toml)),
        judge=judge,
        count=500,
    )


def _task(folder: Path) -> Reader:
    file, data = folder / "task.toml", folder / "asked.jsonl"
    file.write_text(TASK)
    data.write_text(
        "".join(json.dumps({"text": f"q {n}", "right": f"a {n % 2}", "meta": {"n": n}}) + "\n" for n in range(4))
    )

    def judge(case: Case, pair: tuple[task_file.Task, list[task_rows.Example]]) -> str | None:
        task, rows = pair
        tree = mutate.parsed_toml(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if tree is None:
            return "it is no TOML, and was read"
        if (task.spec.name, list(task.spec.metrics), task.spec.limit) != (
            tree["name"],
            tree["metrics"],
            tree.get("limit"),
        ):
            return f"{tree['name']!r} by {tree['metrics']!r} was read as {task.spec.name!r} by {task.spec.metrics!r}"
        lines = [line for line in data.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
        wanted = min(len(lines), task.spec.limit or len(lines))
        return None if len(rows) == wanted else f"{wanted} rows were read as {len(rows)}"

    def read(case: Case) -> tuple[task_file.Task, list[task_rows.Example]]:
        task = task_file.read(file)
        return task, task_rows.read(task)

    return Reader(
        name="task file",
        read=read,
        cases=file_cases((file, mutate.of_toml), (data, mutate.of_rows)),
        judge=judge,
        count=500,
    )


def _site(folder: Path, corpus: Path) -> Reader:
    file = folder / "cluster.toml"
    file.write_text(SITE)
    request = load(["model=gpt2-nano", f"data={corpus}", "batch.global=8", "sequence=64"])
    plan = resolve(request, WORLD, facts.read(request.spec))

    def read(case: Case) -> tuple[site_file.Site, str]:
        chosen = site_file.read(str(file))
        text = render.script(Job(run=Path("/runs/one"), plan=plan, site=chosen))
        return chosen, text

    def judge(case: Case, pair: tuple[site_file.Site, str]) -> str | None:
        chosen, text = pair
        tree = mutate.parsed_toml(file.read_bytes())
        if tree is None:
            return "it is no TOML, and was read"
        shown = flatten(chosen.model_dump(mode="json", exclude_unset=True, exclude={"name"}))
        said = {key: value for key, value in flatten(tree).items() if value != {}}
        if {key: value for key, value in shown.items() if value != {}} != said:
            return f"{tree!r} was read as {shown!r}"[:200]
        setup = chosen.environment.setup
        injected = [line for line in text.splitlines() if line.lstrip().startswith(mutate.MARKER) and line not in setup]
        if injected:
            return f"a line of the script is {injected[0]!r}"
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        return None if done.returncode == 0 or setup else f"bash: {done.stderr[:100]}"

    return Reader(name="site", read=read, cases=file_cases((file, mutate.of_toml), kinds=False), judge=judge, count=600)


def _hostfile(folder: Path) -> Reader:
    file = folder / "hosts"
    file.write_text("# ours\nnode-1 slots=2\n10.0.0.2  slots = 2  # second\n\nnode-3.x slots=2\n")

    def judge(case: Case, seen: hostfile.Hosts) -> str | None:
        text = file.read_bytes().decode("utf-8")
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        expected = [re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)", line) for line in lines if line]
        if None in expected or [item[1] for item in expected if item] != list(seen.names):
            return f"the hosts were read as {seen.names!r}"
        slots = {int(item[2]) for item in expected if item}
        return None if slots == {seen.slots} else f"slots {slots} were read as {seen.slots}"

    return Reader(
        name="hostfile",
        read=lambda case: hostfile.read(file, None, None),
        cases=file_cases((file, mutate.of_lines)),
        judge=judge,
        count=500,
    )


def _hardware(folder: Path) -> Reader:
    own = folder / "config" / "halfstep" / "hardware.toml"
    own.parent.mkdir(parents=True)
    own.write_text(DEVICES)
    environ = {"XDG_CONFIG_HOME": str(folder / "config")}

    def read(case: Case) -> Any:
        rows = hardware.read_own(environ)
        return {name: hardware.find(name, rows) for name in rows}

    def judge(case: Case, devices: dict[str, hardware.Hardware]) -> str | None:
        if not own.exists():
            return None if not devices else "there is no table"
        tree = mutate.parsed_toml(own.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if tree is None or set(tree) != set(devices):
            return f"the devices were read as {list(devices)!r}"[:200]
        for name, device in devices.items():
            for key in ("half", "fp32", "bandwidth", "memory", "node"):
                value, expected = getattr(device, key), tree[name].get(key, hardware.Hardware(name="x").__dict__[key])
                if value != expected or (value is not None and not math.isfinite(value)):
                    return f"{key} = {expected!r} was read as {value!r}"[:200]
        return None

    return Reader(name="hardware table", read=read, cases=file_cases((own, mutate.of_toml)), judge=judge, count=400)


ROW = {
    "row_id": "a", "source": "bigscience-workshop/bigscience", "gpu": "A100-80GB", "n_gpus": "384",
    "model_params_B": "176", "layers": "70", "hidden": "14336", "heads": "112", "ffn": "57344", "vocab": "250k",
    "seq_len": "2048", "micro_batch": "2", "global_batch": "2048", "precision": "bf16",
    "sharding": "ZeRO-1 DP8 TP4 PP12", "activation_checkpointing": "full", "notes": "48 nodes x 8",
    "tokens_per_s_per_gpu": "100", "tflops_per_gpu": "150", "flops_convention": "96B", "mem_GB": "70",
}  # fmt: skip


def _rows(folder: Path) -> Reader:
    file = folder / "rows.csv"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROW), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        [ROW, {**ROW, "row_id": "b", "sharding": "FSDP FULL_SHARD", "model_params_B": "1.3", "n_gpus": "8"}]
    )
    file.write_text(text.getvalue())

    def way(content: bytes, draw: random.Random) -> mutate.Mutation:
        if draw.random() < 0.3:
            return mutate.of_bytes(content, draw)
        rows = list(csv.DictReader(io.StringIO(content.decode())))
        row, key = draw.choice(rows), draw.choice(list(ROW))
        row[key] = draw.choice(
            (
                *mutate.TEXTS,
                *map(str, mutate.NUMBERS),
                "9" * 5000,
                "TP0 PP0",
                "DP0",
                "TPxPP=0",
                "ZeRO-9",
                "0 nodes x 0",
                "1e308B",
            )
        )
        out = io.StringIO()
        writer = csv.DictWriter(out, list(ROW), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return f"{key} = {row[key][:40]!r}", out.getvalue().encode("utf-8", errors="surrogatepass")  # fmt: skip

    def judge(case: Case, seen: list[score.Prediction]) -> str | None:
        names = [row["row_id"].strip() for row in csv.DictReader(io.StringIO(file.read_bytes().decode(), newline=""))]
        if [item.row_id for item in seen] != names:
            return f"rows {names!r} were read as {[item.row_id for item in seen]!r}"[:200]
        numbers = [
            value for item in seen for value in (item.tokens_per_s_per_gpu, item.peak_memory_gib) if value is not None
        ]
        return None if all(math.isfinite(value) and value >= 0 for value in numbers) else f"predicted {numbers}"

    def read(case: Case) -> list[score.Prediction]:
        score.write(score.predict(file), folder / "out.csv")
        return score.predict(file)

    return Reader(name="published rows", read=read, cases=file_cases((file, way)), judge=judge, count=700)
