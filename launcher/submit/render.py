"""A job script from its template: every value is quoted for the shell on its way in, and none may be missing."""

import shlex
from collections.abc import Sequence
from typing import Any

import jinja2

from halfstep.launcher.submit.job import Job
from halfstep.launcher.system import assets


class Shell(str):
    """Text that is shell already, and goes into a script as it stands."""

    __slots__ = ()


def script(job: Job) -> str:
    """Return the text of a job's script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets.folder("slurm")),
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # of HTML; the shell's quoting is done by finalize
    )
    environment.filters["shell"] = Shell
    return environment.get_template(job.template).render(job.values())


def _quoted(value: Any) -> str:
    """Return a value as one word of a shell, a list as several."""
    if isinstance(value, Shell):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return shlex.join(str(item) for item in value)
    return shlex.quote(str(value))
