"""A study as an array of jobs: the same numbers as here, and it completes whatever happens to its tasks."""

import json
import subprocess
from pathlib import Path

import pytest
from faults import rig
from slurm.conftest import HALFSTEP, Cloud

pytestmark = pytest.mark.slurm
TEXT = """
[base]
model = "gpt2-nano"
data = "{data}"
precision = "fp32"
sequence = 64
steps = 24
batch.global = 8
batch.micro = 2
eval.every = 0
eval.sequences = 6
checkpoint.every = 6
nodes = {nodes}
gpus_per_node = {ranks}

[axes]
zero = [0, 1, 2]

[compare]
reference = { zero = 1 }
"""


def losses(folder: Path) -> dict[str, list[float]]:
    tree = json.loads((folder / "study.json").read_text())
    return {
        cell["values"]["zero"]: [row["loss"] for row in rig.rows(folder / cell["run"]) if "loss" in row]
        for cell in tree["cells"]
    }


def test_a_study_completes_as_an_array_though_a_rank_is_killed_and_a_node_lost(
    cloud: Cloud, tmp_path: Path, scratch: Path
) -> None:
    cache = {"XDG_CACHE_HOME": str(scratch / "cache")}
    cloud.environ |= cache
    file, here, there = tmp_path / "stages.toml", tmp_path / "here", tmp_path / "there"
    text = TEXT.replace("{data}", str(cloud.data))
    file.write_text(text.replace("{nodes}", "1").replace("{ranks}", "2"))
    local = subprocess.run(
        [HALFSTEP, "study", "run", str(file), "--out", str(here)],
        env=cloud.environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert local.returncode == 0, local.stdout + local.stderr
    file.write_text(text.replace("{nodes}", "2").replace("{ranks}", "1"))
    fault = {"variables": {"HALFSTEP_FAULT": "step:*:1-:sleep=0.5", **cache}}
    site = cloud.write_site(tmp_path / "slow.toml", environment=fault)
    arguments = ["study", "submit", str(file), "--out", str(there), "--site", str(site), "--at-once", "2", "--json"]
    dry = cloud.halfstep(*[word for word in arguments if word != "--json"], "--dry-run")
    assert "#SBATCH --array=0-2%2" in dry.stdout
    assert "study/proof.py" in dry.stdout
    sent = cloud.halfstep(*arguments)
    assert sent.returncode == 0, sent.stderr
    [array] = json.loads(sent.stdout)["arrays"]
    runs = [Path(run) for run in array["runs"]]
    cloud.cluster.wait(lambda: rig.last_step(runs[0]) >= 8, "the first task to train", 180)
    status = cloud.halfstep("study", "status", str(there), "--json")
    states = {row["cell"]["zero"]: row["status"] for row in json.loads(status.stdout)}
    assert states["0"] == "running", status.stdout
    assert "queued" in states.values()
    again = cloud.halfstep(*[word for word in arguments if word != "--json"])
    assert "nothing to submit: every run has a result or a job" in again.stdout
    victim = rig.heartbeats(runs[0])[1]
    assert cloud.cluster.kill("n2", victim).returncode == 0
    cloud.cluster.wait(lambda: len(list(runs[0].glob("attempts/0*"))) == 2, "the killed cell to come back", 180)
    cloud.cluster.wait(lambda: any(8 <= rig.last_step(run) < 20 for run in runs[1:]), "another to train", 240)
    cloud.cluster.kill_node("n2")
    cloud.cluster.wait(
        lambda: "RUNNING" not in cloud.cluster.call("squeue", "-h", "--array", "-o", "%T").stdout,
        "the loss to be seen",
        120,
    )
    cloud.cluster.start_node("n2")
    cloud.cluster.wait(lambda: all((run / "summary.json").exists() for run in runs), "all cells", 400)
    cloud.cluster.wait(lambda: not cloud.cluster.call("squeue", "-h").stdout, "the queue to be empty", 120)
    assert losses(there) == losses(here), "the same cells, to the last digit"
    report = cloud.halfstep("study", "report", str(there))
    assert report.returncode == 0, report.stderr
    tree = json.loads((there / "results.json").read_text())
    assert [(run["status"], run["proved"]) for run in tree["runs"]] == [("done", True)] * 3
