"""The verb `eval`: an exported model, or a run, judged on a corpus or by tasks.

halfstep eval models/mine --data data/stdlib
halfstep eval runs/mine --task translation/task.toml --examples answers.jsonl
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system.files import write_atomic
from halfstep.launcher.system.terminal import say, say_json, table

_OF_DATA = ("sequences", "sequence", "batch")
_OF_TASKS = ("examples", "step")


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command's parser; `verbs` is what its `add_subparsers` returned."""
    text = (
        "measure an exported model's loss on the validation split of a corpus, as training does (--data), or what an "
        "exported model or a run's newest checkpoint makes of tasks (--task)"
    )
    evaluate = verbs.add_parser(
        "eval", help="judge a model on a corpus or by tasks", description=text, parents=[common]
    )
    evaluate.add_argument(
        "folder", metavar="DIR", type=Path, help="a folder that `checkpoint export` made; with --task also a run"
    )
    evaluate.add_argument("--data", metavar="D", help="a prepared corpus")
    evaluate.add_argument(
        "--sequences", type=int, metavar="N", help="the first N; 0 = all (default: as many as the run's evaluations)"
    )
    evaluate.add_argument("--sequence", type=int, metavar="N", help="tokens in each (default: as in the run)")
    evaluate.add_argument("--batch", type=int, metavar="N", help="sequences at a time (default: 8)")
    evaluate.add_argument(
        "--task", action="append", type=Path, default=[], metavar="FILE", help="a task file; may be given several times"
    )
    evaluate.add_argument("--examples", type=Path, metavar="FILE", help="write each example's answer, as JSON lines")
    evaluate.add_argument("--step", type=int, metavar="N", help="the run's checkpoint of this step (default: newest)")
    evaluate.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="to compute in (default: that of the export, or of the run)"
    )
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    evaluate.set_defaults(verb=_eval)


def _eval(arguments: argparse.Namespace, _: list[str]) -> int:
    if (arguments.data is None) == (not arguments.task):
        raise RequestError(
            "--data and --task are two ways to judge a model" if arguments.task else "nothing to judge the model by",
            where="halfstep eval",
            fix="give --data CORPUS or --task FILE",
        )
    for name in _OF_TASKS if arguments.data else _OF_DATA:
        if getattr(arguments, name) is not None:
            other = "--task" if arguments.data else "--data"
            raise RequestError(f"--{name} belongs to {other}", where="halfstep eval", fix=f"leave --{name} out")
    topology.prefer_cpu()  # DeepSpeed's dataset format brings DeepSpeed's accelerator with it
    return _on_data(arguments) if arguments.data else _by_tasks(arguments)


def _on_data(arguments: argparse.Namespace) -> int:
    from halfstep.launcher.export.evaluate import evaluate

    done = evaluate(
        arguments.folder,
        arguments.data,
        sequences=arguments.sequences,
        batch=8 if arguments.batch is None else arguments.batch,
        sequence=arguments.sequence,
        dtype=arguments.dtype,
    )
    if done.tokenizer != "same":
        say("warning: whether the corpus was made with the model's tokenizer is not known", error=True)
    if arguments.json:
        say_json(dataclasses.asdict(done))
        return 0
    loss = "not finite" if done.loss is None else f"{done.loss:.6f}"
    perplexity = "-" if done.perplexity is None else f"{done.perplexity:,.2f}"
    say(f"loss {loss}  perplexity {perplexity}")
    say(f"{done.tokens:,} tokens: {done.sequences} sequences of {done.sequence}, {done.dtype} on {done.device}")
    return 0


def _by_tasks(arguments: argparse.Namespace) -> int:
    from halfstep.launcher.export.judged import judge_folder

    results: list[dict[str, Any]] = []
    rows: list[str] = []

    def take(subject: Any, judged: Any) -> None:
        about = {"model": subject.model, "step": subject.step, "dtype": subject.dtype, "device": subject.device}
        results.append({**judged.to_dict(), **about})
        rows.extend(json.dumps({"task": judged.name, **row}, ensure_ascii=False) for row in judged.rows)

    judge_folder(arguments.folder, arguments.task, step=arguments.step, dtype=arguments.dtype, each=take)
    if arguments.examples is not None:
        write_atomic(arguments.examples, "".join(f"{row}\n" for row in rows))
    if arguments.json:
        say_json({"tasks": results})
        return 0
    for result in results:
        say(f"{result['name']}: {result['examples']:,} examples{_left_out(result)}, {_pace(result)}")
        say(*table([[f"  {name}", number(value)] for name, value in result["metrics"].items()], left=(0,)))
    return 0


def number(value: float | None) -> str:
    """Return a metric as people read it."""
    return "not finite" if value is None else f"{value:,.4f}"


def _left_out(result: dict[str, Any]) -> str:
    cut = f", {result['cut']} of them with a shortened prompt" if result["cut"] else ""
    return cut + (f", {result['skipped']} left out as too long" if result["skipped"] else "")


def _pace(result: dict[str, Any]) -> str:
    place = f"step {result['step']}, " if result["step"] is not None else ""
    return (
        f"{place}{result['answer_tokens']:,} tokens in {result['seconds']:.1f} s ({result['tokens_per_second']:,.0f} "
        f"tokens/s), {result['dtype']} on {result['device']}"
    )
