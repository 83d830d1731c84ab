"""Readers of what is no file: SLURM's answers, words of the verbs, variables of ranks and of faults, times."""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import mutate
from mutations.driver import Case, Reader, command

from halfstep.launcher import fault_injection, topology
from halfstep.launcher.submit import slurm, times


def all_readers(folder: Path, corpus: Path) -> list[Reader]:
    """Return the readers of what is no file."""
    return [*_of_slurm(), _words_of_verbs(folder, corpus), _ranks(), _faults(), _times()]


ANSWERS = {
    "squeue": "12|RUNNING|None|n[1-2]|1:00|main|halfstep:/runs/one\n"
    "13_4|PENDING|Priority||1:00|main|halfstep:/runs/a/runs-1.txt\n",
    "scontrol": "PartitionName=main Default=YES MaxTime=1-00:00:00 MaxNodes=4 TotalNodes=8 State=UP\n",
    "sinfo": "6000\n500000+\n",
    "sbatch": "4711;cluster\n",
}


def _of_slurm() -> list[Reader]:
    def with_answer(call: Callable[[], Any]) -> Callable[[Case], Any]:
        def read(case: Case) -> Any:
            text = case.given.decode("utf-8", errors="replace")
            kept = slurm.subprocess.run, slurm.shutil.which
            slurm.subprocess.run = lambda command, **_: subprocess.CompletedProcess(command, 0, text, "")
            slurm.shutil.which = lambda name: f"/bin/{name}"
            try:
                return call()
            finally:
                slurm.subprocess.run, slurm.shutil.which = kept

        return read

    def cases(name: str) -> Callable[[random.Random], Case]:
        def draw_one(draw: random.Random) -> Case:
            what, content = mutate.of_lines(ANSWERS[name].encode(), draw)
            return Case(what=f"{name}: {what}", given=content)

        return draw_one

    def judge_queue(case: Case, seen: list[slurm.Queued]) -> str | None:
        lines = case.given.decode("utf-8", errors="replace").splitlines()
        for item in seen:
            if not any(
                line.startswith(f"{item.job}|{item.state}|") and line.endswith(f"halfstep:{item.run}") for line in lines
            ):
                return f"a job that is none: {item!r}"[:200]
        return None

    def judge_partitions(case: Case, seen: list[slurm.Partition]) -> str | None:
        numbers = [value for item in seen for value in (item.seconds, item.nodes) if value is not None]
        return None if all(isinstance(value, int) and value >= 0 for value in numbers) else f"limits {numbers}"

    class Sent:
        script = Path("/runs/one/job.sbatch")

        def dependency(self) -> list[str]:
            return []

    sent: Any = Sent()
    return [
        Reader(name="squeue", read=with_answer(slurm.queue), cases=cases("squeue"), judge=judge_queue, count=300),
        Reader(
            name="scontrol",
            read=with_answer(slurm.partitions),
            cases=cases("scontrol"),
            judge=judge_partitions,
            count=300,
        ),
        Reader(
            name="sinfo",
            read=with_answer(lambda: slurm.node_memory(None)),
            cases=cases("sinfo"),
            judge=lambda case, seen: None if seen is None or 0 <= seen < 10**15 else f"{seen} MB",
            count=150,
        ),
        Reader(
            name="sbatch",
            read=with_answer(lambda: slurm.submit(sent)),
            cases=cases("sbatch"),
            judge=lambda case, seen: None if re.fullmatch(r"\d+(_\d+)?", seen) else f"job {seen!r}",
            count=150,
        ),
    ]


# --- words and variables


def _words_of_verbs(folder: Path, corpus: Path) -> Reader:
    there = folder / "empty"
    there.mkdir()
    (there / "plan.json").write_text("{}")
    request = ["model=gpt2-nano", f"data={corpus}", "batch.global=8", "sequence=64"]
    lines = [
        ["jobs", "@"],
        ["jobs", "logs", "@"],
        ["jobs", "cancel", "@"],
        ["jobs", "-n", "@", "logs", str(there)],
        ["checkpoint", "list", "@"],
        ["checkpoint", "verify", "@", "--step", "@"],
        ["checkpoint", "verify", str(there)],
        ["checkpoint", "convert", "@", "--to", str(folder / "to"), "--ranks", "@"],
        ["checkpoint", "export", "@", "--to", str(folder / "to"), "--max-shard-size", "@"],
        ["numerics", "@"],
        ["numerics", str(there), "--out", "@"],
        ["study", "status", "@"],
        ["study", "report", "@", "--price", "@"],
        ["study", "run", "--dry-run", "zero-x-precision", f"data={corpus}", "@"],
        ["study", "run", "--dry-run", "@"],
        ["study", "run", "--dry-run", "zero-x-precision", f"data={corpus}", "zero=@"],
        ["plan", "score", "@"],
        ["plan", "score", "--rows", "@", "--predict", str(folder / "predicted.csv")],
        ["plan", *request, "--price", "@"],
        ["plan", *request, "--time-limit", "@"],
        ["plan", "--search", "hardware=H100", *request, "nodes=@", "gpus=@"],
        ["run", "--dry-run", *request, "--hostfile", "@"],
        ["run", "--dry-run", *request, "out=@"],
        ["run", "--dry-run", "@"],
        ["submit", "--dry-run", *request, "--site", "@"],
        ["submit", "--dry-run", *request, "--site", "cpu", "--time", "@"],
        ["submit", "--dry-run", *request, "--site", "cpu", "--partition", "@"],
        ["submit", "--dry-run", *request, "--site", "cpu", "--each", "@"],
        ["submit", "--dry-run", *request, "--site", "cpu", "--each", "seed=@"],
        ["submit", "--dry-run", *request, "--site", "cpu", "out=@"],
    ]

    def cases(draw: random.Random) -> Case:
        line = draw.choice(lines)
        texts = [item.replace("\0", "").replace("\ud800", "\udcff") for item in mutate.TEXTS]
        values = (
            *texts,
            *map(str, mutate.NUMBERS),
            "9" * 5000,
            str(there),
            str(folder),
            "/dev/zero",
            "nan",
            "0,1",
            "1,1",
        )
        arguments = [word.replace("@", draw.choice(values)) for word in line]
        return Case(what=" ".join(arguments)[:100], given=arguments)

    def read(case: Case) -> int:
        here, path = os.getcwd(), os.environ["PATH"]
        os.chdir(there)
        os.environ["PATH"] = str(there)  # whatever the words are, no program is started
        try:
            return command(case.given)
        finally:
            os.chdir(here)
            os.environ["PATH"] = path

    def judge(case: Case, code: int) -> str | None:
        leaked = [item for item in there.iterdir() if mutate.MARKER in item.name]
        for item in there.iterdir():
            if item.name not in ("plan.json",):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        return f"it wrote {leaked[0]}" if leaked else None if code in (0, 2, 3) else f"exit code {code}"

    return Reader(name="words of the verbs", read=read, cases=cases, judge=judge, count=900)


