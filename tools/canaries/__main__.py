"""Show what the installed DeepSpeed does, canary by canary: `python -m tools.canaries [NAME ...]`.

One process on the CPU, models of one weight, seconds in all. Exit code 0 if everything is as documented, else 1.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.engine.ranks.distributed import quiet_deepspeed
from halfstep.launcher.errors import HalfstepError, nearest
from tools.canaries import CANARIES
from tools.canaries.bench import Canary, Seen


def main(arguments: list[str]) -> int:
    """Look at the canaries that are named, or at all of them, and return the exit code."""
    options = _parser().parse_args(arguments)
    known = {canary.name: canary for canary in CANARIES}
    if unknown := next((name for name in options.names if name not in known), None):
        close = nearest(unknown, known)
        _parser().error(f"no canary {unknown!r}; " + (f"did you mean {close[0]}?" if close else "--list names them"))
    chosen = [known[name] for name in options.names] or list(CANARIES)
    width = max(len(canary.name) for canary in chosen)
    if options.list:
        print("\n".join(f"{canary.name:<{width}}  {canary.sentence}" for canary in chosen))
        return 0
    rows = []
    try:
        with _one_rank():
            for canary in chosen:
                good, seen = look(canary)
                row = {"name": canary.name, "ok": good, "seen": seen}
                rows.append({**row, "sentence": canary.sentence, "changed": canary.changed})
                if not options.json:
                    print(f"{canary.name:<{width}}  {'as documented' if good else 'CHANGED'}: {seen}", flush=True)
                    if not good:
                        print(f"  documented: {canary.sentence} ({canary.reference})\n  to do: {canary.changed}")
    except HalfstepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    return 0 if all(row["ok"] for row in rows) else 1


def look(canary: Canary) -> Seen:
    """Look at one behaviour, without DeepSpeed's own output; what cannot be looked at any more has changed."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return canary.look()
        except Exception as error:  # another DeepSpeed may raise anything, and the others are still worth a look
            return False, f"it cannot be looked at: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Be the only rank of a process group on the CPU; it meets in a file, so that no port is needed."""
    # DeepSpeed demands LOCAL_RANK; LOCAL_SIZE would leave 69 MB of shared memory behind (T25).
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.pop("LOCAL_SIZE", None)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import transformers  # noqa: F401  its logger has to be there to be quieted

            quiet_deepspeed()
            opcache.prepare()
            dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
            deepspeed.init_distributed(verbose=False)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.canaries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="canaries to look at; all if none is named")
    parser.add_argument("--list", action="store_true", help="name them with what they say, and look at nothing")
    parser.add_argument("--json", action="store_true", help="print what was seen as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
