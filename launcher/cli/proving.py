"""The verbs that prove and examine: verify, numerics, doctor."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.errors import EXIT_NUMERICS, EXIT_REFUSED, HalfstepError, RefusedError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system.files import reason
from halfstep.launcher.system.terminal import say, say_json


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command."""
    verify = verbs.add_parser(
        "verify",
        help="prove that every (stage, precision) cell trains the same model here",
        description="Train tiny models in every (ZeRO stage, precision) cell, on one rank and two, and compare each "
        "with a plain PyTorch mixed-precision trainer and with stage 1. Exit code 76 where one differs.",
        parents=[common],
    )
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every combination of conditions, not the subset")
    verify.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="zero=0|3, precision=fp16, ..."
    )
    which.add_argument(
        "--run", metavar="DIR", type=Path, help="the cases of that run's own cell: optimizer, keys, compile and all"
    )
    verify.add_argument("--without-repairs", action="store_true", help="show DeepSpeed as it is; stores no verdict")
    verify.add_argument("--json", action="store_true", help="print the results as JSON")
    verify.set_defaults(verb=_verify)
    numerics = verbs.add_parser(
        "numerics",
        help="show a run's loss scale, its skipped steps and what fp16 loses",
        description="Print and plot the loss scale with the skipped steps and, layer by step, the gradients that fp16 "
        "loses with and without scaling.",
        parents=[common],
    )
    numerics.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    numerics.add_argument("--out", metavar="FILE.png", type=Path, help="the picture (default: RUN/numerics.png)")
    numerics.add_argument("--json", action="store_true", help="print every move and every reading as JSON")
    numerics.set_defaults(verb=_numerics)
    doctor = verbs.add_parser("doctor", help="check what a run needs", parents=[common])
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine's CPU for the planner, once: some seconds, best with nothing else running",
    )
    doctor.set_defaults(verb=_doctor)


def _verify(options: argparse.Namespace, arguments: list[str]) -> int:
    from halfstep.launcher.parity import cases, gate, verdict

    plan = None
    if options.run:
        plan, considered = _cases_of_run(options.run)
    else:
        considered = cases.every_case() if options.all else cases.default_cases()
    if options.without_repairs:  # one precision may not be run as DeepSpeed has it (rule fp16-autocast-needs-repairs)
        considered = [case for case in considered if case.precision != "fp16-autocast"]
    chosen = cases.select(considered, options.only)
    if options.all and not options.json:
        say(f"{len(chosen)} cases; {gate.estimate(chosen)}")
    outcome = gate.verify(chosen, repairs=not options.without_repairs, quiet=options.json)
    here, kept = topology.describe(1, 1), None
    try:
        kept = verdict.store(here, outcome.cells) if outcome.repairs else None
    except OSError as error:  # what was found counts all the same
        say(f"the verdict cannot be kept for a study to ask: {reason(error)}", error=True)
    if plan is not None and outcome.repairs:
        _note(options.run, plan, outcome.cells)
    if options.json:
        tree = {"ok": outcome.ok, "conditions": verdict.conditions(here), "seconds": outcome.seconds}
        tree |= {"repairs": outcome.repairs, "not_run": [dataclasses.asdict(case) for case in outcome.not_run]}
        say_json({**tree, "cells": outcome.cells})
    else:
        say(*gate.table(outcome))
        if kept:
            say(f"verdict for these versions and this hardware: {kept}")
    return 0 if outcome.ok else EXIT_NUMERICS


def _note(path: Path, plan: Plan, fresh: list[dict[str, Any]]) -> None:
    """Tell the summary of a run what was found of its cell, where it has one."""
    from halfstep.launcher.parity.standing import standing
    from halfstep.launcher.rundir.run_directory import note_proof

    stands = standing(plan, fresh)
    try:
        note_proof(path, stands.proved, stands.reason)
    except HalfstepError as error:  # another's run: what was found is shown all the same
        say(f"its summary is not told of it: {error.what}", error=True)


def _cases_of_run(path: Path) -> tuple[Plan, list[Any]]:
    """Return a run's plan and what proves its cell; raises RefusedError where the gate does not know all of it."""
    from halfstep.launcher.parity.cell import question_of
    from halfstep.launcher.rundir.run_reader import Run

    _, plan = Run(path).require_as_asked()
    question = question_of(plan)
    if question.unknown:
        raise RefusedError(
            f"the parity gate does not know {', '.join(question.unknown)}: this run can be proved by nothing",
            where=str(path),
            fix="compare it with a run that differs in nothing else, by `halfstep study`",
        )
    return plan, list(question.cases)


def _numerics(options: argparse.Namespace, arguments: list[str]) -> int:
    from halfstep.launcher.metrics import numerics_history, numerics_report, plots  # matplotlib takes its time

    run = numerics_history.read(options.run)
    picture = options.out or options.run / "numerics.png"
    failure = None
    try:
        plots.write(run, picture)
    except HalfstepError as error:
        failure = error  # what the run tells is printed all the same
    if options.json:
        say_json({**numerics_history.to_dict(run), "picture": None if failure else str(picture)}, indent=None)
    else:
        say(*numerics_report.lines(run), *([] if failure else ["", f"picture {picture}"]))
    if failure:
        raise failure
    return 0


def _measure(options: argparse.Namespace) -> int:
    from halfstep.launcher.doctor.measure import measure
    from halfstep.launcher.forecast.hardware import folder

    file = folder() / "this-cpu.toml"
    row = measure(file)
    if options.json:
        say_json(row)
        return 0
    say(f"this CPU, one of {row['measured_ranks']} rank(s), into {file}")
    for name, unit in (("fp32", "FLOP/s"), ("half", "FLOP/s in bf16"), ("fp16", "FLOP/s"), ("bandwidth", "bytes/s"),
                       ("link", "bytes/s"), ("link_latency", "s"), ("storage", "bytes/s")):  # fmt: skip
        if name in row:
            say(f"  {name:<14} {row[name]:.3g} {unit}")
    return 0


def _doctor(options: argparse.Namespace, arguments: list[str]) -> int:
    topology.prefer_cpu()
    from halfstep.launcher.doctor import checks

    if options.measure:
        return _measure(options)
    findings = checks.examine(Path.cwd())
    if options.json:
        say_json([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            remedy = [f"      {'':<14} try: {finding.fix}"] if finding.fix else []
            say(f"{finding.status:>4}  {finding.name:<14} {finding.detail}", *remedy)
    return EXIT_REFUSED if any(finding.status == checks.FAIL for finding in findings) else 0
