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

_WAYS = ("data", "task", "lm_eval")
_OPTIONS = {
    "sequences": ("data",),
    "sequence": ("data",),
    "documents": ("data",),
    "batch": ("data", "lm_eval"),
    "examples": ("task",),
    "step": ("task", "lm_eval"),
    "lm_eval_path": ("lm_eval",),
    "limit": ("lm_eval",),
}
"""Of each option, the ways of judging that it belongs to."""


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command's parser; `verbs` is what its `add_subparsers` returned."""
    text = (
        "measure an exported model's loss on the validation split of a corpus, as training does (--data), or what an "
        "exported model or a run's newest checkpoint makes of tasks: of task files (--task), or of those of "
        "lm-evaluation-harness (--lm-eval)"
    )
    evaluate = verbs.add_parser(
        "eval", help="judge a model on a corpus or by tasks", description=text, parents=[common]
    )
    evaluate.add_argument(
        "folder", metavar="DIR", type=Path, help="a folder that `checkpoint export` made; but for --data also a run"
    )
    evaluate.add_argument("--data", metavar="D", help="a prepared corpus")
    evaluate.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="the first N; 0 = all (default: as many as the run's evaluations; of examples all)",
    )
    evaluate.add_argument("--sequence", type=int, metavar="N", help="tokens in each (default: as in the run)")
    evaluate.add_argument(
        "--documents",
        choices=("plain", "masked"),
        help="masked: each document by itself; plain: whole sequences (default: as in the run)",
    )
    evaluate.add_argument("--batch", type=int, metavar="N", help="sequences at a time (default: 8)")
    evaluate.add_argument(
        "--task", action="append", type=Path, default=[], metavar="FILE", help="a task file; may be given several times"
    )
    evaluate.add_argument("--examples", type=Path, metavar="FILE", help="write each example's answer, as JSON lines")
    evaluate.add_argument("--step", type=int, metavar="N", help="the run's checkpoint of this step (default: newest)")
    evaluate.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="to compute in (default: that of the export, or of the run)"
    )
    evaluate.add_argument(
        "--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between them (halfstep[eval])"
    )
    evaluate.add_argument(
        "--lm-eval-path", type=Path, metavar="FOLDER", help="a folder with task files (YAML) for --lm-eval"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="of --lm-eval: examples of each task (default: all)")
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    evaluate.set_defaults(verb=_eval)


def _eval(arguments: argparse.Namespace, _: list[str]) -> int:
    ways = [way for way in _WAYS if getattr(arguments, way)]
    if len(ways) != 1:
        raise RequestError(
            f"{' and '.join(map(_flag, ways))} are different ways to judge a model" if ways else "nothing to judge by",
            where="halfstep eval",
            fix="give one of --data CORPUS, --task FILE and --lm-eval TASKS",
        )
    for name, fitting in _OPTIONS.items():
        if getattr(arguments, name) is not None and ways[0] not in fitting:
            raise RequestError(
                f"{_flag(name)} belongs to {' and '.join(map(_flag, fitting))}",
                where="halfstep eval",
                fix=f"leave {_flag(name)} out",
            )
    for name in ("batch", "limit"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise RequestError(f"{value} is too few", where=f"--{name} {value}", fix=f"--{name} 1 or more")
    topology.prefer_cpu()  # DeepSpeed's dataset format brings DeepSpeed's accelerator with it
    return {"data": _on_data, "task": _by_tasks, "lm_eval": _by_harness}[ways[0]](arguments)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _on_data(arguments: argparse.Namespace) -> int:
    from halfstep.launcher.export.evaluate import evaluate

    done = evaluate(
        arguments.folder,
        arguments.data,
        sequences=arguments.sequences,
        batch=8 if arguments.batch is None else arguments.batch,
        sequence=arguments.sequence,
        dtype=arguments.dtype,
        documents=arguments.documents,
    )
    if done.tokenizer != "same":
        say("warning: whether the corpus was made with the model's tokenizer is not known", error=True)
    if arguments.json:
        say_json(dataclasses.asdict(done))
        return 0
    loss = "not finite" if done.loss is None else f"{done.loss:.6f}"
    perplexity = "-" if done.perplexity is None else f"{done.perplexity:,.2f}"
    say(f"loss {loss}  perplexity {perplexity}")
    apart = ", documents apart" if done.documents == "masked" else ""
    say(f"{done.tokens:,} tokens: {done.sequences} sequences of {done.sequence}{apart}, {done.dtype} on {done.device}")
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


def _by_harness(arguments: argparse.Namespace) -> int:
    from halfstep.launcher.export.harness import evaluate

    done = evaluate(
        arguments.folder,
        [name.strip() for name in arguments.lm_eval.split(",")],
        include=arguments.lm_eval_path,
        limit=arguments.limit,
        batch=8 if arguments.batch is None else arguments.batch,
        step=arguments.step,
        dtype=arguments.dtype,
    )
    if arguments.json:
        say_json(done)
        return 0
    say(f"lm-evaluation-harness {done['harness']}, {done['dtype']} on {done['device']}")
    for task, values in done["results"].items():
        examples = done["examples"].get(task)
        say(task if examples is None else f"{task}: {examples:,} examples")
        rows = [
            [f"  {metric}", number(value), *_error_of(metric, values)]
            for metric, value in values.items()
            if "_stderr" not in metric
        ]
        say(*table(rows, left=(0,)))
    return 0


def _error_of(metric: str, values: dict[str, float | None]) -> list[str]:
    name, space, chosen = metric.partition(" ")
    error = values.get(f"{name}_stderr{space}{chosen}")
    return ["" if error is None else f"± {error:.4f}"]


def number(value: float | None) -> str:
    """Return a metric as people read it; a dash where it is not finite, or has no meaning."""
    return "-" if value is None else f"{value:,.4f}"


def _left_out(result: dict[str, Any]) -> str:
    cut = f", {result['cut']} of them with a shortened prompt" if result["cut"] else ""
    return cut + (f", {result['skipped']} left out as too long" if result["skipped"] else "")


def _pace(result: dict[str, Any]) -> str:
    place = f"step {result['step']}, " if result["step"] is not None else ""
    return (
        f"{place}{result['answer_tokens']:,} tokens in {result['seconds']:.1f} s ({result['tokens_per_second']:,.0f} "
        f"tokens/s), {result['dtype']} on {result['device']}"
    )
