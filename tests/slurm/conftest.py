"""A cluster for the session, and runs submitted to it as a user would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from faults.rig import WORDS, last_step
from ranks import environment
from slurm.cluster import NODES, Cluster, missing

HALFSTEP = str(Path(sys.executable).parent / "halfstep")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"SLURM cannot be tested here: {reason}")
        pytest.skip(f"SLURM cannot be tested here: {reason}")
    started = Cluster(tmp_path_factory.mktemp("cluster") / "slurm")
    try:
        started.start()
        yield started
    finally:
        started.stop()


class Submitted:
    """A run that was sent to the cluster."""

    def __init__(self, cluster: Cluster, run: Path, job: str) -> None:
        self.cluster, self.run, self.job = cluster, run, job

    def until_step(self, step: int, seconds: float = 120) -> None:
        """Wait until a step is written down."""
        self.cluster.wait(lambda: last_step(self.run) >= step, f"step {step}: {self.log}", seconds)

    def until_state(self, *states: str, seconds: float = 180) -> str:
        """Wait until SLURM says that the job is in one of these states."""
        self.cluster.wait(lambda: self.state in states, f"{states}; it is {self.state}: {self.log}", seconds)
        return self.state

    @property
    def state(self) -> str:
        return self.cluster.job_state(self.job)

    @property
    def log(self) -> str:
        file = self.run / "slurm.log"
        return file.read_text(errors="replace") if file.exists() else "(no log)"

    @property
    def attempts(self) -> list[str]:
        return sorted(folder.name for folder in (self.run / "attempts").glob("[0-9]*"))


class Cloud:
    """The command `halfstep` on a host that submits to the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, scratch: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.environ = {**environment(scratch), **cluster.environment()}
        self.site = folder / "two-nodes.toml"
        self.write_site(self.site)

    def write_site(self, file: Path, **tables: dict[str, object]) -> Path:
        """Write the site of this cluster, with other values where they are given."""
        site: dict[str, dict[str, object]] = {
            "slurm": {"time": "10", "notice": 30},
            "node": {"gpus": 0, "cpus_per_task": 1},
            "environment": {
                "variables": {
                    "TORCH_EXTENSIONS_DIR": self.environ["TORCH_EXTENSIONS_DIR"],
                    "HF_HUB_OFFLINE": "1",
                    "DS_ACCELERATOR": "cpu",
                }
            },
        }
        for name, table in tables.items():
            before = site.setdefault(name, {})
            for key, value in table.items():
                old = before.get(key)
                before[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        file.write_text(tomli_w.dumps(site))
        return file

    def halfstep(self, *arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run the command."""
        return subprocess.run(
            [HALFSTEP, *arguments],
            capture_output=True,
            text=True,
            env=self.environ,
            cwd=cwd or self.folder,
            check=False,
            timeout=120,
        )

    def arguments(self, name: str, *more: str) -> list[str]:
        """Return the words of a run on two nodes."""
        return [*WORDS, f"data={self.data}", f"out={self.folder / name}", "nodes=2", "gpus_per_node=1", *more]

    def submit(self, name: str, *more: str, site: Path | None = None, options: tuple[str, ...] = ()) -> Submitted:
        """Submit a run and return it; `more` are key=value words."""
        chosen = ["submit", "--json", "--site", str(site or self.site), *options]
        done = self.halfstep(*chosen, *self.arguments(name, *more))
        assert done.returncode == 0, done.stderr + done.stdout
        return Submitted(self.cluster, self.folder / name, json.loads(done.stdout)["job"])

    def slowed(self, seconds: float) -> Path:
        """Return a site whose runs take this much longer for each step."""
        fault = {"variables": {"HALFSTEP_FAULT": f"step:*:1-:sleep={seconds}"}}
        return self.write_site(self.folder / f"slowed-{seconds}.toml", environment=fault)


@pytest.fixture
def cloud(cluster: Cluster, tmp_path: Path, data: Path, scratch: Path) -> Iterator[Cloud]:
    yield Cloud(cluster, tmp_path, data, scratch)
    # What a test leaves in the queue would run into the next one.
    cluster.call("scancel", "--user", str(os.geteuid()))
    cluster.wait(lambda: not cluster.call("squeue", "-h").stdout, "the queue to be empty")


def left_on(cluster: Cluster) -> dict[str, list[str]]:
    """Return what runs on each node besides what always does."""
    left = {}
    for name in NODES:
        names = []
        for pid in cluster.processes(name):
            try:
                names.append(Path(f"/proc/{pid}/comm").read_text().strip())
            except OSError:
                continue
        left[name] = sorted(process for process in names if process not in ("bash", "slurmd", "sleep", "sshd"))
    return left


@pytest.fixture(scope="session")
def undisturbed(scratch: Path, data: Path) -> Callable[..., Path]:
    """Return a function that runs something on two ranks of this host, once a session, and returns its directory."""
    from faults.rig import Launch

    done: dict[tuple[str, ...], Path] = {}

    def run(*arguments: str) -> Path:
        if arguments not in done:
            job = Launch(scratch / f"undisturbed-{len(done)}", [*WORDS, f"data={data}", *arguments], scratch)
            assert job.wait() == [0, 0], job.output
            done[arguments] = job.out
        return done[arguments]

    return run
