"""The run directory: the one place where a run's request, plan, attempts and results meet, and its lease.

request.toml plan.json ds_config.json origins.json      what was asked and decided
metrics.jsonl events.jsonl summary.json                  what was seen
checkpoints/step-00000100/                               what a start goes on from
attempts/0001/{env.json,rank-0.log,exit.json}            every start, on what, and how it ended
lease                                                    held by the launch that is running
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from launcher import assets, topology
from launcher.errors import RequestError
from launcher.files import cannot_write, write_atomic, write_json
from launcher.lease import LEASE_FILES
from launcher.plan.plan import Plan
from launcher.spec.dotted import flatten, unflatten
from launcher.spec.load import Request, load

_VERSIONED = (
    "halfstep",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "sentencepiece",
    "numpy",
    "pydantic",
)
# What explains a run afterwards. Never the whole environment: it holds tokens and passwords.
_ENVIRONMENT = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
    "NCCL_DEBUG", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE", "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_PARTITION",
    "SLURM_NTASKS", "SLURM_NNODES", "SLURM_STEP_NODELIST",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """Paths of one run, and of its present attempt."""

    path: Path
    attempt: Path

    @property
    def metrics(self) -> Path:
        """One row per optimizer step, and one per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened besides steps."""
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        """The result."""
        return self.path / "summary.json"

    @property
    def stop_file(self) -> Path:
        """Whoever makes this file stops the run."""
        return self.path / "STOP"

    def rank_log(self, rank: int) -> Path:
        """What one rank of this attempt had to say."""
        return self.attempt / f"rank-{rank}.log"


def location(request: Request, plan: Plan) -> Path:
    """Return where a run lives: `out`, or runs/<run id> under the current folder."""
    return Path(request.spec.out) if request.spec.out else Path.cwd() / "runs" / plan.run_id


def named(words: Sequence[str]) -> Path | None:
    """Return the directory that `run=DIR` or `--run DIR` names, or None where the words are a request of their own."""
    words = [f"run={words[1]}", *words[2:]] if words[:1] == ["--run"] and len(words) > 1 else words
    if not words or not words[0].startswith(("run=", "--run")):
        return None
    directory = words[0].partition("=")[2]
    if len(words) > 1 or not directory:
        said = " ".join(words)
        raise RequestError("--run takes one run directory and no key=value words", where=said, fix="--run DIR")
    return Path(directory).absolute()


def write_plan(path: Path, request: Request, plan: Plan) -> None:
    """Write what was asked and decided; refuse a directory that belongs to a different run or to something else."""
    refuse_another_run(path, plan)
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)
        given = {
            key: value for key, value in flatten(request.spec.model_dump(by_alias=True)).items() if value is not None
        }
        asked = unflatten(
            {key: value for key, value in given.items() if key in request.origins or key.startswith("ds.")}
        )
        write_atomic(path / "request.toml", tomli_w.dumps(asked))
        write_json(path / "plan.json", plan.to_dict())
        write_json(path / "ds_config.json", plan.deepspeed)
        write_json(path / "origins.json", {"request": request.origins, "deepspeed": plan.origins})


def read_plan(path: Path) -> tuple[Request, Plan]:
    """Read a run directory that `write_plan` made."""
    try:
        plan = Plan.from_dict(json.loads((path / "plan.json").read_text("utf-8")))
        origins = json.loads((path / "origins.json").read_text("utf-8"))["request"]
        return Request(spec=load([str(path / "request.toml")]).spec, origins=origins), plan
    except OSError as error:
        raise RequestError(
            f"{path} is not a run directory: {Path(str(error.filename)).name} is missing or unreadable",
            where=f"--run {path}",
            fix="name a directory made by `halfstep run` or `launcher/train.py`",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"plan.json is damaged: {error}",
            where=str(path / "plan.json"),
            fix="start the run again with its key=value words",
        ) from None


def refuse_another_run(path: Path, plan: Plan) -> None:
    """Raise RequestError where a directory belongs to a different run, or is something else."""
    if not path.exists():
        return
    file = path / "plan.json"
    if not path.is_dir() or (not file.is_file() and not all(_is_ours(item.name) for item in path.iterdir())):
        raise RequestError(
            f"{path} exists and is not a run directory",
            where=f"out={path}",
            fix="choose an out that does not exist yet",
        )
    if not file.is_file():
        return
    _, there = read_plan(path)
    old, new = there.identity, plan.identity
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if changed:
        told = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:4])
        raise RequestError(
            f"{path} belongs to a different run: {told}"
            + (f", and {len(changed) - 4} more" if len(changed) > 4 else ""),
            where=f"out={path}",
            fix="choose another out (or none), or ask for the same run again",
        )


def _is_ours(name: str) -> bool:
    """Tell whether a start that was cut short may have left this file."""
    return name in LEASE_FILES or name.lstrip(".").startswith(
        ("plan.json", "request.toml", "ds_config", "origins.json")
    )


def start_attempt(path: Path, extra: Mapping[str, Any], *, steps_done: int = 0) -> RunDir:
    """Make the next attempts/NNNN with its env.json, and leave of the last attempt's results what goes on from here.

    Nothing is lost: rows of steps that will be done again, and a result that will be replaced, move into the folder of
    the attempt that made them. A start from step 1 also puts checkpoints out of the way, which would belong to another
    series.
    """
    attempts = path / "attempts"
    with cannot_write(path):
        attempts.mkdir(exist_ok=True)
        number = 1 + max((int(one.name) for one in attempts.iterdir() if one.name.isdigit()), default=0)
        attempt = attempts / f"{number:04d}"
        attempt.mkdir()
        previous = attempts / f"{number - 1:04d}"
        if not previous.is_dir():
            previous = attempt
        metrics = path / "metrics.jsonl"
        if steps_done and metrics.exists():
            _truncate(metrics, steps_done, previous / "metrics-redone.jsonl")
        for name in ("summary.json",) if steps_done else ("metrics.jsonl", "summary.json", "checkpoints"):
            if (path / name).exists():
                (path / name).replace(previous / name)
        write_json(attempt / "env.json", {**describe_environment(), **extra})
        shutil.copy(path / "plan.json", attempt / "plan.json")  # a later attempt may continue with another stage
    return RunDir(path=path, attempt=attempt)


def _truncate(metrics: Path, steps: int, redone: Path) -> None:
    """Cut a metrics file after the rows of `steps` steps, atomically; the rest, a torn last line too, goes to `redone`.

    The evaluation after the last step kept stays, where it was made.
    """
    kept, cut = [], []
    for line in metrics.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            beyond = json.loads(line)["step"] > steps
        except (ValueError, KeyError, TypeError):
            beyond = True
        (cut if beyond or not line.endswith("\n") else kept).append(line)
    if cut:
        with redone.open("a", encoding="utf-8") as out:
            out.writelines(line if line.endswith("\n") else f"{line}\n" for line in cut)
        write_atomic(metrics, "".join(kept))


def describe_environment() -> dict[str, Any]:
    """Return versions, host, code revision and an allow-list of variables."""
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "load_average": os.getloadavg(),
        "cpu": topology.cpu_model(),
        "versions": versions(),
        "code_revision": code_revision(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def code_revision() -> str | None:
    """Return the git commit of a clone, with `+changed` where files differ from it; None for an installed wheel."""
    root = assets.source_root()
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changed" if changed.strip() else "")


def finished(path: Path) -> dict[str, Any] | None:
    """Return the summary of a run that is done, else None."""
    try:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") == "done" else None
