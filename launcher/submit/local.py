"""Start a run on this host, wait for it, and pass on how it ended."""

import json
import os
import subprocess
from pathlib import Path

from launcher.topology import prefer_cpu, usable_cores


def start(argv: list[str], run: Path, ranks: int) -> int:
    """Run a starter's command and return the run's exit code.

    torchrun and accelerate turn every failure into 1, so the code that the run itself wrote down comes first.
    """
    before = _attempts(run)
    environment = dict(os.environ)
    prefer_cpu(environment)
    # torchrun would set one thread a rank, whatever the machine has.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    with subprocess.Popen(argv, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait()  # the terminal has sent Ctrl-C to the ranks too; let them end
    new = sorted(_attempts(run) - before)
    if new:
        try:
            return int(json.loads((new[-1] / "exit.json").read_text("utf-8"))["code"])
        except (OSError, ValueError, KeyError):
            status = status or 1  # it began and nobody wrote how it ended: the launcher's own 0 cannot be right (T22)
    return status if status >= 0 else 128 - status


def _attempts(run: Path) -> set[Path]:
    return set((run / "attempts").glob("[0-9]*"))
