"""The verbs on studies: halfstep study run, submit, status, report."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.config.load import Request
from halfstep.launcher.errors import EXIT_REFUSED, RequestError
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.decide import decide
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.submit import argv
from halfstep.launcher.submit.job import STARTERS
from halfstep.launcher.system.terminal import say, say_json, say_text
from halfstep.launcher.topology import Topology

_DATA = Path("data") / "stdlib"
"""Where a study without data prepares the standard library's sources, once for all studies of this folder."""
_VOCABULARY = 4096


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command."""
    from halfstep.launcher.study.study_file import ready

    text = "run a grid of ZeRO stages, precisions or anything else under controlled conditions, and report on it"
    listed = f"ready studies: {', '.join(ready())}; key=value overrides its [base], AXIS=A,B replaces an axis's values"
    parser = verbs.add_parser("study", help=text, description=text, epilog=listed)
    inner = parser.add_subparsers(required=True, metavar="VERB")
    for name, verb, said in (
        ("run", _run, "run here what has no result yet, one cell after another"),
        ("submit", _submit, "send what has no result yet to SLURM, as an array"),
    ):
        subparser = inner.add_parser(name, help=said, description=said, epilog=listed, parents=[common])
        subparser.add_argument("study", metavar="STUDY", help="a ready study's name, or a study file (.toml)")
        subparser.add_argument("words", nargs="*", metavar="key=value")
        subparser.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (default: studies/NAME)")
        subparser.add_argument("--retry", action="store_true", help="run again what failed")
        subparser.add_argument("--dry-run", action="store_true", help="print the cells and start nothing")
        subparser.add_argument("--force", action="store_true", help="also cells that are predicted not to fit")
        subparser.add_argument("--json", action="store_true", help="print what was done as JSON")
        subparser.set_defaults(verb=verb)
        if name == "run":
            subparser.add_argument(
                "--with", dest="starter", choices=argv.STARTERS, default="deepspeed", help="what starts ranks"
            )
            subparser.add_argument(
                "--no-gate", action="store_true", help="do not run the parity gate: cells stay unproved"
            )
        else:
            subparser.add_argument("--site", metavar="NAME", help="the cluster, as for `halfstep submit`")
            for option in ("time", "partition", "account", "qos", "constraint", "memory"):
                subparser.add_argument(f"--{option}", metavar=option.upper(), help="instead of the site's")
            subparser.add_argument("--with", dest="starter", choices=STARTERS, default="srun", help="what starts ranks")
            subparser.add_argument(
                "--at-once", type=int, metavar="N", default=0, help="how many cells may run at a time"
            )
    status = inner.add_parser("status", help="show how far every run is", parents=[common])
    status.add_argument("study", metavar="STUDY | DIR", help="the study's folder, or its name where it was started")
    status.add_argument("--watch", type=float, metavar="SECONDS", help="show it again and again until all have ended")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    status.set_defaults(verb=_status)
    report = inner.add_parser("report", help="write report.html, report.md, results.csv and .json", parents=[common])
    report.add_argument("study", metavar="STUDY | DIR", help="the study's folder, or its name where it was started")
    report.add_argument("--price", metavar="PRICE", help="of one device for one hour")
    report.add_argument("--json", action="store_true", help="print results.json")
    report.set_defaults(verb=_report)


def _read(
    arguments: argparse.Namespace, overrides: list[str], world: Callable[[Request], Topology]
) -> tuple[Any, Any, Path]:
    """Return the study, its cells and its folder; what is kept and what is new is said first."""
    from halfstep.launcher.study import grid, preparation, study_file, study_folder

    study = study_file.read(arguments.study, overrides)
    may = arguments.verb is _run and not arguments.dry_run
    preparation.prepare(study, may=may, say=lambda line: say(line, error=True))
    asked = {key for axis in study.axes for value in axis.values for key in value.keys}
    if "data" not in {*study.base, *asked}:
        study.base["data"] = str(_prepared(arguments.dry_run))

    def decided(request: Request) -> Plan:
        plan = decide(request, world(request), on_this_host=arguments.verb is _run)
        estimate.require_fit(plan, arguments.force)
        return plan

    cells = grid.cells(study, decided)
    where = study_folder.location(study, arguments.out)
    change = study_folder.compare(where, cells)
    if not arguments.json:
        refused = sum(cell.refused is not None for cell in cells)
        say(
            f"study {study.name}: {len(cells)} runs"
            + (f", {refused} refused by a rule" if refused else "")
            + f"; {where}"
        )
        if change.kept or change.left:
            say(f"of those, {change.kept} were part of it before and stay; {change.new} are new")
        if change.left:
            say(f"no part of it any more, and left where they are: {', '.join(change.left[:4])}"
                  + (f" and {len(change.left) - 4} more" if len(change.left) > 4 else ""))  # fmt: skip
    return study, cells, where


def _prepared(dry: bool) -> Path:
    """Return the standard library's corpus, prepared now if nobody has."""
    folder = _DATA.absolute()
    if not (folder / "manifest.json").is_file():
        if dry:
            raise RequestError(
                "the study names no data, and data/stdlib is not prepared yet",
                where="[base] data",
                fix=f"halfstep data prepare --source stdlib --out {_DATA} --vocab-size {_VOCABULARY}",
            )
        topology.prefer_cpu()  # DeepSpeed's dataset format brings DeepSpeed's accelerator with it
        from halfstep.launcher.data.prepare import prepare
        from halfstep.launcher.data.show import render

        say(f"the study names no data: preparing {_DATA}, once", error=True)
        for line in render(prepare("stdlib", folder, vocab_size=_VOCABULARY)):
            say(line, error=True)  # what is asked for as JSON comes alone
    return folder


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from halfstep.launcher.study import run_cells

    study, cells, where = _read(
        arguments, overrides, lambda request: topology.local_topology(request.spec.nodes, request.spec.gpus_per_node)
    )
    if arguments.dry_run:
        return _show(study, cells, as_json=arguments.json)

    def tell(line: str) -> None:
        if not arguments.json:
            say(line)

    done = run_cells.run(
        study, cells, where, starter=arguments.starter, retry=arguments.retry, gate=not arguments.no_gate, say=tell
    )
    refused = all(cell.refused is not None for cell in cells)
    if done.code == 0:
        from halfstep.launcher.study import report, sections

        made = sections.make(where)
        files = report.write(made)
        for line in ["", *sections.answer(made), "", f"report {files[0]}"]:
            tell(line)
    tell(f"{done.ran} run, {done.failed} of them failed; {done.kept} had a result already")
    if arguments.json:
        say_json(run_cells.to_dict(done, where))
    return EXIT_REFUSED if refused else done.code


