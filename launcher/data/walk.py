"""Find the files of a folder: links followed, every file once, and a list of what is left out."""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.data import formats
from halfstep.launcher.errors import RequestError

HIDDEN = "hidden files or folders"
DANGLING = "links to nothing"
REPEATED_FOLDER = "further names of the same folders"
REPEATED_FILE = "further names of the same files"
SPECIAL = "pipes, sockets or devices"
FOLDER = "folders"
_SHOWN = 10
"""Names that a manifest holds of each kind; all of them are counted."""

_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_Identity = tuple[int, int]


@dataclass(kw_only=True)
class LeftOut:
    """What was passed over, by kind."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, path: Path, top: Path) -> None:
        """Write down one path, named below `top`."""
        name = path.relative_to(top) if path.is_relative_to(top) else path
        self.names.setdefault(kind, []).append(os.fsencode(name).decode("utf-8", "replace"))

    def to_dict(self) -> dict[str, Any]:
        """Return counts and the first names of each kind."""
        return {
            kind: {"count": len(names), "names": sorted(names)[:_SHOWN]} for kind, names in sorted(self.names.items())
        }


def files_below(top: Path, left_out: LeftOut) -> list[Path]:
    """Return the regular files of a folder and of all folders in it, each once, in the order of their names.

    Links to folders are followed unless what they lead to is read already; of several names of one file, one that says
    what it holds is taken. Raises RequestError for a file or folder that may not be read.
    """
    seen = {_identity(top.stat())}
    paths, folders, links = [], [top], deque[Path]()
    while folders or links:
        if not folders:
            # Links last, so that nothing is named by a detour.
            folders = _unseen([links.popleft()], seen, left_out, top)
            continue
        folder = folders.pop()
        inside = []
        for each in _entries(folder, top):
            path = folder / each.name
            if each.name.startswith(".") or each.name == "__pycache__":
                left_out.add(HIDDEN, path, top)
            elif each.is_dir(follow_symlinks=False):
                inside.append(path)
            elif each.is_symlink() and os.path.isdir(path):
                links.append(path)
            else:
                paths.append(path)
        folders += _unseen(inside, seen, left_out, top)
    return once(sorted(paths, key=lambda path: path.as_posix()), top, left_out)


def _unseen(folders: list[Path], seen: set[_Identity], left_out: LeftOut, top: Path) -> list[Path]:
    fresh = []
    for folder in folders:
        identity = _identity(folder.stat())
        if identity in seen:
            left_out.add(REPEATED_FOLDER, folder, top)
        else:
            seen.add(identity)
            fresh.append(folder)
    return fresh


def once(paths: Iterable[Path], top: Path, left_out: LeftOut) -> list[Path]:
    """Return the readable regular files among paths, in their order, each file under one of its names only."""
    chosen: dict[_Identity, Path] = {}
    for path in dict.fromkeys(paths):  # a glob may give a name twice
        try:
            status = path.stat()
        except OSError as error:
            if error.errno not in _NOWHERE:
                raise _unreadable(path, top, error) from None
            left_out.add(DANGLING, path, top)
            continue
        if stat.S_ISDIR(status.st_mode):
            left_out.add(FOLDER, path, top)
        elif not stat.S_ISREG(status.st_mode):
            left_out.add(SPECIAL, path, top)
        elif not os.access(path, os.R_OK):
            raise _unreadable(path, top, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        elif (there := chosen.get(_identity(status))) is None:
            chosen[_identity(status)] = path
        else:
            kept, other = sorted((there, path), key=_preference)
            chosen[_identity(status)] = kept
            left_out.add(REPEATED_FILE, other, top)
    return sorted(chosen.values(), key=lambda path: path.as_posix())


def _entries(folder: Path, top: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda each: each.name)
    except OSError as error:
        raise _unreadable(folder, top, error) from None


def _unreadable(path: Path, top: Path, error: OSError) -> RequestError:
    return RequestError(
        f"{path} cannot be read: {error.strerror}",
        where=f"--source {top}",
        fix="give yourself the permission, or name what you may read with a glob",
    )


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _preference(path: Path) -> tuple[bool, bool, str]:
    """Prefer a name that says what the file holds (a cache of the hub's has others), then one that is no link."""
    return not formats.is_known(path.name), path.is_symlink(), path.as_posix()
