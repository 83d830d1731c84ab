"""The verb plan: decide about one run, search for the fastest way to make it, score what was predicted."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from halfstep.launcher.cli import request as requests
from halfstep.launcher.config import legal
from halfstep.launcher.errors import HalfstepError, RefusedError, RequestError
from halfstep.launcher.forecast import hardware, run_estimate, search, time_table
from halfstep.launcher.plan import alternatives, estimate, present
from halfstep.launcher.plan.decide import planned_topology, read_facts
from halfstep.launcher.plan.ds import packages
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import prediction_errors
from halfstep.launcher.system.terminal import say, say_json


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command."""
    text = "decide everything about a run, show it, and start nothing"
    parser = requests.add(
        verbs,
        common,
        "plan",
        text,
        description=f"{text}; `plan score` compares predictions with what was measured",
        also="score RUN...",
    )
    parser.set_defaults(verb=run)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--price", metavar="P", help="of one device-hour: print what the run costs")
    parser.add_argument("--time-limit", metavar="T", help="of one SLURM job, such as 12:00:00: print how many it takes")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank stage, offload, micro-batch and checkpointing by predicted time among those that fit; "
        "nodes=1,2,4 gpus=8 name what to try",
    )
    parser.add_argument("--rows", type=Path, metavar="IN.csv", help="with `plan score`: published runs to predict")
    parser.add_argument("--predict", type=Path, metavar="OUT.csv", help="with `plan score`: where predictions go")


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Decide and show, search, or score."""
    if arguments[:1] == ["score"]:
        return _score(options, arguments[1:])
    for name in ("rows", "predict"):
        if getattr(options, name):
            raise RequestError(
                f"--{name} belongs to `plan score`", where="the command line", fix="halfstep plan score --rows IN.csv"
            )
    terms = _terms(options)
    if options.search:
        return _search(options, arguments)
    request = requests.read(options, arguments, data=False)
    world = planned_topology(request.spec)
    facts = read_facts(request.spec, world, on_this_host=world.nodes == 1)
    plan = resolve(request, world, facts)
    missing = [dataclasses.asdict(rule) for rule in packages.missing(plan.deepspeed, plan.origins)]
    plan = dataclasses.replace(
        plan,
        time=estimate.time_of(plan, facts, request.spec.hardware, terms),
        refused_by=[*plan.refused_by, *missing],
    )
    if options.json:
        say_json(plan.to_dict())
    else:
        say(*present.lines(plan), *([] if plan.refused_by else _proof(plan)))
    return HalfstepError.exit_code if plan.refused_by else 0


def _proof(plan: Plan) -> list[str]:
    """Say what `halfstep verify` can show of a plan."""
    from halfstep.launcher.parity.cell import question_of

    question = question_of(plan, plan.topology)  # of the machine that is planned for
    if question.unknown:
        return ["", f"NOT PROVED: the parity gate does not know {', '.join(question.unknown)}"]
    varied = sorted({word for case in question.cases for word in case.keys})
    extra = f" with {', '.join(varied)}" if varied else ""
    count = len(question.cases)
    return ["", f"proof: {count} case{'s' if count > 1 else ''} of `halfstep verify`{extra}"]


def _terms(options: argparse.Namespace) -> run_estimate.Terms:
    from halfstep.launcher.submit.times import seconds

    limit = None
    if options.time_limit is not None:
        try:
            limit = seconds(options.time_limit)
        except ValueError as error:
            raise RequestError(
                f"--time-limit: {legal.shown(error)}", where="the command line", fix="--time-limit 12:00:00"
            ) from None
        if limit == 0:
            raise RequestError("--time-limit is zero", where="the command line", fix="--time-limit 12:00:00")
    return run_estimate.Terms(
        limit_seconds=limit,
        price=None if options.price is None else run_estimate.price(options.price),
    )


def _search(options: argparse.Namespace, arguments: list[str]) -> int:
    tried = alternatives.search_open(requests.arguments_of(options, arguments))
    if options.json:
        say_json(
            {
                "hardware": tried.device,
                "searched": len(tried.candidates),
                "fitting": len(tried.fitting),
                "candidates": [candidate.to_dict() for candidate in tried.candidates],
                "frontier": [candidate.to_dict() for candidate in search.frontier(tried.candidates)],
            }
        )
        return 0 if tried.fitting else RefusedError.exit_code
    tried.require_fitting()
    say(
        f"{len(tried.candidates)} candidates on {tried.device}, {len(tried.fitting)} fit; "
        "* nothing is faster with less memory"
    )
    say(*time_table.candidates(tried.candidates))
    say(f"the fastest: {' '.join(tried.fitting[0].arguments())}")
    return 0


def _score(options: argparse.Namespace, runs: list[str]) -> int:
    own = hardware.read_own()
    if options.rows is None:
        if options.predict is not None or not runs:
            raise RequestError(
                "there is nothing to score",
                where="the command line",
                fix="halfstep plan score RUNS..., or halfstep plan score --rows IN.csv --predict OUT.csv",
            )
        compared = [prediction_errors.run(Path(run)) for run in runs]
        if options.json:
            say_json([dataclasses.asdict(errors) for errors in compared])
        else:
            say(*prediction_errors.table(compared))
        return 0
    if runs:
        raise RequestError(
            f"{runs[0]!r} and --rows at once", where="the command line", fix="score runs, or rows, one at a time"
        )
    from halfstep.launcher.forecast.published import score  # read by no other command

    predictions = score.predict(options.rows, own)
    if options.predict is not None:
        score.write(predictions, options.predict)
    if options.json:
        say_json([dataclasses.asdict(prediction) for prediction in predictions])
    else:
        timed = sum(prediction.tokens_per_s_per_gpu is not None for prediction in predictions)
        where = f" in {options.predict}" if options.predict else ""
        say(f"{len(predictions)} rows, a speed for {timed}{where}")
    return 0
