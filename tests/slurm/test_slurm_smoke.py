"""The life of a job in short: two nodes, a requeue that resumes, a cancel that leaves nothing."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from slurm.conftest import HALFSTEP, Cloud, left_on

pytestmark = pytest.mark.process
CELL = ("zero=2", "precision=fp16", "model.dropout=0.1")


def test_a_job_on_two_nodes_is_requeued_and_resumes_to_the_bit(
    cloud: Cloud, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    reference = undisturbed(*CELL)
    job = cloud.submit("it's one", *CELL, site=cloud.slowed(0.1))
    again = cloud.halfstep("submit", "--site", str(cloud.site), *cloud.arguments("it's one", *CELL))
    assert again.returncode == 2
    assert f"job {job.job} is for this run already" in again.stderr
    job.until_step(15)
    assert cloud.cluster.call("scontrol", "requeue", job.job).returncode == 0
    assert job.until_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.log
    rig.assert_same(job.run, reference)
    assert job.attempts == ["0001", "0002"]
    assert rig.events(job.run, "resumed"), "it resumed, it did not start from scratch"
    assert job.log.count(f"--- job {job.job}, start") == 2, "one log"
    seen = json.loads((job.run / "attempts/0001/preflight.json").read_text())
    assert [row["host"] for row in seen["hosts"]] == ["n1", "n2"]
    assert [row["address"] for row in seen["hosts"]] == [f"{cloud.cluster.net}.{number}" for number in (1, 2)]
    [row] = json.loads(cloud.halfstep("jobs", "--json", str(job.run)).stdout)
    assert (row["state"], row["step"], row["steps"], row["attempts"], row["checkpoint"]) == ("done", 40, 40, 2, 40)


def test_a_cancelled_job_leaves_nothing_and_stays_cancelled(cloud: Cloud) -> None:
    job = cloud.submit("cancelled", *CELL, site=cloud.slowed(0.2))
    job.until_step(3)
    following = subprocess.Popen(
        [HALFSTEP, "jobs", "logs", "-f", str(job.run)], env=cloud.environ, stdout=subprocess.PIPE, text=True
    )
    [row] = json.loads(cloud.halfstep("jobs", "--json").stdout)
    assert (row["job"], row["state"], row["reason"]) == (job.job, "running", "n[1-2]")
    done = cloud.halfstep("jobs", "cancel", str(job.run))
    assert done.returncode == 0, done.stderr
    cloud.cluster.wait(lambda: left_on(cloud.cluster) == {"n1": [], "n2": []}, "the nodes to be empty", 20)
    assert job.until_state("CANCELLED", "PENDING") == "CANCELLED", job.log
    assert rig.exit_of(job.run)["code"] == 75
    assert not cloud.cluster.call("squeue", "-h").stdout
    assert following.stdout is not None
    assert following.stdout.readline().startswith(f"--- job {job.job}, start 1")
    time.sleep(1)  # it looks twice a second
    following.send_signal(signal.SIGINT)
    assert following.wait(20) == 130
    with following.stdout:
        assert "stopped: SIGTERM after step" in following.stdout.read(), "what was added later"
    said = cloud.halfstep("jobs", "logs", str(job.run), "-n", "1000").stdout
    assert said == job.log
    assert "stopped: SIGTERM after step" in said
