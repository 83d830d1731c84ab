"""The environment that tests start real ranks in."""

import os
import subprocess
import sys
from pathlib import Path


def environment(scratch: Path) -> dict[str, str]:
    """Return this process's environment without what a developer may have set, with a build cache of its own."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_NUM_THREADS", "PYTHONPATH", "LOCAL_SIZE", "RANK", "WORLD_SIZE")
    }
    return {**kept, "TORCH_EXTENSIONS_DIR": str(scratch / "ops"), "HF_HUB_OFFLINE": "1"}


def printed_alone(file: str, scratch: Path) -> list[str]:
    """Run a test's file as the program of a single rank and return the lines that it printed."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, file],
        env={**environment(scratch), "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
