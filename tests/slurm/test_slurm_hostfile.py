"""Runs over a hostfile: real ssh to two nodes, by each starter."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from slurm.conftest import HALFSTEP, Cloud, left_on

pytestmark = pytest.mark.slurm
CELL = ("zero=2", "precision=fp32", "steps=20")
STARTERS = {
    "deepspeed over pdsh": ("--with", "deepspeed"),
    "deepspeed over Open MPI": ("--with", "deepspeed", "--launcher", "openmpi"),
    "torchrun": ("--with", "torchrun"),
    "accelerate": ("--with", "accelerate"),
}


@pytest.fixture(autouse=True)
def _programs() -> None:
    absent = [name for name in ("sshd", "pdsh", "mpirun") if shutil.which(name) is None]
    if absent:
        assert os.environ.get("CI") != "true", f"{absent} not installed"
        pytest.skip(f"{', '.join(absent)} not installed")


def start(cloud: Cloud, out: Path, *arguments: str, options: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    """Start `halfstep run --hostfile` on n1, in a session of its own."""
    hosts = cloud.folder / "hosts"
    hosts.write_text("# two nodes\nn1 slots=1\nn2 slots=1\n")
    enter = ["nsenter", "--target", str(cloud.cluster.first_process("n1")), "--net", "--uts", "--mount", "--pid"]
    command = [
        HALFSTEP,
        "run",
        "--hostfile",
        str(hosts),
        *options,
        *rig.WORDS,
        f"data={cloud.data}",
        *arguments,
        f"out={out}",
    ]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "DS_ACCELERATOR": "cpu"}
    root["OMP_NUM_THREADS"] = "1"  # as the undisturbed run's: a sum over two threads rounds otherwise
    with (cloud.folder / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*enter, *command],
            env={**cloud.environ, **root, "SECRET_OF_THIS_SHELL": "x", "HF_TOKEN": "a $HOME `b` \"c\" 'd' %n"},
            cwd=cloud.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.parametrize("starter", STARTERS)
def test_two_hosts_train_as_one(cloud: Cloud, undisturbed: Callable[..., Path], starter: str) -> None:
    out = cloud.folder / starter.replace(" ", "-")
    process = start(cloud, out, *CELL, options=STARTERS[starter])
    code = process.wait(180)
    said = (cloud.folder / f"{out.name}.log").read_text()
    assert code == 0, said
    rig.assert_same(out, undisturbed(*CELL))
    assert "a $HOME" not in said, "no secret on a command line that is shown"
    assert not (out / ".launch-environment").exists()


def test_ranks_on_other_hosts_are_given_what_they_need_and_nothing_else(cloud: Cloud) -> None:
    out = cloud.folder / "environment"
    process = start(cloud, out, *CELL, "watch.startup=60", options=("--with", "torchrun"))
    cloud.cluster.wait(lambda: _ranks(cloud, "n2"), "a rank on n2")
    [rank] = _ranks(cloud, "n2")
    variables = Path(f"/proc/{rank}/environ").read_bytes().decode().split("\0")
    given = dict(word.partition("=")[::2] for word in variables if "=" in word)
    assert given["HF_TOKEN"] == "a $HOME `b` \"c\" 'd' %n", "as it stands, whatever a shell would make of it"
    assert given["DS_ACCELERATOR"] == "cpu"
    assert "SECRET_OF_THIS_SHELL" not in given
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    cloud.cluster.wait(lambda: left_on(cloud.cluster) == {"n1": [], "n2": []}, "both nodes to be empty", 20)


@pytest.mark.parametrize("starter", ["deepspeed over pdsh", "torchrun"])
def test_a_launch_that_is_killed_leaves_nothing_on_any_host(cloud: Cloud, starter: str) -> None:
    out = cloud.folder / "killed"
    process = start(cloud, out, *CELL, "steps=2000", options=STARTERS[starter])
    cloud.cluster.wait(lambda: rig.last_step(out) >= 5, "step 5", 90)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    cloud.cluster.wait(lambda: left_on(cloud.cluster) == {"n1": [], "n2": []}, "both nodes to be empty", 15)
    assert rig.exit_of(out)["code"] != 0


def test_ctrl_c_saves_and_the_same_command_resumes(cloud: Cloud) -> None:
    out = cloud.folder / "asked"
    process = start(cloud, out, *CELL, "steps=2000", options=STARTERS["deepspeed over pdsh"])
    cloud.cluster.wait(lambda: rig.last_step(out) >= 5, "step 5", 90)
    for pid in _named(cloud, "n1", Path(HALFSTEP).name):
        os.kill(pid, signal.SIGINT)
    assert process.wait(60) == 75, (cloud.folder / f"{out.name}.log").read_text()
    [saved] = rig.steps_saved(out)[-1:]
    again = start(cloud, out, *CELL, f"steps={saved + 5}", options=STARTERS["deepspeed over pdsh"])
    assert again.wait(120) == 0, (cloud.folder / f"{out.name}.log").read_text()
    assert rig.events(out, "resumed")[0]["step"] == saved


def _ranks(cloud: Cloud, node: str) -> list[int]:
    return _named(cloud, node, "train.py")


def _named(cloud: Cloud, node: str, name: str) -> list[int]:
    """Return the Python processes of a node whose script has this name."""
    pids = []
    for pid in cloud.cluster.processes(node):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        scripts = [word for word in command[1:4] if not word.startswith("-")]
        if Path(command[0]).name.startswith("python") and scripts and Path(scripts[0]).name == name:
            pids.append(pid)
    return pids
