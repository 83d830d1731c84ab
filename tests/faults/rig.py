"""Drive runs from outside: start ranks as srun does, one process each, hurt them, and look at what is left.

Nothing here knows how Halfstep saves: it reads metrics.jsonl, events.jsonl, exit.json and manifests, as a user would.
"""

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ranks import environment

from halfstep.launcher.rundir.lease import lease
from halfstep.launcher.system.machine import free_port

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "model=gpt2-nano",
    "model.dropout=0.1",
    "batch.global=8",
    "batch.micro=2",
    "sequence=64",
    "steps=40",
    "eval.every=20",
    "eval.sequences=6",
    "checkpoint.every=10",
    "watch.timeout=60",
]
"""8 sequences of 64 tokens a step on two ranks, accumulation 2, dropout on, four checkpoints."""
OURS = "HALFSTEP_RIG"
"""The variable that tells of every process which run it was started on."""
TIMES = ("step_seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes", "time", "mfu")
"""Fields of a row that differ between two runs of the same thing."""


class Launch:
    """Ranks of one start."""

    def __init__(
        self,
        out: Path,
        arguments: list[str],
        scratch: Path,
        *,
        world: int = 2,
        nodes: int = 1,
        only: tuple[int, ...] | None = None,
        **more: str,
    ) -> None:
        """Start `world` ranks, or only some of them, that believe to be on `nodes` hosts."""
        self.out = out
        self._log = scratch / "logs" / f"{out.parent.name}-{out.name}.log"
        self._log.parent.mkdir(exist_ok=True)
        self._begin = self._log.stat().st_size if self._log.exists() else 0
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        local = world // nodes
        sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local)}
        common = {**environment(scratch), **address, **sizes, OURS: str(out), **more}
        with self._log.open("ab") as log:
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, "launcher/train.py", *arguments, f"out={out}"],
                    cwd=ROOT,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank % local)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank in only or range(world)
            ]

    def wait(self, timeout: float = 180) -> list[int]:
        """Return every rank's status; the ranks of a launch that takes longer are killed, and that is an error."""
        end = time.monotonic() + timeout
        try:
            return [rank.wait(max(0.1, end - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            for rank in self.ranks:
                with contextlib.suppress(ProcessLookupError):
                    rank.send_signal(signal.SIGCONT)
                    rank.kill()
                rank.wait()
            raise AssertionError(f"the ranks did not end within {timeout} s:\n{self.output}") from None

    @property
    def output(self) -> str:
        """What this start has said."""
        return self._log.read_bytes()[self._begin :].decode(errors="replace")

    def until(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """Poll until a condition holds and return its value; fails when the ranks end before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if value := condition():
                return value
            assert any(rank.poll() is None for rank in self.ranks), f"ended before it came to that:\n{self.output}"
            time.sleep(0.002)
        raise AssertionError(f"it did not come to that within {timeout} s:\n{self.output}")

    def until_step(self, step: int) -> None:
        """Wait until a step is written down, or the run is over."""
        self.until(lambda: last_step(self.out) >= step)

    def kill(self, number: int = signal.SIGKILL, ranks: tuple[int, ...] = (0, 1)) -> None:
        """Send a signal to ranks that are alive."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, IndexError):
                self.ranks[rank].send_signal(number)


def start_by(tool: str, arguments: list[str], out: Path, scratch: Path, **more: str) -> subprocess.Popen[bytes]:
    """Start a tool of this environment (`halfstep run ...`, `deepspeed ...`) on a run, in a session of its own."""
    log = scratch / "logs" / f"{out.parent.name}-{out.name}.log"
    log.parent.mkdir(exist_ok=True)
    port = ["--master_port", str(free_port())] if tool == "deepspeed" else []
    command = [str(Path(sys.executable).parent / tool), *port, *arguments, f"out={out}"]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(scratch), OURS: str(out), **more},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def log_of(out: Path, scratch: Path) -> str:
    """Return what all starts of a run have said."""
    return (scratch / "logs" / f"{out.parent.name}-{out.name}.log").read_text(errors="replace")


def wait_for(condition: Callable[[], Any], timeout: float = 120) -> Any:
    """Poll until a condition holds and return its value."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"it did not come to that within {timeout} s")


def ranks_of(out: Path) -> list[psutil.Process]:
    """Return the ranks of a run, by number, whoever started them."""
    return [psutil.Process(pid) for pid in heartbeats(out)]


def heartbeats(out: Path) -> list[int]:
    """Return the process of each rank of the newest attempt, as its own host numbers it."""
    numbers = sorted((out / "attempts").glob("*/rank-*.heartbeat"), key=lambda file: (file.parent.name, file.name))
    last = [file for file in numbers if file.parent == numbers[-1].parent]
    return [json.loads(file.read_text())["pid"] for file in last]


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the whole rows of metrics.jsonl."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(out: Path) -> int:
    """Return the last step that is written down."""
    return max((row["step"] for row in rows(out)), default=0)


def series(out: Path) -> list[dict[str, Any]]:
    """Return what two runs of the same thing have in common, exactly: floats are compared to the bit."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(out)]


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the events, or those of a kind; a line cut short by a kill is none."""
    listed = []
    for line in (out / "events.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            listed.append(json.loads(line))
    return [event for event in listed if kind in (None, event["event"])]


def exit_of(out: Path) -> dict[str, Any]:
    """Return how the last attempt ended, by its own account."""
    last = max((out / "attempts").iterdir(), key=lambda attempt: attempt.name)
    return json.loads((last / "exit.json").read_text())


def steps_saved(out: Path) -> list[int]:
    """Return the steps of the checkpoints that have a manifest, oldest first."""
    return sorted(
        int(manifest.parent.name[5:]) for manifest in (out / "checkpoints").glob("step-????????/manifest.json")
    )


def final_state(out: Path) -> dict[str, str]:
    """Return the hash of every rank's tensors in the newest checkpoint: weights and optimizer states."""
    folder = out / "checkpoints" / f"step-{steps_saved(out)[-1]:08d}"
    return {
        shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in sorted(folder.glob("*.safetensors"))
    }


def assert_same(out: Path, reference: Path) -> None:
    """Assert that a run that was hurt is, to the bit, the one that was not: rows, each once, and the final state."""
    assert series(out) == series(reference)
    assert final_state(out) == final_state(reference)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done"
    total = summary["productive_seconds"] + sum(summary["lost_seconds"].values())
    assert abs(total - summary["wall_seconds"]) < 1e-6 * max(1.0, summary["wall_seconds"])
    assert all(seconds > -1e-3 for seconds in summary["lost_seconds"].values()), summary["lost_seconds"]


def redone(out: Path) -> int:
    """Return the most steps that any resume did again."""
    worst = 0
    for file in (out / "attempts").glob("*/metrics-redone.jsonl"):
        worst = max(worst, sum("loss" in json.loads(line) for line in file.read_text().splitlines() if _whole(line)))
    return worst


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def processes(out: Path) -> list[psutil.Process]:
    """Return every process that was started on a run, watchdogs and launchers too, whatever its command line."""
    ours = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(OURS) == str(out) and process.status() != psutil.STATUS_ZOMBIE:
                ours.append(process)
    return ours


@contextlib.contextmanager
def nothing_left(out: Path, *, half_written: bool = False, within: float = 10) -> Iterator[None]:
    """Assert that what happens inside leaves no process, shared memory or half-written checkpoint behind it.

    A rank that is killed in a save leaves half of one, which the next start deletes (`half_written`).
    """
    memory = set(Path("/dev/shm").iterdir())
    yield
    end = time.monotonic() + within
    while processes(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes(out)
    assert not {file for file in set(Path("/dev/shm").iterdir()) - memory if "deepspeed" in file.name}
    assert half_written or not list((out / "checkpoints").glob(".*"))
    with lease(out):
        pass  # whoever held it has given it back
