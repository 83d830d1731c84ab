"""The command `halfstep VERB`: one function a verb, which reads its words and calls the chapter that does the work.

halfstep data prepare --source stdlib --out data/stdlib --vocab-size 4096
halfstep plan model=gpt2-124m data=data/stdlib zero=2 precision=fp16
halfstep run model=gpt2-nano data=data/stdlib zero=2 precision=fp16
halfstep study run zero-x-precision
halfstep submit --site gpu nodes=2 model=gpt2-1.5b data=/shared/data zero=2 precision=bf16
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path

from halfstep.launcher import topology
from halfstep.launcher.cli import checkpoints, job_list, planning, running, studies
from halfstep.launcher.errors import EXIT_NUMERICS, EXIT_REFUSED, HalfstepError, Interrupted
from halfstep.launcher.system.files import explained, reason
from halfstep.launcher.system.terminal import say, say_json, say_text


def main(words: list[str]) -> int:
    """Run one verb and return the exit code; a HalfstepError becomes its three lines, with --debug its traceback."""
    arguments, extra = _parser().parse_known_args(words)
    if extra and not hasattr(arguments, "words"):
        _parser().parse_args(words)  # says which word it does not know, and exits
    try:
        return arguments.verb(arguments, [*getattr(arguments, "words", []), *extra])
    except HalfstepError as error:
        if arguments.debug:
            raise
        return _end(error)
    except BrokenPipeError:
        return 0  # the reader of our output has gone (`| head`): nothing is wrong, and nobody to tell
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return Interrupted.exit_code
    except Exception as error:
        if arguments.debug:
            raise
        return _end(explained(error, f"halfstep {' '.join(words)}"))


def _end(error: HalfstepError) -> int:
    with contextlib.suppress(OSError):  # stderr may be what cannot be written
        say(*str(error).splitlines(), error=True)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="halfstep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(debug=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    _data_verbs(verbs.add_parser("data", help="prepare or inspect a corpus"), common)
    planning.add(verbs, common)
    running.add(verbs, common)
    job_list.add(verbs, common)
    studies.add(verbs, common)
    verify = verbs.add_parser(
        "verify",
        help="prove that every (stage, precision) cell trains the same model here",
        description="Train tiny models in every (ZeRO stage, precision) cell, on one rank and two, and compare each "
        "with a plain PyTorch mixed-precision trainer and with stage 1. Exit code 76 where one differs.",
        parents=[common],
    )
    verify.add_argument("--all", action="store_true", help="every combination of conditions, not the subset")
    verify.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="zero=0|3, precision=fp16, ..."
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
    checkpoints.add(verbs, common)
    doctor = verbs.add_parser("doctor", help="check what a run needs", parents=[common])
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine's CPU for the planner, once: some seconds, best with nothing else running",
    )
    doctor.set_defaults(verb=_doctor)
    return parser


def _data_verbs(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    prepare = verbs.add_parser(
        "prepare",
        help="tokenise text to disk",
        description="Read text, make tokens of it, and write them as a folder that runs read. A file's kind follows "
        "from its name, whatever the case: .jsonl .ndjson .jsonlines .json (one object a line), .csv, .tsv and "
        ".parquet are tables of documents, everything else is one document of UTF-8 text; .gz .zst .xz .bz2 may stand "
        "behind all but parquet. Links are followed, every file is read once, and what is left out is said.",
        parents=[common],
    )
    prepare.add_argument(
        "--source", required=True, help="stdlib, a file, a folder, a quoted glob, or a hub id (hub:OWNER/NAME)"
    )
    prepare.add_argument("--out", required=True, type=Path, help="the folder to make")
    prepare.add_argument("--vocab-size", type=int, help="train SentencePiece with this many tokens")
    prepare.add_argument(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="use this one instead: a Hugging Face tokenizer, a SentencePiece model or its folder, a prepared corpus",
    )
    prepare.add_argument(
        "--field", default="text", help="the field or column that holds the text; meta.text: a field inside another"
    )
    prepare.add_argument(
        "--format",
        choices=("auto", "text", "jsonl", "csv", "tsv", "parquet"),
        default="auto",
        help="what the files hold, where their names do not say it",
    )
    prepare.add_argument("--skip-bad", action="store_true", help="leave out and count rows that hold no text")
    prepare.add_argument(
        "--allow-lossy", action="store_true", help="take a tokenizer that loses more than 1 %% of the text"
    )
    prepare.add_argument("--validation-fraction", type=float, default=0.01, help="share of the tokens held back")
    prepare.add_argument("--workers", type=int, help="processes (default: one a core)")
    prepare.add_argument("--json", action="store_true", help="print the manifest as JSON")
    prepare.set_defaults(verb=_data_prepare)
    inspect = verbs.add_parser("inspect", help="verify every byte, show counts and a sample", parents=[common])
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--json", action="store_true", help="print the counts as JSON")
    inspect.set_defaults(verb=_data_inspect)


def _data_prepare(arguments: argparse.Namespace, words: list[str]) -> int:
    topology.prefer_cpu()  # DeepSpeed's dataset format brings DeepSpeed's accelerator with it
    from halfstep.launcher.data.prepare import prepare
    from halfstep.launcher.data.show import render

    manifest = prepare(
        arguments.source,
        arguments.out,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        field=arguments.field,
        format=arguments.format,
        skip_bad=arguments.skip_bad,
        allow_lossy=arguments.allow_lossy,
        validation=arguments.validation_fraction,
        workers=arguments.workers,
        progress=True,
    )
    say_json(manifest) if arguments.json else say(*render(manifest))
    return 0


def _data_inspect(arguments: argparse.Namespace, words: list[str]) -> int:
    topology.prefer_cpu()
    from halfstep.launcher.data.show import inspect, render

    found = inspect(arguments.directory)
    say_json(found) if arguments.json else say_text("\n".join([*render(found), ""]))
    return 0


def _verify(arguments: argparse.Namespace, words: list[str]) -> int:
    from halfstep.launcher.parity import cases, gate, verdict

    chosen = cases.select(cases.every_case() if arguments.all else cases.default_cases(), arguments.only)
    outcome = gate.verify(chosen, repairs=not arguments.without_repairs, quiet=arguments.json)
    here, kept = topology.describe(1, 1), None
    try:
        kept = verdict.store(here, outcome.cells) if outcome.repairs else None
    except OSError as error:  # what was found counts all the same
        say(f"the verdict cannot be kept for a study to ask: {reason(error)}", error=True)
    if arguments.json:
        tree = {"ok": outcome.ok, "conditions": verdict.conditions(here), "seconds": outcome.seconds}
        tree |= {"repairs": outcome.repairs, "not_run": [dataclasses.asdict(case) for case in outcome.not_run]}
        say_json({**tree, "cells": outcome.cells})
    else:
        say(*gate.table(outcome))
        if kept:
            say(f"verdict for these versions and this hardware: {kept}")
    return 0 if outcome.ok else EXIT_NUMERICS


def _numerics(arguments: argparse.Namespace, words: list[str]) -> int:
    from halfstep.launcher.metrics import numerics_history, numerics_report, plots  # matplotlib takes its time

    run = numerics_history.read(arguments.run)
    picture = arguments.out or arguments.run / "numerics.png"
    failure = None
    try:
        plots.write(run, picture)
    except HalfstepError as error:
        failure = error  # what the run tells is printed all the same
    if arguments.json:
        found = {**numerics_history.to_dict(run), "picture": None if failure else str(picture)}
        say_json(found, indent=None)
    else:
        say(*numerics_report.lines(run), *([] if failure else ["", f"picture {picture}"]))
    if failure:
        raise failure
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from halfstep.launcher.doctor.measure import measure
    from halfstep.launcher.forecast.hardware import folder

    file = folder() / "this-cpu.toml"
    row = measure(file)
    if arguments.json:
        say_json(row)
        return 0
    say(f"this CPU, one of {row['measured_ranks']} rank(s), into {file}")
    for name, unit in (("fp32", "FLOP/s"), ("half", "FLOP/s in bf16"), ("fp16", "FLOP/s"), ("bandwidth", "bytes/s"),
                       ("link", "bytes/s"), ("link_latency", "s"), ("storage", "bytes/s")):  # fmt: skip
        if name in row:
            say(f"  {name:<14} {row[name]:.3g} {unit}")
    return 0


def _doctor(arguments: argparse.Namespace, words: list[str]) -> int:
    topology.prefer_cpu()
    from halfstep.launcher.doctor import checks

    if arguments.measure:
        return _measure(arguments)
    findings = checks.examine(Path.cwd())
    if arguments.json:
        say_json([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            remedy = [f"      {'':<14} try: {finding.fix}"] if finding.fix else []
            say(f"{finding.status:>4}  {finding.name:<14} {finding.detail}", *remedy)
    return EXIT_REFUSED if any(finding.status == checks.FAIL for finding in findings) else 0
