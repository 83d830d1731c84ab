"""The verbs on what a run has saved: `checkpoint list|verify|convert|export`, and `generate` on an export.

halfstep checkpoint export runs/a1b2 --to models/mine
halfstep generate models/mine --prompt "def main("
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.errors import EXIT_REQUEST, RequestError
from halfstep.launcher.system.terminal import say, say_json, say_text, table

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SHARD_SIZE = "5GB"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command's parser; `verbs` is what its `add_subparsers` returned."""
    _checkpoint_verbs(verbs.add_parser("checkpoint", help="list, verify, convert or export what a run saved"), common)
    text = "let an exported model continue a text"
    generate = verbs.add_parser("generate", help=text, description=text, parents=[common])
    generate.add_argument("folder", metavar="DIR", type=Path, help="a folder that `checkpoint export` made")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token each time (default)"
    )
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: all)")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (default: 0)")
    generate.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, laid out by the export's chat template"
    )
    generate.add_argument("--json", action="store_true", help="print text and counts as JSON")
    generate.set_defaults(verb=_generate)


def _checkpoint_verbs(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, what: Any, text: str) -> argparse.ArgumentParser:
        subparser = verbs.add_parser(name, help=text, description=text, parents=[common])
        subparser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
        subparser.set_defaults(verb=what)
        return subparser

    listing = verb("list", _list, "show a run's checkpoints by their manifests, without reading their contents")
    verify = verb("verify", _verify, "read every byte of a run's checkpoints and compare it with what was written")
    convert = verb("convert", _convert, "write a checkpoint for another number of ranks into a new run directory")
    export = verb("export", _export, "write a checkpoint as a folder that transformers loads")
    for subparser, default in ((verify, "all"), (convert, "the newest"), (export, "the newest")):
        subparser.add_argument(
            "--step", type=int, metavar="N", help=f"the checkpoint of this step (default: {default})"
        )
    for subparser in (convert, export):
        subparser.add_argument("--to", required=True, type=Path, metavar="DIR", help="the folder to make")
    convert.add_argument("--ranks", type=int, default=1, metavar="N", help="how many files (default: 1)")
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the weights (default: fp32, loses nothing)",
    )
    export.add_argument(
        "--max-shard-size", default=_SHARD_SIZE, metavar="SIZE", help=f"of one file (default: {_SHARD_SIZE})"
    )
    export.add_argument("--data", type=Path, metavar="DIR", help="where the run's corpus lies now, if it was moved")
    export.add_argument("--adapter", action="store_true", help="the adapters of train=lora alone, for peft")
    export.add_argument("--ema", action="store_true", help="the average of the weights (ema.decay), not compared")
    export.add_argument("--no-compare", action="store_true", help="do not load the export to compare its logits")
    for subparser in (listing, verify, convert, export):
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")


def _list(arguments: argparse.Namespace, _: list[str]) -> int:
    from halfstep.launcher.export import survey

    rows = survey.survey(arguments.run)
    if arguments.json:
        say_json([row.to_dict() for row in rows])
        return 0
    if not rows:
        say(f"{arguments.run} has no checkpoints")
        return 0
    lines = [["step", "written", "size", "ranks", "zero", "precision", "loss", "state"]]
    for row in rows:
        manifest = row.manifest
        about = ["-"] * 6
        if manifest is not None:
            about = [
                _moment(manifest.time),
                survey.size(manifest.bytes),
                str(manifest.world_size),
                str(manifest.zero),
                manifest.precision,
            ]
            about.append("-" if row.loss is None else f"{row.loss:.4f}")
        state = row.state + (f": {row.reason}" if row.reason else "")
        lines.append([str(row.step), *about, state])
    say(*table(lines, left=(len(lines[0]) - 1,)))
    say("manifests and sizes were looked at, contents were not: `halfstep checkpoint verify` reads them")
    return 0


