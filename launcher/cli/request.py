"""What the verbs that take a request share: run keys as `key=value`, a run file, `--ds-config FILE`."""

import argparse
from typing import Any

from halfstep.launcher.config.load import Request, load
from halfstep.launcher.config.schema import run_keys


def add(
    verbs: Any, common: argparse.ArgumentParser, name: str, text: str, *, description: str = "", also: str = ""
) -> argparse.ArgumentParser:
    """Add a verb that takes a request; `text` says what it does, `also` what else it takes."""
    keys = "\n".join(f"  {key:<28} {sentence}" for key, sentence in run_keys().items())
    parser = verbs.add_parser(
        name,
        help=text,
        description=description or text,
        parents=[common],
        epilog=f"run keys:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    also = f" | {also}" if also else ""
    parser.add_argument("words", nargs="*", metavar=f"RUN.toml | key=value{also}")
    parser.add_argument("--ds-config", metavar="FILE", help="a DeepSpeed JSON used instead of the composition")
    return parser


def arguments_of(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Return the arguments of a request, `--ds-config` among them, which the parser took out."""
    return [*arguments, *([] if options.ds_config is None else [f"--ds-config={options.ds_config}"])]


def read(options: argparse.Namespace, arguments: list[str], *, data: bool = True) -> Request:
    """Read the request; `data`: whether it has to name a corpus."""
    return load(arguments_of(options, arguments), data=data)
