"""What happens to jobs: limits, preemption, lost processes, nodes and daemons. Two nodes, real ranks, a real SLURM."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faults import rig
from slurm.conftest import Cloud, Submitted, left_on

pytestmark = pytest.mark.slurm
CELL = ("zero=2", "precision=fp16", "model.dropout=0.1")
Undisturbed = Callable[..., Path]


def finish(job: Submitted, reference: Path, *, attempts: int | None = None) -> None:
    """Wait for the end of a run that nobody touches any more, and compare it with the undisturbed one to the bit."""
    assert job.until_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=300) == "COMPLETED", (
        job.log
    )
    rig.assert_same(job.run, reference)
    if attempts is not None:
        assert len(job.attempts) == attempts, job.log
    assert job.log.count("--- the run is done") == 1, "one log for all starts"


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_a_submitted_run_equals_one_of_the_deepspeed_launcher_in_fp32(
    cloud: Cloud, scratch: Path, data: Path, tmp_path: Path, starter: str
) -> None:
    arguments = ("zero=2", "precision=fp32")
    here = tmp_path / "here"
    command = ["--num_gpus", "2", "launcher/train.py", *rig.WORDS, f"data={data}", *arguments]
    process = rig.start_by("deepspeed", command, here, scratch, DS_ACCELERATOR="cpu")
    assert process.wait(180) == 0, rig.log_of(here, scratch)
    job = cloud.submit("there", *arguments, options=("--with", starter))
    finish(job, here, attempts=1)
    hosts = json.loads((job.run / "attempts/0001/preflight.json").read_text())
    assert [(row["host"], row["ranks"]) for row in hosts["hosts"]] == [("n1", [0]), ("n2", [1])]
    assert hosts["all_reduce"]["gigabytes_per_second"] > 0


def test_a_run_of_three_time_limits_finishes_by_itself(cloud: Cloud, undisturbed: Undisturbed) -> None:
    arguments = (*CELL, "steps=160", "checkpoint.every=30")
    site = cloud.slowed(2.0)
    text = site.read_text().replace('time = "10"', 'time = "2"').replace("notice = 30", "notice = 20")
    site.write_text(text)
    job = cloud.submit("long", *arguments, site=site)
    assert job.until_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=1200) == "COMPLETED", job.log
    rig.assert_same(job.run, undisturbed(*arguments))
    assert len(job.attempts) >= 4, "steps of two seconds, of which not sixty fit into one limit"
    causes = [json.loads((job.run / f"attempts/{number}/exit.json").read_text()) for number in job.attempts]
    assert [ending["code"] for ending in causes] == [*[75] * (len(causes) - 1), 0]
    assert all(ending["cause"].startswith("SIGUSR1 after step") for ending in causes[:-1])
    [row] = json.loads(cloud.halfstep("jobs", "--json", str(job.run)).stdout)
    assert row["attempts"] == len(causes)


def test_a_requeue_in_the_middle_of_a_save(cloud: Cloud, undisturbed: Undisturbed) -> None:
    reference = undisturbed(*CELL)
    fault = {"variables": {"HALFSTEP_FAULT": "save.sync:*:20:sleep=20"}}
    job = cloud.submit("mid-save", *CELL, site=cloud.write_site(cloud.folder / "held.toml", environment=fault))
    cloud.cluster.wait(lambda: list(job.run.glob("checkpoints/.writing-step-00000020*")), f"the save: {job.log}", 90)
    assert cloud.cluster.call("scontrol", "requeue", job.job).returncode == 0
    finish(job, reference, attempts=2)
    [resumed] = rig.events(job.run, "resumed")
    assert resumed["step"] == 10, "the save that was cut off does not count"


def test_preemption_by_a_partition_of_higher_priority(cloud: Cloud, undisturbed: Undisturbed) -> None:
    reference = undisturbed(*CELL)
    low = cloud.submit("low", *CELL, site=cloud.slowed(0.1))
    low.until_step(12)
    whole = cloud.write_site(cloud.folder / "whole.toml", slurm={"exclusive": True})
    high = cloud.submit("high", *CELL, site=whole, options=("--partition", "urgent"))
    high.until_state("RUNNING")
    assert low.state != "RUNNING"
    finish(high, reference, attempts=1)
    finish(low, reference, attempts=2)
    assert rig.exit_of(low.run)["code"] == 0


def test_a_killed_rank_brings_the_job_back(cloud: Cloud, undisturbed: Undisturbed) -> None:
    reference = undisturbed(*CELL)
    job = cloud.submit("killed", *CELL, site=cloud.slowed(0.1))
    job.until_step(14)
    os.kill(_rank(cloud, "n2"), signal.SIGKILL)
    finish(job, reference, attempts=2)
    ending = json.loads((job.run / "attempts/0001/exit.json").read_text())
    assert (ending["code"], ending["rank"]) == (137, 1)
    assert "rank 1 was killed by signal 9 (SIGKILL)" in ending["cause"]


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_lost_node(cloud: Cloud, undisturbed: Undisturbed, node: str) -> None:
    """The first node has the job's script, rank 0 and the lease of the run directory."""
    reference = undisturbed(*CELL)
    job = cloud.submit("lost-node", *CELL, site=cloud.slowed(0.1))
    job.until_step(14)
    cloud.cluster.kill_node(node)
    cloud.cluster.wait(lambda: job.state in ("PENDING", "REQUEUED"), f"the job to be put back: {job.log}", 90)
    cloud.cluster.start_node(node)
    finish(job, reference, attempts=2)


