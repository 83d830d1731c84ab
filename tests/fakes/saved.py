"""Checkpoints made by hand: a transformers model cut into pieces as ranks would hold them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Manifest
from halfstep.launcher.checkpoint.shards import PROBE, Piece
from halfstep.launcher.rundir import environment

STATES = ("exp_avg", "exp_avg_sq")


def cut(parameters: dict[str, np.ndarray], bounds: list[int]) -> list[dict[str, tuple[int, int]]]:
    """Lay all parameters end to end, cut them at `bounds`, and return each rank's parameter -> (start, length)."""
    ranks = []
    for low, high in zip([0, *bounds], [*bounds, 1 << 62], strict=True):
        held, begin = {}, 0
        for name, values in parameters.items():
            first, last = max(low, begin), min(high, begin + values.size)
            if first < last:
                held[name] = (first - begin, last - first)
            begin += values.size
        ranks.append(held)
    return ranks


def even(parameters: dict[str, np.ndarray], ranks: int) -> list[int]:
    """Return the bounds of equal parts, which lie inside parameters."""
    total = sum(values.size for values in parameters.values())
    return [total * rank // ranks for rank in range(1, ranks)]


def states_of(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return a parameter's tensors: the master, and optimizer states that can be told from it."""
    return {
        "master": values,
        "exp_avg": (values * 0.5 + len(name)).astype(np.float32),
        "exp_avg_sq": (values * values).astype(np.float32),
    }


def save(
    run: Path,
    parameters: dict[str, np.ndarray],
    *,
    step: int = 10,
    bounds: list[int] | None = None,
    config: dict[str, Any] | None = None,
    data: dict[str, str] | None = None,
    logits: np.ndarray | None = None,
    buffers: list[dict[str, np.ndarray]] | None = None,
    **changed: Any,
) -> Path:
    """Write a checkpoint as the engine does and return its folder; `bounds` cut the flattened parameters into ranks.

    `buffers` are those of every rank, all of rank 0's; without it, the checkpoint is one of before they were kept.
    """
    run.mkdir(parents=True, exist_ok=True)
    held = cut(parameters, bounds or [])
    folder = store.prepare(run, step, "0001", 0)
    assert folder is not None
    files = []
    for rank, pieces in enumerate(held):
        name, order = shards.rank_name(rank), []
        if rank == 0 and logits is not None:
            order.append(Piece(key=PROBE, length=logits.size, array=logits.reshape(-1).copy))
        for parameter, (start, length) in pieces.items():
            for state, values in states_of(parameter, parameters[parameter]).items():
                part = values.reshape(-1)[start : start + length]
                order.append(Piece(key=f"{parameter}/{state}", length=length, array=part.copy))
        for buffer, values in (buffers or [{}] * len(held))[rank].items():
            order.append(
                Piece(
                    key=f"{buffer}/{shards.BUFFER}",
                    length=values.size,
                    array=values.reshape(-1).copy,
                    dtype=shards.stored_type(values),
                )
            )
        files.append(shards.write(folder / f"{name}.safetensors", order, lambda: None))
        sidecar = {"pieces": {parameter: list(place) for parameter, place in pieces.items()}, "rng": {"rank": rank}}
        files.append(shards.write_json(folder / f"{name}.json", sidecar))
    shapes = {name: list(values.shape) for name, values in parameters.items()}
    model = {"name": "by hand", "config": config or {}, "vocabulary": 0, "parameters": shapes}
    if buffers is not None:
        kept = {name: {"shape": list(buffer.shape), "dtype": str(buffer.dtype)} for name, buffer in buffers[0].items()}
        model["buffers"] = kept
    return store.commit(folder, manifest(step, model, len(held), tuple(files), data, **changed))


def manifest(
    step: int, model: dict[str, Any], ranks: int, files: tuple[Any, ...], data: dict[str, str] | None, **changed: Any
) -> Manifest:
    """Return a manifest whose other fields are plausible."""
    fields: dict[str, Any] = {
        "step": step,
        "tokens": 100 * step,
        "run_id": "0123456789abcdef",
        "identity": {"seed": 0},
        "model": model,
        "world_size": ranks,
        "zero": 2,
        "precision": "fp32",
        "batch": {"global": 4, "micro": 2, "accumulation": 2},
        "sequence": 32,
        "data": data or {"path": "/nowhere", "digest": "0" * 16},
        "optimizer": {"kind": "AdamW", "states": list(STATES), "steps": step},
        "guard": {
            "loss_scale": None,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
            "bad_losses_in_a_row": 0,
            "last_good_step": step,
            "first": None,
        },
        "lr": 1e-3,
        "versions": environment.versions(),
        "attempt": "0001",
        "time": 1.7e9,
        "files": files,
    }
    return Manifest(**{**fields, **changed})


def flip(file: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def rows(file: Path, count: int) -> None:
    """Write a metrics.jsonl of so many steps, whose loss is 5 minus the step."""
    lines = [json.dumps({"step": step, "loss": 5 - step / 100}) for step in range(1, count + 1)]
    file.write_text("\n".join(lines) + "\n")
