"""SLURM's own commands: submit, look, cancel; what they say when they refuse is passed on word for word."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.submit.job import COMMENT, Job
from halfstep.launcher.submit.times import clock, seconds
from halfstep.launcher.system.files import reason

_SECONDS = 120
"""How long one of SLURM's commands may take; their own limits are shorter."""
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job as squeue shows it."""

    job: str
    """Of an array's task `123_4`."""
    state: str
    reason: str
    """Why it waits, or which nodes it has."""
    run: str
    """What its comment names: a run directory, or an array's folder."""
    left: str
    partition: str

    @property
    def waits(self) -> bool:
        """Whether it is not running."""
        return self.state in _PENDING


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The limits of a partition; None where it has none."""

    name: str
    seconds: int | None
    nodes: int | None
    default: bool
    state: str


def sbatch_line(job: Job) -> list[str]:
    """Return the command that submits a job."""
    return ["sbatch", "--parsable", *job.dependency(), str(job.script)]


def check(job: Job, text: str) -> str:
    """Ask SLURM whether it would take a job, and return what it says of its start.

    Raises RequestError with the partition's limit that the job breaks, or in sbatch's own words.
    """
    _check_partition(job)
    done = _call(["sbatch", "--test-only"], text)
    said = _words(done)
    if done.returncode:
        raise RequestError(
            f"SLURM would not take this job: {said}",
            where=f"sbatch --test-only, site {job.site.name}",
            fix="`halfstep submit --dry-run` shows the script; `scontrol show partition` shows what may be asked for",
        )
    return said


def submit(job: Job) -> str:
    """Submit a script that has been written and return the job's number."""
    done = _call(sbatch_line(job))
    if done.returncode:
        raise RequestError(
            f"sbatch refused: {_words(done)}", where=shlex.join(sbatch_line(job)), fix="fix that, and submit again"
        )
    number = done.stdout.strip().partition(";")[0]
    if not is_job(number):
        raise RefusedError(
            f"sbatch did not name the job that it took: {number[:100]!r}",
            where=shlex.join(sbatch_line(job)),
            fix="`squeue --me` shows whether there is one",
        )
    return number


def is_job(text: str) -> bool:
    """Tell whether a text is the number of a job, or of a task of an array."""
    return re.fullmatch(r"[0-9]{1,12}(_[0-9]{1,9})?", text) is not None


def queue(*jobs: str) -> list[Queued]:
    """Return this user's jobs that are runs of ours and have not ended, those of `jobs` alone where any are named."""
    chosen = [f"--jobs={','.join(jobs)}"] if jobs else ["--me"]
    form = "%i|%T|%r|%N|%L|%P|%k"  # the comment last: it may hold anything
    done = _call(["squeue", "--noheader", "--array", "--states=all", *chosen, f"--format={form}"])
    if done.returncode:
        if jobs and "Invalid job id" in done.stderr:
            return []
        raise RefusedError(f"squeue failed: {_words(done)}", where="squeue", fix="is SLURM up? `sinfo` tells")
    queued = []
    for line in done.stdout.splitlines():
        parts = line.split("|", 6)
        if len(parts) < 7:
            continue  # a line that is no job: a warning of the site's
        job, state, waits_for, nodes, left, partition, comment = parts
        if is_job(job) and comment.startswith(COMMENT) and state in (*_PENDING, "RUNNING", "COMPLETING"):
            why = waits_for if state in _PENDING else nodes
            run = comment.removeprefix(COMMENT)
            queued.append(Queued(job=job, state=state, reason=why, run=run, left=left, partition=partition))
    return queued


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs."""
    done = _call(["scancel", *jobs])
    if done.returncode:
        raise RequestError(f"scancel refused: {_words(done)}", where=f"scancel {' '.join(jobs)}", fix="check the job")


def partitions() -> list[Partition]:
    """Return the partitions of the cluster and their limits."""
    done = _call(["scontrol", "--oneliner", "show", "partition"])
    if done.returncode:
        raise RefusedError(f"scontrol failed: {_words(done)}", where="scontrol", fix="is SLURM up? `sinfo` tells")
    listed = []
    for line in done.stdout.splitlines():
        values = {key: value for key, given, value in (word.partition("=") for word in line.split()) if given}
        if "PartitionName" not in values:
            continue
        limits = [values.get(name, "") for name in ("MaxNodes", "TotalNodes")]
        listed.append(
            Partition(
                name=values["PartitionName"],
                seconds=_limit(values.get("MaxTime", "UNLIMITED")),
                nodes=min((int(limit) for limit in limits if re.fullmatch("[0-9]{1,9}", limit)), default=None),
                default=values.get("Default") == "YES",
                state=values.get("State", "UP"),
            )
        )
    return listed


def node_memory(partition: str | None) -> int | None:
    """Return the MB of the largest node of a partition, or of all."""
    chosen = [f"--partition={partition}"] if partition else []
    done = _call(["sinfo", "--noheader", "--format=%m", *chosen])
    sizes = [size.rstrip("+") for size in done.stdout.split()]
    return max((int(size) for size in sizes if re.fullmatch("[0-9]{1,15}", size)), default=None)


def _limit(text: str) -> int | None:
    """Return a partition's time limit in seconds; None for UNLIMITED, and for a word that is no time."""
    try:
        return seconds(text)
    except ValueError:
        return None


