"""Write a checkpoint again for another number of ranks, in a run directory of its own."""

import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Damaged, File, Manifest
from halfstep.launcher.checkpoint.shards import BUFFER, MASTER, PROBE, Piece, Shards
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.export import source, target
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import pretty, write_atomic

_DESCRIPTION = ("plan.json", "ds_config.json", "request.toml", "origins.json")
_SPARE = 1 << 20
"""Bytes besides the tensors, a rank."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The checkpoint that was written."""

    run: Path
    folder: Path
    manifest: Manifest
    from_ranks: int
    random_states: bool
    """Whether those of the ranks were kept: they fit the same number of ranks alone."""


def convert(run: Path, to: Path, *, step: int | None = None, ranks: int = 1) -> Converted:
    """Write one checkpoint for `ranks` ranks into a new run directory, which resumes with the same command.

    The training needs no such thing, it reads a checkpoint of any number of ranks: this consolidates and moves.
    Memory stays near one rank's part of one parameter. Raises RequestError for a damaged checkpoint.
    """
    if ranks < 1:
        raise RequestError(f"{ranks} ranks hold nothing", where=f"--ranks {ranks}", fix="--ranks 1")
    arguments = [str(run), "--to", str(to), *(["--ranks", str(ranks)] if ranks != 1 else [])]
    new = target.absolute(to)
    chosen = source.choose(run, step, f"halfstep checkpoint convert {shlex.join(arguments)}")
    description = _description(run, new)
    old = chosen.manifest
    with target.filling(new, old.bytes + ranks * _SPARE) as partial:
        for name, text in description.items():
            write_atomic(partial / name, text)
        for name in ("metrics.jsonl", "events.jsonl"):
            if (run / name).is_file():
                write_atomic(partial / name, "".join(_lines(run / name, old.step)))
        folder = store.prepare(partial, old.step, old.attempt, 0)
        assert folder is not None, "a new folder holds no checkpoint"
        try:
            written = _write(folder, Shards(chosen.folder, old), ranks)
        except Damaged as damage:
            raise source.incomplete(chosen, damage) from None
        manifest = replace(old, world_size=ranks, files=written)
        final = store.commit(folder, manifest)
        reason = shards.damaged(final, manifest, lambda: None)
        if reason:
            raise RefusedError(
                f"what was written does not come back: {reason}",
                where=str(new),
                fix="check the disk, or name a folder on another with --to",
            )
    return Converted(
        run=new,
        folder=store.home(new) / store.folder_name(old.step),
        manifest=manifest,
        from_ranks=old.world_size,
        random_states=ranks == old.world_size,
    )


def _description(run: Path, new: Path) -> dict[str, str]:
    """Return what makes a folder a run directory, file by file: as it is in the run, but for `out`.

    The plan is not parsed: a run that another Halfstep planned can be moved as well. Raises RequestError where a file
    is missing or damaged.
    """
    try:
        texts = {name: foreign.read_text(run / name) for name in _DESCRIPTION}
        request = {**tomllib.loads(texts["request.toml"]), "out": str(new)}
        origins = foreign.loads(texts["origins.json"])
        origins["request"] = {**origins["request"], "out": "halfstep checkpoint convert --to"}
    except OSError as error:
        raise RequestError(
            f"{run} is not a whole run directory: {Path(str(error.filename)).name} is missing or unreadable",
            where=f"RUN {run}",
            fix="name a directory made by `halfstep run` or `launcher/train.py`",
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(
            f"what was asked of the run cannot be read: {error}",
            where=f"request.toml or origins.json in {run}",
            fix="restore them from a copy",
        ) from None
    return {**texts, "request.toml": tomli_w.dumps(request), "origins.json": pretty(origins)}


def _lines(file: Path, step: int) -> Iterator[str]:
    for line in foreign.lines(file):
        try:
            row = foreign.loads(line)
            if line.endswith(b"\n") and int(row.get("step") or 0) <= step:
                yield line.decode("utf-8")
        except (ValueError, AttributeError, TypeError):
            continue  # cut short by a kill


def _write(folder: Path, files: Shards, ranks: int) -> tuple[File, ...]:
    """Write every rank's file and sidecar, synced, and return their entries."""
    written = []
    for rank in range(ranks):
        name = shards.rank_name(rank)
        pieces = {
            parameter: place for parameter in files.parameters() if (place := _share(files, parameter, rank, ranks))[1]
        }
        tensors = [*_tensors(files, pieces, rank), *_buffers(files, rank, ranks)]
        written.append(shards.write(folder / f"{name}.safetensors", tensors, lambda: None))
        kept: dict[str, Any] = {}
        if ranks == files.manifest.world_size:
            kept = {key: value for key, value in files.sidecar(rank).items() if key != "pieces"}
        sidecar = {"pieces": {parameter: list(place) for parameter, place in pieces.items()}, **kept}
        written.append(shards.write_json(folder / f"{name}.json", sidecar))
        for file in written[-2:]:
            shards.sync(folder / file.name)
    return tuple(sorted(written, key=lambda file: file.name))


def _share(files: Shards, parameter: str, rank: int, ranks: int) -> tuple[int, int]:
    """Return (first element, length) of a rank's part: equal parts, the last ones shorter or empty."""
    whole = int(np.prod(files.shape(parameter), dtype=np.int64))
    share = -(-whole // ranks)
    first = min(rank * share, whole)
    return first, min(share, whole - first)


def _tensors(files: Shards, pieces: dict[str, tuple[int, int]], rank: int) -> Iterator[Piece]:
    probe = files.probe() if rank == 0 else None
    if probe is not None:
        yield Piece(key=PROBE, length=probe.size, array=lambda: probe)
    for parameter, (first, length) in pieces.items():
        for state in (MASTER, *files.manifest.optimizer["states"]):
            if files.read(parameter, state, first, 1) is None:
                continue  # never stepped
            yield Piece(
                key=f"{parameter}/{state}", length=length, array=_reader(files, parameter, state, first, length)
            )


def _buffers(files: Shards, rank: int, ranks: int) -> Iterator[Piece]:
    """Yield the buffers that a rank's file has; those of ranks that differ from rank 0 fit the same number alone."""
    if rank and ranks != files.manifest.world_size:
        return
    for name in files.buffers():
        if rank == 0 or files.has_own_buffer(name, rank):
            array = files.buffer(name, rank)
            yield Piece(
                key=f"{name}/{BUFFER}",
                length=array.size,
                array=lambda array=array: array,
                dtype=shards.stored_type(array),
            )


def _reader(files: Shards, parameter: str, state: str, first: int, length: int) -> Any:
    def read() -> np.ndarray:
        values = files.read(parameter, state, first, length)
        assert values is not None, (parameter, state)
        return values.reshape(-1)

    return read