RANKS = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x1)",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2],m3",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
    "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu",
}  # fmt: skip


def _ranks() -> Reader:
    sets = (
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        tuple(name for name in RANKS if name.startswith("SLURM_")),
        tuple(name for name in RANKS if name.startswith("OMPI_")),
    )
    values = (*(item for item in mutate.TEXTS if "\0" not in item), *map(str, mutate.NUMBERS), "9" * 5000,
              "n[1-99999999]", "n[1-9][1-9999999]", "n[",
              "n]", ",", "[1-2]", "n[9-1]", "n[1-]", "2(x3),1", "(x)")  # fmt: skip

    def cases(draw: random.Random) -> Case:
        names = [
            *draw.choice(sets),
            "OMP_NUM_THREADS",
            "MASTER_ADDR",
            "MASTER_PORT",
            "CUDA_VISIBLE_DEVICES",
            "DS_ACCELERATOR",
        ]
        environ = {name: RANKS[name] for name in names if draw.random() < 0.9}
        name = draw.choice(names)
        environ[name] = draw.choice(values)
        return Case(what=f"{name}={environ[name][:50]!r}", given=environ)

    def read(case: Case) -> topology.Rank:
        environ = dict(case.given)
        rank = topology.from_environment(environ)
        topology.prepare_environment(rank, environ)
        assert environ["RANK"].isdigit()
        return rank

    def judge(case: Case, rank: topology.Rank) -> str | None:
        if not 0 <= rank.rank < rank.world_size <= 2**20 or not 0 <= rank.local_rank < rank.local_world_size:
            return f"{rank!r}"
        name = {"launcher": "RANK", "srun": "SLURM_PROCID", "mpirun": "OMPI_COMM_WORLD_RANK"}.get(rank.source)
        said = case.given.get(name or "", "0").strip()
        return None if said == str(rank.rank) or int(said) == rank.rank else f"{name}={said!r} was read as {rank.rank}"

    return Reader(name="variables of ranks", read=read, cases=cases, judge=judge, count=600)


def _faults() -> Reader:
    def cases(draw: random.Random) -> Case:
        what, content = mutate.of_lines(
            draw.choice((b"fwd:1:7:nan\n", b"save.sync:1:20:kill9,bwd:*:7-9:inf\n", b"step:*:1-:sleep=2\n")), draw
        )
        return Case(what=what, given=content.decode("utf-8", errors="surrogateescape").replace("\0", "")[:-1])

    def read(case: Case) -> str | None:
        kept = os.environ.get(fault_injection.VARIABLE)
        os.environ[fault_injection.VARIABLE] = case.given
        try:
            return fault_injection.set_here()
        finally:
            os.environ.pop(fault_injection.VARIABLE)
            if kept is not None:
                os.environ[fault_injection.VARIABLE] = kept

    def judge(case: Case, said: str | None) -> str | None:
        if not said:
            return None
        number = r"\d+(\.\d+)?"
        form = rf"[a-z.]+:(\*|-?\d+):(\*|\d+(-(\d+)?)?):[a-z]+\d*(=({number}(e[+-]?\d+)?))?"
        odd = [item for item in said.split(",") if not re.fullmatch(form, item.strip())]
        return f"{odd[0]!r} was taken for a fault"[:200] if odd else None

    return Reader(name="faults on purpose", read=read, cases=cases, judge=judge, count=300)


def _times() -> Reader:
    def cases(draw: random.Random) -> Case:
        what, content = mutate.of_lines(
            draw.choice((b"90\n", b"12:00:00\n", b"2-12\n", b"1-02:03:04\n", b"1:30\n")), draw
        )
        return Case(what=what, given=content.decode("utf-8", errors="replace").removesuffix("\n"))

    def read(case: Case) -> int | None:
        try:
            return times.seconds(case.given)
        except ValueError:
            return None

    def judge(case: Case, seen: int | None) -> str | None:
        if seen is None:
            return None
        days, _, rest = case.given.rpartition("-")
        parts = [int(item) for item in rest.split(":")]
        hours = [*parts, 0, 0][:3] if days or len(parts) == 3 else [0, *parts, 0][:3]
        expected = ((int(days or 0) * 24 + hours[0]) * 60 + hours[1]) * 60 + hours[2]
        return None if seen == expected else f"{expected} s were read as {seen}"

    return Reader(name="times of SLURM", read=read, cases=cases, judge=judge, count=200)
