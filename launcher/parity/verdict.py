"""What the parity gate found on this machine, kept where a study can ask for it: results with versions and hardware."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from halfstep.launcher import topology
from halfstep.launcher.config.digest import digest
from halfstep.launcher.parity.cases import Case
from halfstep.launcher.system import assets, caches, foreign, machine
from halfstep.launcher.system.files import write_json

_VERSIONED = ("halfstep", "torch", "deepspeed", "transformers")
# What decides how a cell trains; another text of these is another question.
_CODE = ("launcher/engine", "launcher/plan", "launcher/config", "launcher/parity", "models", "ds_configs")


def conditions(here: topology.Topology) -> dict[str, Any]:
    """Return what a verdict holds for: versions, our own code, and the hardware."""
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "code": _code_digest(),
        "accelerator": here.accelerator,
        "device": here.device_name or machine.cpu_model(),
        "cuda_compiler": here.fused_adam,
    }


def _code_digest() -> str:
    """Hash the sources that decide how a cell trains, wherever they are installed."""
    total = hashlib.sha256()
    for name in _CODE:
        folder = assets.home() / name
        for source in sorted(folder.rglob("*")):
            if source.suffix in (".py", ".json", ".toml"):
                total.update(source.relative_to(folder).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def file(here: topology.Topology) -> Path:
    """Return where the verdict for this machine, these versions and this code is kept."""
    return caches.cache("verdicts") / f"{digest(conditions(here))}.json"


def store(here: topology.Topology, cells: list[dict[str, Any]]) -> Path:
    """Add results to the verdict; a case that was there already is replaced."""
    path = file(here)
    caches.make(path.parent)
    with FileLock(path.with_suffix(".lock")):  # tasks of an array may each find out something
        known = {_key(cell): cell for cell in read(here)}
        known |= {_key(cell): cell for cell in cells}
        write_json(path, {"conditions": conditions(here), "time": time.time(), "cells": list(known.values())})
    return path


def read(here: topology.Topology) -> list[dict[str, Any]]:
    """Return the stored results for this machine, these versions and this code; none where there are none."""
    try:
        cells = foreign.read_object(file(here))["cells"]
        return [cell for cell in cells if isinstance(cell["ok"], bool) and _key(cell)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def proved(
    here: topology.Topology, cases: Sequence[Mapping[str, Any]], fresh: Iterable[Mapping[str, Any]] = ()
) -> bool | None:
    """Tell whether these cases were found to train the same model: True, False, or None where one was not run.

    `fresh` are results that count beside the stored ones.
    """
    known = {_key(cell): cell["ok"] for cell in [*read(here), *fresh]}
    results = [known.get(_key(case)) for case in cases]
    if False in results:
        return False
    return True if results and None not in results else None


def error(here: topology.Topology, cases: Sequence[Mapping[str, Any]], fresh: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return with what the first of these cases ended that could not be run; empty where all could."""
    known = {_key(cell): cell.get("error") for cell in [*read(here), *fresh]}
    return next((str(known[key]) for key in map(_key, cases) if known.get(key)), "")


def _key(cell: Mapping[str, Any]) -> str:
    return digest({name: cell[name] for name in Case.__dataclass_fields__})