def test_the_slurmd_of_a_node_dies(cloud: Cloud, undisturbed: Undisturbed) -> None:
    reference = undisturbed(*CELL)
    job = cloud.submit("lost-slurmd", *CELL, site=cloud.slowed(0.1))
    job.until_step(14)
    cloud.cluster.kill_slurmd("n2")
    # SLURM takes the node for dead and puts the job back, or, when it is quick to return, lets it run on.
    cloud.cluster.wait(lambda: job.state in ("PENDING", "REQUEUED", "COMPLETED"), f"SLURM to notice: {job.log}", 90)
    cloud.cluster.restart_slurmd("n2")
    finish(job, reference)


def test_the_controller_is_restarted(cloud: Cloud, undisturbed: Undisturbed) -> None:
    reference = undisturbed(*CELL)
    job = cloud.submit("controller", *CELL, site=cloud.slowed(0.1))
    job.until_step(10)
    cloud.cluster.kill_controller()
    job.until_step(20)
    cloud.cluster.start_controller()
    finish(job, reference, attempts=1)


def test_a_cancel_at_any_time_leaves_nothing(cloud: Cloud) -> None:
    waiting = cloud.submit("waiting", *CELL, site=cloud.slowed(0.2))
    behind = cloud.submit("behind", *CELL, options=("--after", waiting.job))
    assert behind.state == "PENDING"
    assert cloud.halfstep("jobs", "cancel", behind.job).returncode == 0
    waiting.until_state("RUNNING")
    time.sleep(3)  # somewhere in its imports
    assert cloud.cluster.call("scancel", "--full", waiting.job).returncode == 0
    cloud.cluster.wait(lambda: left_on(cloud.cluster) == {"n1": [], "n2": []}, "the nodes to be empty", 30)
    assert [job.until_state("CANCELLED", "PENDING") for job in (waiting, behind)] == ["CANCELLED"] * 2


def test_a_crash_at_the_same_step_three_times_ends_it_with_the_cause(cloud: Cloud) -> None:
    fault = {"variables": {"HALFSTEP_FAULT": "fwd:1:15:kill9"}}
    job = cloud.submit("crashes", *CELL, site=cloud.write_site(cloud.folder / "crash.toml", environment=fault))
    assert job.until_state("FAILED", "COMPLETED", seconds=240) == "FAILED", job.log
    assert job.attempts == ["0001", "0002", "0003"]
    assert "error: 3 starts in a row came no further than step 10: rank 1 was killed by signal 9" in job.log
    [row] = json.loads(cloud.halfstep("jobs", "--json", str(job.run)).stdout)
    assert (row["state"], row["checkpoint"]) == ("ended", 10)


def test_an_array_two_at_a_time(cloud: Cloud) -> None:
    arguments = ["model=gpt2-nano", f"data={cloud.data}", f"out={cloud.folder / 'seeds'}", "steps=10", "sequence=64"]
    each = ["--each", "seed=0,1,2,3,4,5", "--at-once", "2", "nodes=1", "gpus_per_node=1", "batch.global=4"]
    done = cloud.halfstep("submit", "--json", "--site", str(cloud.site), *arguments, *each)
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout)
    running, runs = [], [Path(run) for run in sent["runs"]]

    def ended() -> bool:
        states = cloud.cluster.call("squeue", "-h", "--array", "-j", sent["job"], "--states=all", "-o", "%T").stdout
        running.append(states.split().count("RUNNING"))
        return states.split() == ["COMPLETED"] * 6

    cloud.cluster.wait(ended, "six runs", 240)
    assert max(running) == 2
    assert [run.name for run in runs] == [f"seed={seed}" for seed in range(6)]
    losses = {rig.rows(run)[-1].get("eval_loss") for run in runs}
    assert len(losses) == 6
    assert all(json.loads((run / "summary.json").read_text())["status"] == "done" for run in runs)
    rows = json.loads(cloud.halfstep("jobs", "--json", str(cloud.folder / "seeds")).stdout)
    assert [row["state"] for row in rows] == ["done"] * 6
    assert "the run is done" in cloud.halfstep("jobs", "logs", str(runs[3])).stdout