def _submit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import shlex

    from halfstep.launcher.study import job_array
    from halfstep.launcher.submit import site_file, slurm

    names = ("time", "partition", "account", "qos", "constraint", "memory")
    chosen = site_file.read(arguments.site, {name: getattr(arguments, name) for name in names})
    study, cells, where = _read(arguments, overrides, lambda request: site_file.site_topology(chosen, request.spec))
    sent = job_array.submit(
        study,
        cells,
        where,
        chosen,
        starter=arguments.starter,
        at_once=arguments.at_once,
        retry=arguments.retry,
        dry=arguments.dry_run,
    )
    if arguments.json:
        listed = [
            {"job": array.number, "script": str(array.job.script), "runs": [str(run) for run in array.runs]}
            for array in sent
        ]
        say_json({"folder": str(where), "arrays": listed})
        return 0
    for array in sent:
        line = shlex.join(slurm.sbatch_line(array.job))
        if arguments.dry_run:
            say_text(f"{job_array.script(array)}\n$ {line}\n")
        else:
            say(f"$ {line}", f"job {array.number}: {len(array.cells)} runs, {array.job.folder}")
    if not sent:
        say("nothing to submit: every run has a result or a job")
    elif not arguments.dry_run:
        say(f"`halfstep study status {where}` shows how they do, `halfstep study report {where}` what came of it")
    return 0


def _show(study: Any, cells: Any, *, as_json: bool) -> int:
    if as_json:
        listed = [
            {"cell": cell.values, "seed": cell.seed, "words": cell.arguments, "refused": cell.refused} for cell in cells
        ]
        say_json({"study": study.name, "cells": listed})
        return 0
    for cell in cells:
        say(f"{cell.name} seed={cell.seed}" + (f"  REFUSED {cell.refused}" if cell.refused else ""))
    return 0


def _status(arguments: argparse.Namespace, operands: list[str]) -> int:
    from halfstep.launcher.study import collect, job_array, run_status, study_folder

    where = study_folder.find(arguments.study)
    while True:
        cells = study_folder.read(where)["cells"]
        queued = run_status.queue(where, cells)
        now = [(cell, run_status.of(cell, where, queued)) for cell in cells]
        if arguments.json:
            listed = [
                {"cell": cell["values"], "seed": cell["seed"], "run": cell["run"], **vars(state)} for cell, state in now
            ]
            say_json(listed)
        else:
            rows = [(collect.name_of(cell["values"]), cell["seed"], state) for cell, state in now]
            say(*job_array.table(rows))
            counts: dict[str, int] = {}
            for _, state in now:
                counts[state.status] = counts.get(state.status, 0) + 1
            say(", ".join(f"{count} {status}" for status, count in counts.items()))
        if arguments.watch is not None and arguments.watch <= 0:
            raise RequestError(f"--watch {arguments.watch:g} is no time", where="the command line", fix="--watch 5")
        if not arguments.watch or all(state.status in ("done", "failed", "refused") for _, state in now):
            return 0
        time.sleep(arguments.watch)


def _report(arguments: argparse.Namespace, operands: list[str]) -> int:
    from halfstep.launcher.study import report, report_data, sections, study_file, study_folder

    price = study_file.price(arguments.price, "--price")
    made = sections.make(study_folder.find(arguments.study), price)
    files = report.write(made)
    if arguments.json:
        say_text(report_data.as_json(made))
    else:
        say(*sections.answer(made), "", *map(str, files))
    return 0
