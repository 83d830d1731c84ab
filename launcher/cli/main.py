"""The command `halfstep VERB`: one module a family of verbs, and this one that picks the verb.

halfstep data prepare --source stdlib --out data/stdlib --vocab-size 4096
halfstep plan model=gpt2-124m data=data/stdlib zero=2 precision=fp16
halfstep run model=gpt2-nano data=data/stdlib zero=2 precision=fp16
halfstep study run zero-x-precision
halfstep submit --site gpu nodes=2 model=gpt2-1.5b data=/shared/data zero=2 precision=bf16
"""

import argparse
import contextlib

from halfstep.launcher.cli import checkpoints, corpora, job_list, judging, planning, proving, ready, running, studies
from halfstep.launcher.errors import HalfstepError, Interrupted
from halfstep.launcher.system.files import explained
from halfstep.launcher.system.terminal import say


def main(arguments: list[str]) -> int:
    """Run one verb and return the exit code; a HalfstepError becomes its three lines, with --debug its traceback."""
    options, extra = _parser().parse_known_args(arguments)
    if extra and not hasattr(options, "words"):
        _parser().parse_args(arguments)  # says which argument it does not know, and exits
    try:
        return options.verb(options, [*getattr(options, "words", []), *extra])
    except HalfstepError as error:
        if options.debug:
            raise
        return _end(error)
    except BrokenPipeError:
        return 0  # the reader of our output has gone (`| head`): nothing is wrong, and nobody to tell
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return Interrupted.exit_code
    except Exception as error:
        if options.debug:
            raise
        return _end(explained(error, f"halfstep {' '.join(arguments)}"))


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

    for family in (corpora, planning, running, job_list, studies, checkpoints, judging, ready, proving):
        family.add(verbs, common)
    return parser
