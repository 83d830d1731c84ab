"""Look at all checkpoints of a run: what each is by its manifest, and whether every byte of it is as written."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Damaged, Gone, Manifest, read
from halfstep.launcher.errors import HalfstepError, RequestError
from halfstep.launcher.export import source
from halfstep.launcher.system.files import reason as refusal

GOOD, DAMAGED, SET_ASIDE, UNFINISHED, LEFTOVER = "good", "damaged", "set aside", "unfinished", "being deleted"
_TRIES = 3
GONE = "gone"
"""Deleted by its run while it was read."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One folder of RUN/checkpoints."""

    folder: Path
    step: int
    state: str
    """`good`, `damaged`, `set aside`, `unfinished`, `being deleted` or `gone`."""
    reason: str | None = None
    manifest: Manifest | None = None
    loss: float | None = None
    """Of the training step."""
    seconds: float | None = None
    """That reading every byte took; None where nothing was read."""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as programs read it."""
        manifest = self.manifest
        return {
            "folder": str(self.folder),
            "step": self.step,
            "state": self.state,
            "reason": self.reason,
            "time": manifest.time if manifest else None,
            "bytes": manifest.bytes if manifest else None,
            "world_size": manifest.world_size if manifest else None,
            "zero": manifest.zero if manifest else None,
            "precision": manifest.precision if manifest else None,
            "tokens": manifest.tokens if manifest else None,
            "loss": self.loss,
            "seconds": self.seconds,
        }


def survey(run: Path) -> list[Row]:
    """Return what lies in RUN/checkpoints, oldest first; manifests and sizes are looked at, contents are not.

    Raises RequestError where there is no such folder, or one that is no run's.
    """
    if not run.is_dir() or not (store.home(run).is_dir() or (run / "plan.json").is_file()):
        raise source.none_there(run)
    losses = source.losses(run)
    try:
        folders = sorted(store.home(run).iterdir()) if store.home(run).is_dir() else []
    except OSError as error:
        raise RequestError(
            f"the checkpoints cannot be read: {refusal(error)}", where=str(store.home(run)), fix="check its permissions"
        ) from None
    rows = [row for folder in folders if folder.is_dir() and (row := _row(folder, losses))]
    return sorted(rows, key=lambda row: (row.step, row.folder.name.lstrip(".")))


def _row(folder: Path, losses: dict[int, float | None]) -> Row | None:
    name = folder.name
    step = _step(name)
    if step is None:
        return None
    if name.startswith(".writing-"):
        return Row(folder=folder, step=step, state=UNFINISHED, reason="being written, or left by a start that died")
    if name.startswith(".pruned-"):
        return Row(folder=folder, step=step, state=LEFTOVER, reason="the next start removes it")
    if ".bad" in name:
        return Row(folder=folder, state=SET_ASIDE, step=step, reason="an earlier start found it damaged")
    try:
        manifest = read(folder)
    except Gone:
        return None
    except Damaged as damage:
        return Row(folder=folder, state=DAMAGED, step=step, reason=str(damage))
    except HalfstepError as error:  # a newer Halfstep's: the others are to be seen all the same
        return Row(folder=folder, state=DAMAGED, step=step, reason=error.what)
    if manifest.step != step:
        return Row(folder=folder, state=DAMAGED, step=step, reason=f"its manifest is of step {manifest.step}")
    return Row(folder=folder, state=GOOD, step=step, manifest=manifest, loss=losses.get(step))


def _step(name: str) -> int | None:
    _, marker, rest = name.partition("step-")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return int(digits) if marker and 0 < len(digits) <= 18 else None


def verified(row: Row) -> Row:
    """Read every byte of a checkpoint that looked good, and return the row with what was found.

    Its run may delete it meanwhile, or set it aside and write it again: the first is `gone`, the second read again.
    """
    if row.manifest is None:
        return row
    began, manifest, reason = time.perf_counter(), row.manifest, None
    for _ in range(_TRIES):
        reason = shards.damaged(row.folder, manifest, lambda: None)
        if reason is None:
            break
        try:
            now = read(row.folder)
        except Gone:
            return replace(row, state=GONE, reason="its run deleted it while it was read", manifest=None)
        except (Damaged, HalfstepError):
            break
        if now == manifest:
            break
        manifest = now
    seconds = time.perf_counter() - began
    return replace(row, state=DAMAGED if reason else GOOD, reason=reason, manifest=manifest, seconds=seconds)


def size(count: float) -> str:
    """Return bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
