"""docs/slurm.md, command by command, as somebody would follow it on a new cluster."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from slurm.conftest import HALFSTEP, Cloud

pytestmark = pytest.mark.slurm
PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"


def test_every_command_of_the_page_does_what_the_page_says(cloud: Cloud, tmp_path: Path) -> None:
    text = PAGE.read_text()
    sites = tmp_path / "config" / "halfstep" / "sites"
    sites.mkdir(parents=True)
    [toml] = re.findall(r"^ *```toml\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    (sites / "default.toml").write_text(re.sub(r"^ +", "", toml, flags=re.MULTILINE))
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    commands = re.findall(r"^ *\$ (halfstep .+)$", text, re.MULTILINE)
    assert len(commands) == 9
    environ = {**cloud.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "DS_ACCELERATOR": "cpu"}
    for command in commands:
        arguments = [HALFSTEP, *shlex.split(command)[1:]]
        if "--hostfile" in arguments:
            node = str(cloud.cluster.first_process("n1"))
            arguments = [
                "nsenter",
                "--target",
                node,
                "--net",
                "--uts",
                "--mount",
                "--pid",
                "env",
                "-C",
                str(tmp_path),
                *arguments,
            ]
        if "logs" in arguments:
            cloud.cluster.wait(lambda: (tmp_path / "runs/first/slurm.log").exists(), "the first job to begin", 60)
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if "--dry-run" in arguments:
            assert not (tmp_path / "runs").exists()
        if arguments[1:] == ["jobs"]:
            assert "runs/first" in done.stdout
    cloud.cluster.wait(lambda: not cloud.cluster.call("squeue", "-h").stdout, "all jobs to end", 240)
    runs = [*(tmp_path / "runs").glob("*/summary.json"), *(tmp_path / "runs/seeds").glob("*/summary.json")]
    assert len(runs) == 7, [str(summary) for summary in runs]
    assert all('"status": "done"' in summary.read_text() for summary in runs)
