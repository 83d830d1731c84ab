"""A checkpoint as the start of another run: how it is named, which one that is, and what identifies its weights."""

from dataclasses import asdict
from pathlib import Path

from halfstep.launcher.checkpoint import store
from halfstep.launcher.checkpoint.manifest import Manifest
from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import RequestError

PREFIX = "run:"


def split(name: str) -> tuple[str, int | None]:
    """Return the run directory of `run:DIR` or `run:DIR@STEP`, without the prefix, and the step that it names."""
    path, at, step = name.removeprefix(PREFIX).rpartition("@")
    return (path, int(step)) if at and step.isdecimal() else (name.removeprefix(PREFIX), None)


def chosen(name: str, where: str) -> tuple[str, Manifest]:
    """Return `run:DIR@STEP` of the checkpoint that a name means, the newest where it names none, and its manifest.

    Raises RequestError where there is none, and where it is damaged: an older one is proposed, never taken silently.
    """
    path, step = split(name)
    run = Path(path)
    there = list(store.candidates(run))
    if not there:
        raise RequestError(
            f"{run} has no checkpoints" if run.is_dir() else f"there is no folder {run}",
            where=where,
            fix="name the directory of a run that has saved one; an export is named model=hf:DIR",
        )
    wanted = next((candidate for candidate in there if step in (None, candidate.step)), None)
    if wanted is None:
        known = ", ".join(str(candidate.step) for candidate in there[:12])
        raise RequestError(f"there is no checkpoint of step {step} in {run}", where=where, fix=f"take one of {known}")
    if wanted.manifest is None:
        older = next(
            (candidate.step for candidate in there if candidate.manifest is not None and candidate.step < wanted.step),
            None,
        )
        raise RequestError(
            f"the checkpoint of step {wanted.step} is damaged: {wanted.reason}",
            where=f"{where}, {wanted.folder}",
            fix="restore it from a copy" if older is None else f"model={PREFIX}{run}@{older} takes an older one",
        )
    return f"{PREFIX}{run}@{wanted.step}", wanted.manifest


def weights_digest(manifest: Manifest) -> str:
    """Return what identifies the weights of a checkpoint: its files, and what they are to be laid upon."""
    return digest([sorted(asdict(file).items()) for file in manifest.files] + [manifest.model.get("adapters")])
