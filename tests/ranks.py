"""How tests start real ranks, and the environment that those have."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def environment(scratch: Path) -> dict[str, str]:
    """Return this process's environment without what a developer may have set, with a build cache of its own."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_NUM_THREADS", "PYTHONPATH", "LOCAL_SIZE", "RANK", "WORLD_SIZE")
    }
    return {**kept, "TORCH_EXTENSIONS_DIR": str(scratch / "ops"), "HF_HUB_OFFLINE": "1"}


def printed_alone(file: str, scratch: Path, *arguments: str) -> list[str]:
    """Run a test's file as the program of a single rank and return the lines that it printed."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, file, *arguments],
        env={**environment(scratch), "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def reported_by_two(file: str, folder: Path, scratch: Path, **more: str) -> list[Any]:
    """Run a test's file as the program of two CPU ranks, and return what each wrote into `folder`/rank-N.json."""
    tests = Path(__file__).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*launcher, file, str(folder)],
        env={**environment(scratch), **paths, **more},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
