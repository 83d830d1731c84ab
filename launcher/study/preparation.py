"""Make what a study needs before its first cell: the steps of [[prepare]] whose result is not there yet."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from halfstep.launcher.errors import Interrupted, RequestError
from halfstep.launcher.study.study_file import Study
from halfstep.launcher.system import assets


def prepare(study: Study, *, may: bool, say: Callable[[str], None]) -> None:
    """Run the steps that are left, one after another, in the current folder.

    Raises RequestError where a step fails, leaves nothing, or may not be run now and would have to be.
    """
    left = [step for step in study.prepare if not Path(step.makes).exists()]
    if left and not may:
        commands = [shlex.join(["halfstep", *step.run]) for step in left]
        raise RequestError(
            f"the study needs {left[0].makes}, which is not there yet",
            where=f"[[prepare]] in {study.source}",
            fix=f"`halfstep study run` makes it; or run {'; '.join(f'`{command}`' for command in commands)}",
        )
    for number, step in enumerate(left, 1):
        command = shlex.join(["halfstep", *step.run])
        say(f"preparing, {number} of {len(left)}: {command}")
        paths = [str(assets.source_root()), os.environ.get("PYTHONPATH", "")]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run([sys.executable, "-m", "halfstep", *step.run], env=environ, stdout=sys.stderr)
        if done.returncode < 0 or done.returncode == Interrupted.exit_code:
            raise Interrupted(f"stopped while {command} ran", where=step.makes, fix="start the same command again")
        if done.returncode or not Path(step.makes).exists():
            what = f"ended with code {done.returncode}" if done.returncode else f"made no {step.makes}"
            raise RequestError(
                f"a step before the cells {what}",
                where=f"[[prepare]] in {study.source}: {command}",
                fix="what it printed above says why; what is there already is not made again",
            )
