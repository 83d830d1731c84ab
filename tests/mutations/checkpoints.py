"""Readers of checkpoints: bytes that nobody meant, and files whose hashes fit and whose content does not."""

import contextlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from fakes import saved
from mutations import mutate
from mutations.driver import Case, Reader, command, file_cases, same

from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Damaged, read
from halfstep.launcher.checkpoint.shards import Shards
from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.export import source, survey

PARAMETERS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(7, dtype=np.float32)}
PROBE = np.arange(32, dtype=np.float32).reshape(16, 2)


def all_readers(folder: Path, corpus: Path) -> list[Reader]:
    """Return the readers of checkpoints, with what they read made in a folder."""
    run = folder / "saved"
    folder = saved.save(run, PARAMETERS, bounds=[9], logits=PROBE, sequence=32)
    good = {item.name: item.read_bytes() for item in folder.iterdir()}
    before = _load(run, folder)
    names = sorted(good)
    raw = file_cases(*((folder / name, mutate.of_bytes) for name in names))

    def rehashed(draw: random.Random) -> Case:
        name = draw.choice(names)
        if name.endswith(".json"):
            what, content = mutate.of_json(good[name], draw)
        else:
            what, content = _header(good[name], draw)

        def apply() -> None:
            (folder / name).write_bytes(content)
            _rehash(folder)

        def undo() -> None:
            shutil.rmtree(folder)
            folder.mkdir()
            for each, bytes_ in good.items():
                (folder / each).write_bytes(bytes_)

        return Case(what=f"{name}: {what}, hashed again", apply=apply, undo=undo)

    return [
        Reader(
            name="checkpoint bytes",
            read=lambda case: _load(run, folder),
            cases=raw,
            judge=lambda case, seen: None if seen in (None, before) else "it was believed",
            count=900,
        ),
        Reader(
            name="checkpoint hashed again",
            read=lambda case: _load(run, folder),
            cases=rehashed,
            judge=lambda case, seen: _judge_checkpoint(folder, seen),
            count=1500,
            some=20,
        ),
        Reader(
            name="checkpoint verbs",
            read=lambda case: _verbs(run),
            cases=rehashed,
            judge=lambda case, seen: None,
            count=400,
        ),
    ]


def _header(content: bytes, draw: random.Random) -> mutate.Mutation:
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.3:
        return mutate.of_bytes(content, draw)
    what, text = mutate.of_tree(json.loads(content[8 : 8 + size]), draw)
    encoded = text.encode("utf-8", errors="surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return f"header: {what}", len(encoded).to_bytes(8, "little") + encoded + content[8 + size :]


def _rehash(folder: Path) -> None:
    """Make every hash in a manifest fit what lies there, as far as the manifest is still one."""
    file = folder / "manifest.json"
    try:
        tree = json.loads(file.read_bytes())
        tree.pop("digest", None)
        for item in tree["files"]:
            content = (folder / item["name"]).read_bytes()
            if isinstance(item["bytes"], int) and isinstance(item["xxh3"], str) and len(item["xxh3"]) == 32:
                item |= {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
        pass
    with contextlib.suppress(ValueError, TypeError, RecursionError, UnboundLocalError, AttributeError):
        file.write_text(json.dumps({**tree, "digest": digest(tree, 32)}))


def _load(run: Path, folder: Path) -> Any:
    """Do what a start does with the newest checkpoint, to the last tensor; None where it is no good one."""
    seen = [item for item in store.candidates(run) if item.manifest is not None]
    if not seen:
        return None
    manifest = seen[0].manifest
    assert manifest is not None
    if shards.damaged(folder, manifest, lambda: None):
        return None
    files = Shards(folder, manifest)
    tensors = {
        f"{name}/{kind}": None if (values := files.read(name, kind)) is None else values.tobytes()
        for name in files.parameters()
        for kind in ("master", *manifest.optimizer["states"])
    }
    probe = files.probe()
    rng = [files.sidecar(rank).get("rng") for rank in range(manifest.world_size)]
    return manifest, tensors, None if probe is None else probe.tobytes(), rng


def _judge_checkpoint(folder: Path, seen: Any) -> str | None:
    if seen is None:
        return None
    manifest, tensors, _, _ = seen
    tree = mutate.parsed_json((folder / "manifest.json").read_bytes())
    for key in (
        "step",
        "tokens",
        "run_id",
        "identity",
        "model",
        "world_size",
        "zero",
        "precision",
        "optimizer",
        "guard",
    ):
        if not same(tree[key], json.loads(json.dumps(getattr(manifest, key)))):
            return f"{key}: {tree[key]!r} was read as {getattr(manifest, key)!r}"[:200]
    for name, shape in tree["model"]["parameters"].items():
        if len(tensors[f"{name}/master"]) != 4 * math.prod(shape):
            return f"{name} of shape {shape} has {len(tensors[f'{name}/master'])} bytes"
    return None


def _verbs(run: Path) -> None:
    """List, verify, and choose for an export; each says what it finds, and none fails."""
    for verb in (["list"], ["list", "--json"], ["verify"], ["verify", "--json"]):
        code = command(["checkpoint", *verb, str(run)])
        assert code in (0, 2), code
    for row in survey.survey(run):
        survey.verified(row)
        row.to_dict()
    with contextlib.suppress(HalfstepError, Damaged):
        source.choose(run, None, "halfstep checkpoint export")
        read(store.home(run) / store.folder_name(10))
