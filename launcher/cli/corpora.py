"""The verbs on corpora: data prepare, data inspect."""

import argparse
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.system.terminal import say, say_json, say_text


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command."""
    inner = verbs.add_parser("data", help="prepare or inspect a corpus").add_subparsers(required=True, metavar="VERB")
    prepare = inner.add_parser(
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
        choices=("auto", "text", "jsonl", "csv", "tsv", "parquet", "sft"),
        default="auto",
        help="what the files hold, where their names do not say it; sft: JSON lines or parquet of conversations, "
        "rows with prompt and completion or with messages",
    )
    prepare.add_argument(
        "--template",
        choices=("chatml", "alpaca", "plain", "tokenizer"),
        help="how conversations are written (default: the tokenizer's own template where it has one, else plain)",
    )
    prepare.add_argument(
        "--targets", choices=("all", "last"), help="which turns of the assistant are learnt (default: all)"
    )
    prepare.add_argument("--skip-bad", action="store_true", help="leave out and count rows that hold no text")
    prepare.add_argument(
        "--allow-lossy", action="store_true", help="take a tokenizer that loses more than 1 %% of the text"
    )
    prepare.add_argument("--validation-fraction", type=float, default=0.01, help="share of the tokens held back")
    prepare.add_argument("--workers", type=int, help="processes (default: one a core)")
    prepare.add_argument("--json", action="store_true", help="print the manifest as JSON")
    prepare.set_defaults(verb=_prepare)
    inspect = inner.add_parser("inspect", help="verify every byte, show counts and a sample", parents=[common])
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--json", action="store_true", help="print the counts as JSON")
    inspect.set_defaults(verb=_inspect)


def _prepare(options: argparse.Namespace, arguments: list[str]) -> int:
    topology.prefer_cpu()  # DeepSpeed's dataset format brings DeepSpeed's accelerator with it
    from halfstep.launcher.data.prepare import prepare
    from halfstep.launcher.data.show import render

    manifest = prepare(
        options.source,
        options.out,
        vocab_size=options.vocab_size,
        tokenizer=options.tokenizer,
        field=options.field,
        format=options.format,
        template=options.template,
        targets=options.targets,
        skip_bad=options.skip_bad,
        allow_lossy=options.allow_lossy,
        validation=options.validation_fraction,
        workers=options.workers,
        progress=True,
    )
    say_json(manifest) if options.json else say(*render(manifest))
    return 0


def _inspect(options: argparse.Namespace, arguments: list[str]) -> int:
    topology.prefer_cpu()
    from halfstep.launcher.data.show import inspect, render

    counts = inspect(options.directory)
    say_json(counts) if options.json else say_text("\n".join([*render(counts), ""]))
    return 0
