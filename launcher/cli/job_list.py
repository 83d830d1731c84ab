"""The verbs on jobs: halfstep jobs, jobs logs, jobs cancel."""

import argparse
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.launcher.system.terminal import of_log, say, say_json, say_text, table


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command."""
    text = "list runs with what SLURM says of their jobs and how far they are"
    parser = verbs.add_parser(
        "jobs",
        help=text,
        description=f"{text}; `halfstep jobs logs RUN [-f]` prints what one says, `halfstep jobs cancel RUN` ends it",
        parents=[common],
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="logs | cancel | RUN",
        help="what to do, and the run directories or jobs it is about",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="logs: go on printing what is added")
    parser.add_argument("-n", "--lines", type=int, default=40, metavar="N", help="logs: the last N (default: 40)")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(verb=_jobs)


def _jobs(arguments: argparse.Namespace, operands: list[str]) -> int:
    if operands[:1] == ["logs"]:
        return _logs(arguments, operands[1:])
    if operands[:1] == ["cancel"]:
        return _cancel(operands[1:])
    from halfstep.launcher.submit import jobs

    rows = jobs.survey(Path(word) for word in operands)
    if arguments.json:
        say_json([row.to_dict() for row in rows])
        return 0
    if not rows:
        say("no jobs, and no submitted runs under runs/")
        return 0
    rows_shown = [["job", "state", "step", "loss", "tok/s", "saved", "starts", "left", "run"]]
    for row in rows:
        step = "-" if row.step is None else f"{row.step}/{row.steps or '?'}"
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        saved = "-" if row.checkpoint is None else str(row.checkpoint)
        about = row.run + (f"  ({row.reason})" if row.reason else "")
        shown = [row.job or "-", row.state, step, loss, speed, saved, str(row.attempts), row.left or "-", about]
        rows_shown.append(shown)
    say(*table(rows_shown))
    return 0


def _logs(arguments: argparse.Namespace, operands: list[str]) -> int:
    from halfstep.launcher.submit import jobs

    if len(operands) != 1:
        raise RequestError("whose log?", where="halfstep jobs logs", fix="halfstep jobs logs RUN, or a job's number")
    run, _ = jobs.find(operands[0])
    jobs.follow(jobs.log_of(run), lambda text: say_text(of_log(text)), lines=arguments.lines, follow=arguments.follow)
    return 0


def _cancel(operands: list[str]) -> int:
    from halfstep.launcher.submit import jobs, slurm

    if not operands:
        raise RequestError("cancel what?", where="halfstep jobs cancel", fix="name run directories or jobs")
    chosen = [(word, *jobs.find(word)) for word in operands]
    for word, run, numbers in chosen:
        if not numbers:
            raise RequestError(f"{word} has no job", where=str(run), fix="`halfstep jobs` lists them")
    for _, run, numbers in chosen:
        slurm.cancel(numbers)
        say(f"job {', '.join(numbers)} cancelled; {run} resumes from its newest checkpoint when submitted again")
    return 0
