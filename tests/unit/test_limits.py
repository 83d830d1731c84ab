"""What a process is given by whoever started it: node lists, ports, threads, open files."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfstep.launcher import topology
from halfstep.launcher.errors import TopologyError
from halfstep.launcher.system import limits
from halfstep.launcher.system.nodelist import hosts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "text",
    [
        *("n[1-99999999]", "n[1-9][1-999999]", "n[", "n]", "a[1]]", "n[9-1]", "n[1-]", "n[a]", "n[1,]", ","),
        *("a,,b", "-x", "a b", "$(id)", "n[" + "9" * 5000 + "]", "[" * 100_000, "n[1-2" * 20_000, "ä"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_list_of_nodes_is_refused_at_once(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(TopologyError) as caught:
        hosts(text)
    assert time.monotonic() - began < 2
    assert len(str(caught.value).splitlines()) == 3
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_PORT", ""), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"), ("MASTER_PORT", "x"),
        ("MASTER_PORT", "1e3"), ("MASTER_PORT", "9" * 5000), ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", "all"), ("OMP_NUM_THREADS", "-1"),
        ("WORLD_SIZE", "9" * 5000), ("WORLD_SIZE", str(10**12)), ("RANK", "٣"), ("LOCAL_RANK", "1.0"),
        ("SLURM_JOB_ID", "x"),
    ],
)  # fmt: skip
def test_a_variable_that_is_no_number_is_named(name: str, value: str) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    if name.startswith("SLURM"):
        environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1"}
    environ[name] = value
    with pytest.raises(TopologyError) as caught:
        topology.prepare_environment(topology.from_environment(environ), environ)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_lists_of_threads_and_ports_that_are_numbers_are_taken() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "4,2"}
    topology.prepare_environment(topology.from_environment(environ), environ)
    assert environ["OMP_NUM_THREADS"] == "4,2"


def test_too_few_open_files_are_refused_and_a_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (40, 40))
    with pytest.raises(TopologyError, match="this process may open 40 files, and a rank needs 64 at least"):
        limits.allow_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    limits.allow_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    limits.allow_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**6, 10**6))
    limits.allow_open_files()
    assert asked == [(4096, 4096), (65536, resource.RLIM_INFINITY)]


def test_a_rank_with_too_few_open_files_ends_with_words_and_no_traceback(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launcher/train.py", "model=gpt2-nano", f"data={corpus}", f"out={tmp_path / 'run'}"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 40; exec "$@"', "-", *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: this process may open 40 files, and a rank needs 64 at least"
    assert "Traceback" not in done.stderr


def test_groups_get_their_timeouts_without_a_warning_whatever_torch_wraps_around_them() -> None:
    program = (
        "import warnings, torch, torch.distributed as dist, torch.distributed.distributed_c10d as c10d\n"
        "from halfstep.launcher.engine.ranks import distributed\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.new_group([0])\n"
        "warnings.simplefilter('error')\n"
        "distributed.set_timeouts(7)\n"
        "for group in c10d._world.pg_map:\n"
        "    backend = group._get_backend(torch.device('cpu'))\n"
        "    print(type(backend).__name__, getattr(backend, 'wrapped_pg', backend).options._timeout)\n"
    )
    environ = {**os.environ, "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environ, check=False
    )
    assert done.stdout.splitlines() == ["_ProcessGroupWrapper 0:00:14"] * 2, done.stderr
