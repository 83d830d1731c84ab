"""The folder RUN/checkpoints: a checkpoint appears in it whole, by a rename, and leaves it by one.

step-00000100/                   good, if its manifest and files are
step-00000100.bad-0002/          found damaged by attempt 2, and kept for whoever wants to know why
.writing-step-00000100-0001/     being written by attempt 1, or left by its death
.pruned-step-00000100/           being deleted
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher import fault_injection
from halfstep.launcher.checkpoint.manifest import NAME, Damaged, Gone, Manifest, read
from halfstep.launcher.errors import DiskFull, RefusedError, RequestError
from halfstep.launcher.system.files import reason, sync_folder

_NAME = re.compile(r"step-([0-9]{8,18})")
_HIDDEN = (".writing-", ".pruned-")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A folder that is called a checkpoint, and what its manifest says; `reason` where it is none."""

    folder: Path
    step: int
    manifest: Manifest | None = None
    reason: str | None = None


def home(run: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run / "checkpoints"


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def candidates(run: Path) -> Iterator[Candidate]:
    """Yield what is called a checkpoint, newest first; manifests and sizes are looked at, contents are not.

    One that is deleted meanwhile is none. Raises RequestError for one that a newer Halfstep wrote, and where the folder
    cannot be read.
    """
    named = []
    try:
        named = [(match, folder) for folder in home(run).iterdir() if (match := _NAME.fullmatch(folder.name))]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise RequestError(
            f"the checkpoints cannot be read: {reason(error)}", where=str(home(run)), fix="check its permissions"
        ) from None
    for match, folder in sorted(named, key=lambda item: int(item[0][1]), reverse=True):
        step = int(match[1])
        try:
            manifest = read(folder)
        except Gone:
            continue
        except Damaged as damage:
            yield Candidate(folder=folder, step=step, reason=str(damage))
            continue
        if manifest.step != step:
            yield Candidate(folder=folder, step=step, reason=f"its manifest is of step {manifest.step}")
            continue
        yield Candidate(folder=folder, step=step, manifest=manifest)


def sweep(run: Path) -> list[str]:
    """Delete what a dead attempt was writing or deleting, and return the names; call only while holding the lease."""
    swept = []
    with contextlib.suppress(FileNotFoundError):
        for folder in home(run).iterdir():
            if folder.name.startswith(_HIDDEN):
                shutil.rmtree(folder, ignore_errors=True)
                swept.append(folder.name)
    return swept


def prepare(run: Path, step: int, attempt: str, needed: int, *, distrusted: bool = False) -> Path | None:
    """Make the hidden folder that a step is written to; None where a good checkpoint of this step stands already.

    A damaged one of this step, or one whose content was found to be (`distrusted`), is renamed, not overwritten.
    Raises DiskFull where `needed` bytes are not free, and RefusedError where the folder cannot be written.
    """
    try:
        return _prepare(home(run), step, attempt, needed, distrusted)
    except OSError as error:
        raise RefusedError(
            f"the checkpoint of step {step} cannot be written: {reason(error)}",
            where=str(home(run)),
            fix="check the folder's permissions and its disk; checkpoint.on_failure=continue trains on without",
        ) from None


def _prepare(there: Path, step: int, attempt: str, needed: int, distrusted: bool) -> Path | None:
    if not there.exists():
        there.mkdir()
        sync_folder(there.parent)
    final = there / folder_name(step)
    if final.exists():
        if not distrusted and _is_good(final):
            return None
        final.rename(_unused(there / f"{final.name}.bad-{attempt}"))
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskFull(
            f"the checkpoint of step {step} needs {_size(needed)}, and {_size(free)} are free",
            where=str(there),
            fix="free some space (folders named .bad-* are of no use to a run), or take a smaller checkpoint.keep; "
            "checkpoint.on_failure=continue trains on without",
        )
    temporary = there / f".writing-{final.name}-{attempt}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def _is_good(folder: Path) -> bool:
    try:
        read(folder)
    except Damaged:
        return False
    return True


def _unused(name: Path) -> Path:
    number, free = 1, name
    while free.exists():
        number += 1
        free = name.with_name(f"{name.name}-{number}")
    return free


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Turn a hidden folder whose files are written and synced into a checkpoint: manifest, sync, rename, sync."""
    fault_injection.hit("save.manifest", rank=0, step=manifest.step)
    with (temporary / NAME).open("x", encoding="utf-8") as out:
        out.write(manifest.to_text())
        out.flush()
        os.fsync(out.fileno())
    sync_folder(temporary)
    fault_injection.hit("save.rename", rank=0, step=manifest.step)
    final = temporary.parent / folder_name(manifest.step)
    temporary.rename(final)
    sync_folder(final.parent)
    return final


def prune(run: Path, keep: int, keep_every: int, *, distrusted: frozenset[int] = frozenset()) -> list[int]:
    """Delete good checkpoints beyond the newest `keep` whose step is no multiple of `keep_every`; return their steps.

    Damaged ones neither count nor go, nor do those of the steps in `distrusted`.
    """
    good = [
        candidate
        for candidate in candidates(run)
        if candidate.manifest is not None and candidate.step not in distrusted
    ]
    gone = [candidate for candidate in good[max(keep, 2) :] if not (keep_every and candidate.step % keep_every == 0)]
    for candidate in gone:
        if candidate.folder.is_symlink():  # somebody else's folder: only our name for it goes
            candidate.folder.unlink()
            continue
        hidden = candidate.folder.with_name(f".pruned-{candidate.folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        candidate.folder.rename(hidden)  # out of sight at once: a crash from here on leaves no half of a checkpoint
        (hidden / NAME).unlink(missing_ok=True)
        fault_injection.hit("save.prune", rank=0, step=candidate.step)
        shutil.rmtree(hidden, ignore_errors=True)
    return [candidate.step for candidate in gone]


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