def test_a_task_of_an_array_comes_back_by_itself(cloud: Cloud) -> None:
    arguments = ["model=gpt2-nano", f"data={cloud.data}", f"out={cloud.folder / 'pair'}", "steps=20", "sequence=64"]
    more = ["--each", "seed=0,1", "nodes=1", "gpus_per_node=1", "batch.global=4", "checkpoint.every=5"]
    slowed = cloud.slowed(0.3)
    done = cloud.halfstep("submit", "--json", "--site", str(slowed), *arguments, *more)
    assert done.returncode == 0, done.stderr
    job, runs = json.loads(done.stdout)["job"], [Path(run) for run in json.loads(done.stdout)["runs"]]
    cloud.cluster.wait(lambda: rig.last_step(runs[1]) >= 7, "the second task to train", 90)
    [victim] = rig.heartbeats(runs[1])
    node = cloud.cluster.call("squeue", "-h", "-j", f"{job}_1", "-o", "%N").stdout.strip()
    assert cloud.cluster.kill(node, victim).returncode == 0
    cloud.cluster.wait(lambda: all((run / "summary.json").exists() for run in runs), "both to finish", 120)
    assert [len(list((run / "attempts").glob("0*"))) for run in runs] == [1, 2]
    assert rig.last_step(runs[1]) == 20


def test_two_jobs_on_one_node_do_not_meet(cloud: Cloud, undisturbed: Undisturbed) -> None:
    arguments = ("zero=1", "precision=bf16", "nodes=1", "gpus_per_node=2")
    pin = cloud.write_site(cloud.folder / "pin.toml", slurm={"options": ["--nodelist=n1"]})
    both = [cloud.submit(name, *arguments, site=pin) for name in ("left", "right")]
    cloud.cluster.wait(lambda: [job.state for job in both] == ["RUNNING", "RUNNING"], "both to run at once")
    reference = undisturbed("zero=1", "precision=bf16")
    for job in both:
        finish(job, reference, attempts=1)