def _check_partition(job: Job) -> None:
    known = partitions()
    asked = job.site.slurm.partition
    names = asked.split(",") if asked else []
    where = f"slurm.partition of site {job.site.name}, or --partition"
    for name in names:
        if name not in [partition.name for partition in known]:
            has = ", ".join(partition.name for partition in known)
            raise RequestError(f"there is no partition {name!r}", where=where, fix=f"this cluster has: {has}")
    chosen = [partition for partition in known if partition.name in names or (not names and partition.default)]
    wanted, nodes = seconds(job.site.slurm.time), job.plan.topology.nodes
    fitting = [
        partition
        for partition in chosen
        if wanted <= (partition.seconds or wanted) and nodes <= (partition.nodes or nodes)
    ]
    for partition in chosen if not fitting else []:
        if partition.seconds is not None and wanted > partition.seconds:
            raise RequestError(
                f"a time limit of {job.site.slurm.time} is over the {clock(partition.seconds)} of partition "
                f"{partition.name}",
                where=f"slurm.time of site {job.site.name}, or --time",
                fix=f"--time {clock(partition.seconds)}: a run that needs longer requeues and resumes",
            )
        if partition.nodes is not None and nodes > partition.nodes:
            raise RequestError(
                f"{nodes} nodes are more than the {partition.nodes} of partition {partition.name}",
                where="nodes",
                fix=f"nodes={partition.nodes}, or another --partition",
            )
    memory, has = _megabytes(job.site.slurm.memory), None
    if memory:
        has = node_memory(asked)
    if memory and has and memory > has:
        raise RequestError(
            f"{job.site.slurm.memory} of memory a node is more than the {has} MB of the largest node",
            where=f"slurm.memory of site {job.site.name}",
            fix='slurm.memory = "0" takes all that a node has',
        )


def _megabytes(text: str | None) -> int | None:
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text or "", re.IGNORECASE)
    if not match:
        return None
    return int(int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2].upper()])


def _call(command: list[str], text: str | None = None) -> "subprocess.CompletedProcess[str]":
    if shutil.which(command[0]) is None:
        raise RefusedError(
            f"{command[0]} is not here: this is no host that submits to SLURM",
            where="PATH",
            fix="log in to the cluster; `halfstep submit --dry-run` shows the script without it",
        )
    # Variables like SBATCH_PARTITION win over what a script says.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            env=environ,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RefusedError(
            f"{command[0]} did not answer within {_SECONDS} s",
            where=shlex.join(command),
            fix="is SLURM up? `scontrol ping` tells; `squeue --me` shows what it has taken all the same",
        ) from None
    except OSError as error:
        raise RefusedError(
            f"{command[0]} cannot be started: {reason(error)}", where=shlex.join(command), fix="check it on this host"
        ) from None


def _words(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return "; ".join(re.sub(r"^(sbatch|squeue|scontrol|scancel): (error: )?", "", line) for line in lines) or "no word"
