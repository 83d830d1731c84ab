"""The folder that is made of a checkpoint: new, whole or not there, and never over something else."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from halfstep.launcher.data.publish import appearing
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.export.survey import size


def absolute(to: Path) -> Path:
    """Return the folder that `--to` names; raises RequestError where something is there already."""
    target = Path(os.path.abspath(to.expanduser()))
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise RequestError(
            f"{target} exists" + (" and is not empty" if target.is_dir() else ""),
            where=f"--to {to}",
            fix="name a folder that does not exist yet, or remove this one yourself",
        )
    return target


@contextlib.contextmanager
def filling(target: Path, needed: int) -> Iterator[Path]:
    """Give a folder to fill that becomes `target` when the block ends well; nothing is left of it otherwise.

    Raises RefusedError where `needed` bytes are not free.
    """
    there = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RefusedError(
            f"it needs {size(needed)}, and {size(free)} are free",
            where=f"--to {target}",
            fix="free some space, or name a folder on another disk with --to",
        )
    try:
        with appearing(target, "--to") as folder:
            yield folder
    except FileExistsError:
        raise RequestError(
            f"{target} was made by somebody else meanwhile", where=f"--to {target}", fix="name another folder"
        ) from None
