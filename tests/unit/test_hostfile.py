"""Hostfiles, and the command lines and environment of a launch over one."""

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.cli.main import main
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.submit import hostfile, local, spread
from halfstep.launcher.topology import Topology

Make = Callable[..., Plan]
FOUR = Topology(world_size=4, ranks_per_node=2, accelerator="cpu")


def hosts(tmp_path: Path, text: str = "a slots=2\nb slots=2\n", **more: int | None) -> hostfile.Hosts:
    (tmp_path / "hosts").write_text(text)
    return hostfile.read(tmp_path / "hosts", more.get("nodes"), more.get("ranks"), more.get("port"))


def test_a_hostfile_is_read_as_deepspeed_and_mpi_write_it(tmp_path: Path) -> None:
    listed = hosts(tmp_path, "# two\n\nnode-1.x slots=8  # first\n10.0.0.2   slots = 8\n")
    assert (listed.names, listed.slots) == (("node-1.x", "10.0.0.2"), 8)
    assert hosts(tmp_path, nodes=1).names == ("a",)
    assert hosts(tmp_path, "a slots=2\nb slots=4\n", ranks=2).slots == 2


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("a\n", {}, "line 1 of the hostfile is 'a'"),
        ("a slots=0\n", {}, "line 1"),
        ("a slots=2\na slots=2\n", {}, "that host again"),
        ("a slots=2; rm\n", {}, "line 1"),
        ("", {}, "0 host\\(s\\), 1 are needed"),
        ("a slots=2\n", {"nodes": 2}, "1 host\\(s\\), 2 are needed"),
        ("a slots=2\nb slots=4\n", {}, "different numbers of slots"),
        ("a slots=2\n", {"ranks": 4}, "4 ranks on a, which has 2 slots"),
    ],
)
def test_what_is_wrong_in_a_hostfile_is_said(tmp_path: Path, text: str, more: dict[str, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        hosts(tmp_path, text, **more)


def test_the_command_of_each_starter(plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "free_port", lambda: 12345)
    made, both, run = plan(topology=FOUR), hosts(tmp_path), Path("/runs/one")
    command = spread.STARTERS["deepspeed"](made, run, both, "pdsh")[1:]
    assert command[:14] == [
        "--hostfile", str(tmp_path / "hosts"), "--launcher", "pdsh", "--master_addr", "a", "--master_port", "12345",
        "--log_level", "error", "--num_nodes", "2", "--num_gpus", "2",
    ]  # fmt: skip
    assert command[14:17] == ["--venv_script", "/runs/one/.launch-environment", "--launcher_args=-N"]
    monkeypatch.setenv("HF_HOME", "/x")
    command = spread.STARTERS["deepspeed"](made, run, both, "openmpi")
    assert command[:3] == ["env", "MASTER_ADDR=a", "MASTER_PORT=12345"]
    assert "-x HF_HOME" in command[-3]
    named = set(command[-3].removeprefix("--launcher_args=-x ").split(" -x "))
    assert named >= set(local.SET_HERE), "mpirun passes on what it is told to, and nothing else"
    for name, expected in (("torchrun", "--node-rank %n"), ("accelerate", "--machine_rank %n")):
        command = spread.STARTERS[name](made, Path("/runs/it's 50%"), both, "pdsh")
        assert command[:7] == ["pdsh", "-S", "-N", "-R", "ssh", "-w", "a,b"]
        assert expected in command[7]
        # What the remote shell gets, once pdsh has read its own signs.
        remote = command[7].replace("%n", "1").replace("%%", "%")
        assert shlex.split(remote)[-1] == "run=/runs/it's 50%"


def test_a_port_of_sshd_is_passed_on(plan: Make, tmp_path: Path) -> None:
    both = hosts(tmp_path, port=2222)
    assert "2222" in spread.STARTERS["deepspeed"](plan(topology=FOUR), Path("/r"), both, "pdsh")
    assert spread.STARTERS["torchrun"](plan(topology=FOUR), Path("/r"), both, "pdsh")[:2] == [
        "env",
        "PDSH_SSH_ARGS_APPEND=-p 2222",
    ]


def test_a_path_that_deepspeed_would_harm_is_refused(plan: Make, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unharmed"):
        spread.STARTERS["deepspeed"](plan(topology=FOUR), Path("/runs/$HOME"), hosts(tmp_path), "pdsh")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_values_reach_the_other_host_as_they_are(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    file = tmp_path_factory.mktemp("remote") / "environment"
    hostfile.write_environment(file, {"HF_TOKEN": value, "SECRET": "x", "PATH": "/usr/bin:/bin"})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    done = subprocess.run(["sh", "-c", f'. "{file}"; printf %s "$HF_TOKEN"; test -z "$SECRET"'], capture_output=True)
    assert done.returncode == 0
    assert done.stdout == value.encode()


def test_a_dry_run_over_a_hostfile(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    arguments = ["run", "--dry-run", "--hostfile", str(tmp_path / "hosts"), "model=gpt2-nano", f"data={corpus}"]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 0
    assert "--num_nodes 2 --num_gpus 1" in capsys.readouterr().out
    assert main([*arguments, "nodes=3"]) == 2
    assert "2 host(s), 3 are needed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfea slots=2\n", "the hostfile is no text: it is not UTF-8 at byte 0"),
        (b"a slots=2\x00\n", "line 1 of the hostfile"),
        (b"a slots=" + b"9" * 5000 + b"\n", "line 1 of the hostfile"),
        ("a slots=٣\n".encode(), "line 1 of the hostfile"),
        (b"-oProxyCommand slots=2\n", "line 1 of the hostfile"),
        (b"-l slots=2\n", "line 1 of the hostfile"),
        ("ä slots=2\n".encode(), "line 1 of the hostfile"),
        (b"\x1b[2Ja slots=2\n", "line 1 of the hostfile"),
        (b"a slots=0\n", "a host without slots"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_hostfile_of_any_bytes_is_refused_with_words(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        hostfile.read(tmp_path / "hosts", None, None)
    assert said in caught.value.what
    assert len(str(caught.value).splitlines()) == 3


def test_a_hostfile_that_is_a_pipe_is_not_waited_for_and_a_link_is_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hosts")
    with pytest.raises(RequestError, match="no regular file"):
        hostfile.read(tmp_path / "hosts", None, None)
    (tmp_path / "real").write_text("a slots=2\n")
    (tmp_path / "link").symlink_to("real")
    assert hostfile.read(tmp_path / "link", None, None).names == ("a",)


@pytest.mark.parametrize("name", ["HF_X;touch /tmp/here", "HF_X\ntouch", "NCCL_A b", "DS_$(id)", "HF_%%", "OMP_ä"])
def test_a_variable_s_name_puts_no_line_into_the_environment_of_other_hosts(tmp_path: Path, name: str) -> None:
    hostfile.write_environment(tmp_path / "environment", {name: "x", "HF_HOME": "/it's"})
    text = (tmp_path / "environment").read_text()
    assert text.splitlines() == ["export HF_HOME='/it'\"'\"'s'", "export HALFSTEP_REMOTE=1"]
    assert list(hostfile.exported({name: "x"})) == []


def test_what_a_launch_sets_for_its_ranks_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI's ranks on other hosts once had no secret, and could not join: it had been set and not listed."""
    before = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "_verdict", lambda run, attempt, status: status)
    seen = tmp_path / "seen"
    argv = [sys.executable, "-c", f"import os; open({str(seen)!r}, 'w').write(' '.join(os.environ))"]
    assert local.start(argv, tmp_path, 1, launch="one") == 0
    added = set(seen.read_text().split()) - set(before) - {"LC_CTYPE"}
    assert added - {"DS_ACCELERATOR"} == set(local.SET_HERE) - {"DS_ACCELERATOR"}, "that one is for hosts without a GPU"