def _verify(arguments: argparse.Namespace, _: list[str]) -> int:
    from halfstep.launcher.export import source, survey

    rows = [row for row in survey.survey(arguments.run) if row.state in (survey.GOOD, survey.DAMAGED)]
    if not rows:
        raise source.none_there(arguments.run)
    step: int | None = arguments.step
    if step is not None and step not in [row.step for row in rows]:
        raise source.no_such_step(arguments.run, step, [row.step for row in rows])
    done = []
    for row in rows:
        if step not in (None, row.step):
            continue
        done.append(survey.verified(row))
        if step is not None and done[-1].state == survey.GONE:
            left = [other.step for other in rows if other.step != step]
            raise source.no_such_step(arguments.run, step, left)
        if not arguments.json:
            say(_verdict(done[-1]))
    good = all(row.state in (survey.GOOD, survey.GONE) for row in done)
    if arguments.json:
        say_json({"ok": good, "checkpoints": [row.to_dict() for row in done]})
    return 0 if good else EXIT_REQUEST


def _verdict(row: Any) -> str:
    from halfstep.launcher.export.survey import GONE, size

    if row.reason:
        return f"step {row.step:>8}  {'gone' if row.state == GONE else 'DAMAGED'}  {row.reason}"

    rate = row.manifest.bytes / max(row.seconds, 1e-9) / 1e9
    return f"step {row.step:>8}  OK  {size(row.manifest.bytes)} in {row.seconds:.2f} s ({rate:.2f} GB/s)"


def _convert(arguments: argparse.Namespace, _: list[str]) -> int:
    from halfstep.launcher.export.convert import convert
    from halfstep.launcher.export.survey import size

    done = convert(arguments.run, arguments.to, step=arguments.step, ranks=arguments.ranks)
    if arguments.json:
        tree = {"folder": str(done.folder), "step": done.manifest.step, "bytes": done.manifest.bytes}
        tree |= {"from_ranks": done.from_ranks, "ranks": done.manifest.world_size, "random_states": done.random_states}
        say_json(tree)
        return 0
    say(f"{done.folder}: step {done.manifest.step}, {size(done.manifest.bytes)}, verified")
    say(f"ranks {done.from_ranks} -> {done.manifest.world_size}")
    if not done.random_states:
        say("the random states of the ranks fit their number alone and were left out; only dropout draws from them")
    say(f"it resumes with the same key=value words and out={done.run}")
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    limit = _bytes(arguments.max_shard_size)
    topology.prefer_cpu()
    from halfstep.launcher.export.survey import size

    options: dict[str, Any] = {"step": arguments.step, "dtype": arguments.dtype, "comparing": not arguments.no_compare}
    options["ema"] = arguments.ema
    if arguments.adapter:
        from halfstep.launcher.export import write_adapter

        done = write_adapter.export(arguments.run, arguments.to, **options)
    else:
        from halfstep.launcher.export import write_export

        options |= {"max_shard_bytes": limit, "data": arguments.data}
        done = write_export.export(arguments.run, arguments.to, **options)
    for warning in done.warnings:
        say(f"warning: {warning}", error=True)
    if arguments.json:
        say_json(done.to_dict())
        return 0
    weights = [name for name in done.files if name.endswith(".safetensors")]
    uncompared = (
        "not compared with the training engine" if arguments.no_compare or arguments.ema else "nothing to compare with"
    )
    tokenizer = "none"
    if done.tokenizer:
        ids = f"{done.tokenizer['checked_tokens']:,} ids checked against the corpus's own"
        tokenizer = f"{done.tokenizer['kind']}, {done.tokenizer['vocabulary']} tokens, {ids}"
    lines = {
        "folder": f"{done.folder} (step {done.step})",
        "weights": f"{done.parameters:,} parameters in {done.dtype}, {size(sum(done.files[name] for name in weights))} "
        f"in {len(weights)} file" + ("s" if len(weights) > 1 else ""),
        "tokenizer": tokenizer,
        **({"template": done.template} if done.template else {}),
        "compared": done.sentence or uncompared,
    }
    say(*(f"{name:<10} {text}" for name, text in lines.items()))
    return 0


def _generate(arguments: argparse.Namespace, _: list[str]) -> int:
    from halfstep.launcher.export.generate import generate

    done = generate(
        arguments.folder,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        chat=arguments.chat,
    )
    said = done.text if arguments.chat else f"{done.prompt}{done.text}"
    say_json(done.to_dict()) if arguments.json else say_text(f"{said}\n")
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise RequestError(
            f"{text!r} is no size of a file", where="--max-shard-size", fix="write it like 5GB, 500MB or 2GiB"
        )
    return count


def _moment(at: float) -> str:
    """Return when something was written, as people read it; a dash for a time that no calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "-"
