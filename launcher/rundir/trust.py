"""Whose a run directory is: what others may write needs consent, and the ranks of a launch share a secret in it."""

import contextlib
import grp
import os
import pwd
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfstep.launcher.checkpoint import start
from halfstep.launcher.config import mixture
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import cannot_write

CONSENT = "--trust"
"""The word by which a user agrees to a run directory that others own or may write."""
CONSENT_VARIABLE = "HALFSTEP_TRUST"
"""Names the run directory that was agreed to, for the ranks that `halfstep run --trust` or a job starts."""
SECRET_VARIABLE = "HALFSTEP_SECRET"
"""Set by `halfstep run` for its ranks; others find a secret in their run directory."""
SECRET_FILE = ".secret"
_DECIDING = ("plan.json", "request.toml", "ds_config.json", "origins.json", SECRET_FILE)


def require_own(run: Path, *, consent: bool) -> None:
    """Raise RequestError where a run directory, or a file in it that decides what runs, is in other hands.

    What a run does is what its directory says: whoever can write that decides what runs as this user.
    """
    if consent or os.environ.get(CONSENT_VARIABLE) == str(run):
        return
    for place in (run, *(run / name for name in _DECIDING)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if why := _in_other_hands(place.lstat()):
                raise RequestError(
                    f"{place} {why}, who could decide what runs as {user_name(os.geteuid())}",
                    where=f"run directory {run}",
                    fix=f"look at its request.toml; {CONSENT} takes it as it is, and so does making it yours "
                    "(chown, chmod go-w)",
                )


def _in_other_hands(status: os.stat_result) -> str | None:
    """Return who else owns something or may write it; root may do everything anyway."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to {user_name(status.st_uid)}"
    if stat.S_ISLNK(status.st_mode):
        return None  # its permissions are those of what it points to
    if status.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if status.st_mode & stat.S_IWGRP and not _private(status.st_gid):
        return f"can be written by the group {_group(status.st_gid)}"
    return None


def _private(group: int) -> bool:
    """Tell whether a group is this user's alone, as systems make one for each user: then its rights are the user's."""
    return _group(group) == user_name(os.geteuid())


def user_name(number: int) -> str:
    """Return what a user is called; the number where nobody is."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return f"user {number}"


def _group(number: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return f"group {number}"


def beyond_request(spec: RunSpec, plan: Plan) -> str | None:
    """Return what a plan does that its request did not ask for, if anything: foreign code, and places elsewhere."""
    if plan.trust_remote_code and not spec.trust_remote_code:
        return "trust_remote_code"
    data, weights = plan.data, plan.model.weights
    asked_for = [part.path for part in mixture.parts(spec.data or "")] or [spec.data]
    if data.path != spec.data or [corpus.path for corpus in data.corpora] != asked_for:
        return f"data from {data.corpora[0].train_prefix}"
    for corpus in data.corpora:
        for prefix in (corpus.train_prefix, corpus.validation_prefix):
            if not (prefix is None or Path(prefix).is_relative_to(corpus.path) or prefix == corpus.path):
                return f"data from {corpus.train_prefix}"
    named = spec.model.name.removeprefix("hf:")
    of_a_run = named.startswith(start.PREFIX) and start.split(weights or "")[0] == start.split(named)[0]
    if weights is not None and not of_a_run and weights not in (named, str(Path(named).parent)):
        return f"weights from {weights}"
    asked, own = {*_texts(spec.ds), spec.nvme_path}, _own_config(spec)
    for text in _texts(plan.deepspeed):
        if ("/" in text or text.startswith(("~", ".."))) and text not in asked and text not in own:
            return f"a DeepSpeed key that names {text}"
    return None


def _own_config(spec: RunSpec) -> str:
    """Return the text of the user's DeepSpeed file, as far as there is one and it is still there."""
    with contextlib.suppress(OSError, ValueError):
        return foreign.read_text(Path(spec.ds_config), follow=True) if spec.ds_config else ""
    return ""


def _texts(tree: Any) -> Iterator[str]:
    """Yield every text in nested lists and dictionaries."""
    if isinstance(tree, str):
        yield tree
    for below in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _texts(below)


def secret(run: Path, environ: Mapping[str, str] = os.environ) -> bytes:
    """Return the secret that the ranks of a launch share; the first rank to ask makes it, readable by its user alone.

    Raises RequestError where it cannot be kept from others.
    """
    if chosen := environ.get(SECRET_VARIABLE):
        return chosen.encode()
    file = run / SECRET_FILE
    with cannot_write(run):
        run.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not os.path.lexists(file):
            _make(file)
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise RequestError(
                f"{file} is not a file that only {user_name(os.geteuid())} can read",
                where="the secret that keeps strangers from joining a run",
                fix=f"remove it, or set {SECRET_VARIABLE} to the same long random text for all ranks "
                "(for a file system without permissions)",
            )
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _make(file: Path) -> None:
    """Write a new secret so that it appears whole, and only if no other rank was faster."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32) + "\n")
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(temporary, file)
        except OSError:  # another rank was faster, or a file system without hard links
            if not os.path.lexists(file):
                temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
