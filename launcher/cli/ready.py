"""The verb `task make`: tasks that need no network, made on the spot.

halfstep task make translation --pair en-de --out data/translation
halfstep eval runs/mine --task data/translation/task.toml
"""

import argparse
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system.terminal import say, say_json

KINDS = ("sentiment", "translation", "generation")


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command's parser."""
    inner = verbs.add_parser("task", help="make a task to train on and to judge models by").add_subparsers(
        required=True, metavar="VERB"
    )
    text = "write rows to train on, rows held out, text for a tokenizer, and a task file for `halfstep eval --task`"
    make = inner.add_parser("make", help=text, description=text, parents=[common])
    make.add_argument("kind", choices=KINDS, help="what is to be learnt")
    make.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    make.add_argument("--pair", metavar="XX-YY", help="of translation: languages (default: en-de)")
    make.add_argument(
        "--source",
        type=Path,
        metavar="PATH",
        help="translation: a folder of message catalogues (default: the system's); sentiment: vaderSentiment-0.5.zip "
        "(default: templates); generation: a folder of Python files (default: the standard library)",
    )
    make.add_argument("--rows", type=int, metavar="N", help="training rows at most (default: all)")
    make.add_argument("--seed", type=int, default=0, metavar="S", help="decides the splits and the order (default: 0)")
    make.add_argument("--json", action="store_true", help="print what was made as JSON")
    make.set_defaults(verb=_make)


def _make(arguments: argparse.Namespace, _: list[str]) -> int:
    if arguments.pair is not None and arguments.kind != "translation":
        raise RequestError("--pair belongs to translation", where="halfstep task make", fix="leave it out")
    if arguments.rows is not None and arguments.rows < 1:
        raise RequestError("that many rows are none", where=f"--rows {arguments.rows}", fix="1 or more")
    topology.prefer_cpu()
    from halfstep.launcher.ready_tasks import continuation, sentiment, task_folder, translation

    if arguments.kind == "translation":
        made = translation.make(arguments.pair or "en-de", arguments.source)
    elif arguments.kind == "sentiment":
        made = sentiment.make(arguments.source, arguments.seed)
    else:
        made = continuation.make(arguments.source, arguments.seed)
    about = task_folder.write(arguments.out, made, arguments.seed, arguments.rows)
    if arguments.json:
        say_json(about)
        return 0
    rows = ", ".join(f"{count:,} {split}" for split, count in about["rows"].items())
    say(f"{arguments.out}: {rows}", about["selection"], f"licence: {about['licence']}")
    say(f"judge by it: halfstep eval DIR --task {arguments.out / 'task.toml'}")
    return 0
