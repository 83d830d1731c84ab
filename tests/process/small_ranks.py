"""Small ranks under a small launcher: real Heartbeats, Stops and watchdogs, and nothing that takes seconds to start."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfstep.launcher.system import processes

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from halfstep.launcher.watchdog.heartbeat import Heartbeat
from halfstep.launcher.rundir.exits import write_exit
from halfstep.launcher.watchdog.stop import Stop
where, rank, world, timeout = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
deeds = dict(one.split("=", 1) for one in sys.argv[5:])
where.mkdir(parents=True, exist_ok=True)
stop = Stop()
stop.install()
heartbeat = Heartbeat(rank, stop)
heartbeat.start()
heartbeat.set_timeout(timeout)
if "grace" in deeds:
    stop.set_grace(float(deeds["grace"]), lambda: (where / f"expired-{{rank}}").touch())
if "early" in deeds:
    time.sleep(60)
heartbeat.set_attempt(where, world)
(where / f"pid-{{rank}}").write_text(str(os.getpid()))
def meet(step):
    own = where / f"meeting-{{step}}-{{rank}}"
    own.write_text(stop.asked or "")
    own.rename(where / f"meet-{{step}}-{{rank}}")
    files = [where / f"meet-{{step}}-{{other}}" for other in range(world)]
    while not all(file.exists() for file in files):
        time.sleep(0.005)
    return any(file.read_text() for file in files)
for step in range(1, int(deeds.get("steps", 100000)) + 1):
    heartbeat.mark("forward", step)
    if deeds.get(f"at{{rank}}-{{step}}"):
        exec(deeds[f"at{{rank}}-{{step}}"])
    time.sleep(0.01)
    heartbeat.mark("backward", step)
    if (where.parents[1] / "STOP").exists():
        stop.ask("the STOP file")
    if meet(step) and "deaf" not in deeds:
        heartbeat.mark("save", step)
        (where / f"asked-{{rank}}").write_text(str(stop.asked))
        if "says" in deeds:
            write_exit(where, 75, "stopped", rank)
        heartbeat.end(75)
        os._exit(75)
heartbeat.mark("exit")
if "says" in deeds:
    write_exit(where, 0, "done", rank)
heartbeat.end(0)
"""

LAUNCHER = """
import subprocess, sys, time
script, where, world, *more = sys.argv[1:]
ranks = [subprocess.Popen([sys.executable, script, where, str(rank), world, *more]) for rank in range(int(world))]
print(*[one.pid for one in ranks], flush=True)
print(max(one.wait() for one in ranks), flush=True)
"""


class Launch:
    """Ranks under a launcher, watched from outside."""

    def __init__(self, folder: Path, world: int, timeout: float, *deeds: str) -> None:
        self.where = folder / "0001"
        self.where.mkdir()
        (folder / "rank.py").write_text(RANK.format(root=str(ROOT)))
        (folder / "deepspeed").write_text(LAUNCHER)
        self.mark = f"HALFSTEP_TEST={folder}"
        self.errors = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, folder / "deepspeed", folder / "rank.py", self.where, str(world), str(timeout), *deeds],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "HALFSTEP_TEST": str(folder)},
        )
        assert self.process.stdout is not None
        self.pids = [int(pid) for pid in self.process.stdout.readline().split()]

    @property
    def exit(self) -> dict[str, Any] | None:
        file = self.where / "exit.json"
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def wait(self, condition: Callable[[], object], seconds: float = 10.0) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"{self.exit}, {self.said}, {list(self.where.iterdir())}"
            time.sleep(0.02)
        return time.monotonic() - began

    def until_step(self, step: int) -> None:
        self.wait(lambda: all((self.where / f"meet-{step}-{rank}").exists() for rank in range(len(self.pids))))

    def until_gone(self, seconds: float = 10.0) -> float:
        """Wait until no rank and no watchdog is left."""
        return self.wait(lambda: set(processes.marked(self.mark)) <= {self.process.pid}, seconds)
