"""What a process is given by whoever started it: files that it may open, numbers in its environment."""

import contextlib
import re
import resource
from collections.abc import Mapping

from halfstep.launcher.errors import TopologyError

OPEN_FILES = 2**16
"""Files that a rank may have open, where the system lets it."""


def check_numbers(environ: Mapping[str, str]) -> None:
    """Raise TopologyError for a port or a number of threads that is none; what reads them later does not say which."""
    port = environ.get("MASTER_PORT")
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise TopologyError(
            f"MASTER_PORT={port[:80]!r} is no port",
            where="the environment of this process",
            fix="name one from 1024 to 65535, or let the launcher set it",
        )
    threads = environ["OMP_NUM_THREADS"]
    if not re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", threads):
        raise TopologyError(
            f"OMP_NUM_THREADS={threads[:80]!r} is no number of threads",
            where="the environment of this process",
            fix="unset it, or name how many threads a rank may use",
        )


def allow_open_files(least: int = 64) -> None:
    """Let this process open as many files as the system allows: every other rank takes some.

    Raises TopologyError where that is fewer than `least`, with which libraries fail in the middle of things.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= least:
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return
    raise TopologyError(
        f"this process may open {hard} files, and a rank needs {least} at least",
        where="ulimit -Hn",
        fix="allow more: ulimit -n 1024, in /etc/security/limits.conf or by the batch system",
    )
