"""Folders that belong to this user alone: for compiled operators, verdicts, and what lives for one launch.

Named by XDG_CACHE_HOME or by HOME; where neither can be written, a folder of this user's under TMPDIR.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import processes


def cache(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder where Halfstep keeps one kind of thing between runs; it need not exist yet.

    Raises RequestError where the only place left, under TMPDIR, is not this user's.
    """
    if chosen := environ.get("XDG_CACHE_HOME"):
        return Path(chosen).absolute() / "halfstep" / name
    home = _home(environ)
    if home is not None and _writable(home / ".cache" / "halfstep"):
        return home / ".cache" / "halfstep" / name
    return temporary() / "cache" / name


def make(folder: Path, variable: str | None = None) -> Path:
    """Make a cache folder and return it; `variable` is what named it, XDG_CACHE_HOME or HOME unless told.

    Raises RequestError where it cannot be made, naming the variable that moves it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        named = variable or ("XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "HOME")
        raise RequestError(
            f"{folder} cannot be made: {error.strerror}",
            where=f"{named}={os.environ.get(named, '')}",
            fix=f"let {variable or 'XDG_CACHE_HOME'} name a folder that you may write",
        ) from None
    return folder


def temporary() -> Path:
    """Return this user's own folder under TMPDIR, made where it is missing, which nobody else can read or write.

    Raises RequestError where somebody else has made it, or TMPDIR cannot be written.
    """
    fix = "let TMPDIR name a folder of yours"
    try:
        folder = Path(tempfile.gettempdir()) / f"halfstep-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise RequestError(
            f"no folder for what lives for one launch can be made: {error.strerror}", where="TMPDIR", fix=fix
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RequestError(f"{folder} is not a folder of this user alone", where="TMPDIR", fix=f"remove it, or {fix}")
    return folder


def scratch() -> Path:
    """Return a new folder for this process's lifetime; those of processes of this host that are gone are removed."""
    home, begin = temporary(), _here()
    for left in home.glob(f"{begin}-*"):
        pid, _, start = left.name.removeprefix(f"{begin}-").partition("-")
        living = processes.stat(int(pid)) if pid.isdecimal() else None
        if living is None or str(living.start) != start:
            shutil.rmtree(left, ignore_errors=True)
    own = processes.stat(os.getpid())
    folder = home / f"{begin}-{os.getpid()}-{own.start if own else 0}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remove_scratch() -> None:
    """Remove what `scratch` made for this process, if it did."""
    with contextlib.suppress(RequestError):
        for left in temporary().glob(f"{_here()}-{os.getpid()}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _here() -> str:
    """Return how the scratch folders begin whose processes can be seen from here: of this host and its numbering."""
    with contextlib.suppress(OSError):
        return f"launch-{os.uname().nodename}-{os.stat('/proc/self/ns/pid').st_ino}"
    return f"launch-{os.uname().nodename}-0"


def _home(environ: Mapping[str, str]) -> Path | None:
    with contextlib.suppress(RuntimeError):  # no HOME, and no entry in the list of users
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
        return home if home.is_dir() else None
    return None


def _writable(folder: Path) -> bool:
    """Tell whether a folder can be written, or made: its nearest ancestor that exists decides."""
    for there in (folder, *folder.parents):
        if there.exists():
            return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return False
