"""What a run's numbers depend on besides its plan: versions, the code's revision, the host, a few variables."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from halfstep.launcher.system import assets, clock, machine

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


def describe() -> dict[str, Any]:
    """Return versions, host, code revision and an allow-list of variables."""
    return {
        "time": clock.now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "load_average": os.getloadavg(),
        "cpu": machine.cpu_model(),
        "versions": versions(),
        "code_revision": code_revision(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    installed = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


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