def test_a_second_job_for_a_run_is_refused_or_queued_behind_it(cloud: Cloud, undisturbed: Undisturbed) -> None:
    reference = undisturbed(*CELL)
    first = cloud.submit("twice", *CELL, site=cloud.slowed(0.2))
    refused = cloud.halfstep("submit", "--site", str(cloud.site), *cloud.arguments("twice", *CELL))
    assert refused.returncode == 2
    assert f"job {first.job} is for this run already, and is" in refused.stderr
    second = cloud.submit("twice", *CELL, options=("--after", first.job))
    first.until_step(2)
    assert second.state == "PENDING"
    finish(first, reference, attempts=1)
    second.until_state("COMPLETED")
    assert second.attempts == ["0001"], "it found the run done"
    # And a job that nobody asked about, on the same directory at the same time, is held off by the lease.
    third = cloud.submit("held", *CELL, site=cloud.slowed(0.3))
    third.until_step(1)
    by_hand = cloud.cluster.call(
        "sbatch", "--parsable", "--output", f"{third.run}/by-hand.log", f"{third.run}/job.sbatch"
    )
    number = by_hand.stdout.strip()
    assert number.isdigit(), by_hand.stderr
    cloud.cluster.wait(lambda: cloud.cluster.job_state(number) == "FAILED", "the second to be refused", 90)
    assert f"{third.run} is in use by process" in (third.run / "by-hand.log").read_text()
    assert third.state in ("RUNNING", "COMPLETED")


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        (("--partition", "nowhere"), (), "there is no partition 'nowhere'"),
        (("--time", "02:00:00"), (), "a time limit of 02:00:00 is over the 01:00:00 of partition main"),
        (("--memory", "64G"), (), "64G of memory a node is more than the 6000 MB"),
        ((), ("nodes=3", "batch.global=12"), "3 nodes are more than the 2 of partition main"),
        (("--qos", "none-such", "--constraint", "fast"), (), "SLURM would not take this job"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_what_the_cluster_does_not_have_is_refused_before_anything_is_queued(
    cloud: Cloud, options: tuple[str, ...], arguments: tuple[str, ...], said: str
) -> None:
    done = cloud.halfstep("submit", "--site", str(cloud.site), *options, *cloud.arguments("refused", *arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not cloud.cluster.call("squeue", "-h").stdout
    assert not (cloud.folder / "refused").exists()


def test_a_thousand_nodes_are_asked_for_as_two_are(cloud: Cloud) -> None:
    gpus = cloud.write_site(
        cloud.folder / "big.toml", slurm={"partition": "big", "time": "1-00"}, node={"gpus": 8, "cpus_per_task": 8}
    )
    arguments = [
        "model=gpt2-1.5b",
        f"data={cloud.data}",
        "batch.global=8192",
        "zero=3",
        "precision=bf16",
        "gpus_per_node=8",
    ]
    scripts = []
    for nodes in (1024, 2):
        out = cloud.folder / f"on-{nodes}"
        done = cloud.halfstep("submit", "--json", "--site", str(gpus), *arguments, f"nodes={nodes}", f"out={out}")
        assert done.returncode == 0, done.stderr
        number = json.loads(done.stdout)["job"]
        asked = cloud.cluster.call("squeue", "-h", "-j", number, "-o", "%D %b").stdout.split()
        assert asked == [str(nodes), "gres:gpu:8"]
        scripts.append((out / "job.sbatch").read_text().splitlines())
    assert len(scripts[0]) == len(scripts[1])


def test_more_gpus_than_a_node_has_is_slurms_own_word(cloud: Cloud) -> None:
    gpus = cloud.write_site(cloud.folder / "gpus.toml", slurm={"partition": "big"}, node={"gpus": 16})
    done = cloud.halfstep(
        "submit", "--site", str(gpus), *cloud.arguments("gpus", "gpus_per_node=16", "batch.global=64")
    )
    assert done.returncode == 2
    assert "SLURM would not take this job" in done.stderr


def test_a_node_that_cannot_be_reached_is_named(cloud: Cloud) -> None:
    job = cloud.submit("cut", *CELL, "watch.startup=40", site=cloud.slowed(0.1))
    job.until_state("RUNNING")
    # The ranks' port on the first node is cut off; SLURM's own are not.
    cloud.cluster.wait(lambda: "start 1" in job.log, "the script")
    first = 20000 + int(job.job) * 16 % 12000
    rule = ["INPUT", "-p", "tcp", "--dport", str(first), "!", "-i", "lo", "-j", "DROP"]
    assert cloud.cluster.on("n1", "iptables", "-I", *rule).returncode == 0
    said = r"^error: n2 (did not come to n1 within 32 s: rank 1 of 2|\(rank 1\) could not reach n1 within 32 s)"
    try:
        cloud.cluster.wait(lambda: re.search(said, job.log, re.MULTILINE), f"the sentence: {job.log}", 90)
        cloud.cluster.wait(lambda: "back into the queue" in job.log, f"the requeue: {job.log}", 60)
    finally:
        cloud.cluster.on("n1", "iptables", "-D", *rule)
    assert not (job.run / "attempts").exists(), "before anything was built"
    assert job.until_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert job.attempts == ["0001"]


def test_a_node_with_other_code_or_without_the_data_is_named_before_anything_is_built(cloud: Cloud) -> None:
    ours = Path(__file__).parents[2] / "launcher" / "system" / "files.py"
    other = cloud.folder / "files.py"
    other.write_text(ours.read_text() + "\n# another version\n")
    for mount, said in (
        (["--bind", str(other), str(ours)], "error: Halfstep's code is "),
        (["-t", "tmpfs", "tmpfs", str(cloud.data)], "error: n2: "),
    ):
        assert cloud.cluster.on("n2", "mount", *mount).returncode == 0
        try:
            job = cloud.submit(f"other-{mount[0].strip('-')}", *CELL)
            assert job.until_state("FAILED", "COMPLETED", seconds=90) == "FAILED", job.log
        finally:
            cloud.cluster.on("n2", "umount", mount[-1])
        [line] = re.findall(r"^error: .*$", job.log, re.MULTILINE)
        assert line.startswith(said), "said once"
        assert "n2" in line
        assert not (job.run / "attempts").exists()
        assert f"--- the run ends: {line.removeprefix('error: ')} (exit code 2)" in job.log


def test_a_folder_that_nodes_do_not_see_is_refused(cloud: Cloud) -> None:
    shared = cloud.write_site(cloud.folder / "shared.toml", environment={"shared": ["/shared"]})
    done = cloud.halfstep("submit", "--site", str(shared), *cloud.arguments("unseen"))
    assert done.returncode == 2
    assert "cannot be seen from the compute nodes" in done.stderr


def _rank(cloud: Cloud, node: str) -> int:
    """Return the rank on a node: the process that runs train.py."""
    [rank] = [
        pid for pid in cloud.cluster.processes(node)
        if any(word.endswith("train.py") for word in psutil.Process(pid).cmdline()[1:3])
    ]  # fmt: skip
    return rank
