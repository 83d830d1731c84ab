"""Send runs to SLURM: write their directories and the script, and submit it, or refuse before anything is queued."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from halfstep.launcher.config.load import Request
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.rundir.lease import lease
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.submit import jobs, render, slurm
from halfstep.launcher.submit.job import Job
from halfstep.launcher.system.files import append, cannot_write, open_append, write_atomic

Decided = Sequence[tuple[Path, Request, Plan]]
"""Run directories, and what was asked and decided for each."""


def check(job: Job, decided: Decided, text: str) -> None:
    """Raise RequestError for whatever would keep a job from running, as far as it can be seen from here."""
    job.check()
    queued = slurm.queue()
    for path, _, plan in decided:
        plan.require_allowed()
        run_directory.refuse_another_run(path, plan)
        done = Run(path).finished
        if done and done.run_id == plan.run_id and len(decided) == 1:
            raise RequestError(
                f"{path} is finished",
                where=f"out={path}",
                fix="its summary.json has the result; another out starts from scratch",
            )
        living = [queued_job for queued_job in jobs.alive(path, queued) if queued_job.job not in job.behind]
        if living:
            raise RequestError(
                f"job {living[0].job} is for this run already, and is {living[0].state.lower()}",
                where=f"out={path}",
                fix=f"--after {living[0].job} queues behind it; `halfstep jobs cancel {living[0].job}` ends it",
            )
        if job.behind and plan.to_dict() != Run(path).plan.to_dict():
            raise RequestError(
                "what is queued behind a job of the same run has to be the same plan",
                where=f"--after {job.behind[0]}, out={path}",
                fix="submit the changed run when that job has ended",
            )
    slurm.check(job, text)


def send(job: Job, decided: Decided) -> str:
    """Check, write and submit; return the job's number."""
    text = render.script(job)
    check(job, decided, text)
    for path, request, plan in decided:
        if job.behind:
            continue  # who is before us in this directory may hold it, and has written the same
        with lease(path):
            run_directory.write_plan(path, request, plan)
    with cannot_write(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.array:
            write_atomic(job.array.list, "".join(f"{run}\n" for run in job.array.runs))
        write_atomic(job.script, text, mode=0o600)  # a site's variables and set-up are nobody else's
        for path, _, _ in decided:
            os.close(open_append(path / "jobs.jsonl"))  # what cannot be written down is not queued
        number = slurm.submit(job)
        line = slurm.sbatch_line(job)
        for index, (path, _, _) in enumerate(decided):
            own = f"{number}_{index}" if job.array else number
            row = {"job": own, "time": time.time(), "script": str(job.script), "command": line}
            append(path / "jobs.jsonl", json.dumps(row) + "\n")
    return number
