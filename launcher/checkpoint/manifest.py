"""The manifest: what makes a folder a checkpoint, and says what is in it."""

import dataclasses
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from halfstep.launcher.config import precisions
from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign
from halfstep.launcher.system.fields import LARGEST, Count, Finite, Measured, Name, Positive, Text, checked
from halfstep.launcher.system.files import reason

FORMAT = 1
"""Raised whenever an older Halfstep could not read what is written."""

NAME = "manifest.json"
_RANKS = 1 << 20
"""A checkpoint is of fewer."""


class Damaged(Exception):
    """A folder is no good checkpoint; its text says why."""


class Gone(Damaged):
    """A folder was a checkpoint, and was deleted or renamed while it was read."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a checkpoint."""

    name: Name
    bytes: Count
    xxh3: Annotated[Text, Field(pattern="^[0-9a-f]{32}$")]
    """XXH3-128 of what was written, hex."""


Shape = Annotated[list[Count], Field(max_length=8)]


@with_config(ConfigDict(extra="allow"))
class Buffer(TypedDict):
    """What no optimizer moves: a buffer, or a frozen parameter."""

    shape: Shape
    dtype: Text
    """torch's name."""


@with_config(ConfigDict(extra="allow"))
class Adapters(TypedDict):
    """What was trained instead of the model, and where the frozen model under it comes from: it is not saved."""

    lora: dict[str, Any]
    """Rank, alpha and targets (models/lora.py)."""
    weights: Text | None
    """What the model was loaded from; None: it was drawn from `seed`."""
    local: bool
    """Whether that is a folder, whose content has `digest`."""
    digest: Text | None
    seed: int


@with_config(ConfigDict(extra="allow"))
class Model(TypedDict):
    """The network; `parameters` (name -> shape) in the model's order."""

    name: Text
    config: dict[str, Any]
    parameters: dict[Text, Shape]
    vocabulary: NotRequired[Count]
    buffers: NotRequired[dict[Text, Buffer]]
    adapters: NotRequired[Adapters]


@with_config(ConfigDict(extra="allow"))
class Optimizer(TypedDict):
    """`states` are the names of its tensors; `steps` is its own count: skipped steps do not count."""

    kind: Text
    states: list[Text]
    steps: Measured


@with_config(ConfigDict(extra="allow"))
class Scale(TypedDict):
    """What moves of a loss scale."""

    value: Measured
    clean: Measured
    patience: Measured


@with_config(ConfigDict(extra="allow"))
class Guard(TypedDict):
    """Loss scale and what decides when a run has to stop."""

    loss_scale: Scale | None
    skipped_steps: Count
    skipped_in_a_row: Count
    bad_losses_in_a_row: Count
    last_good_step: Count
    first: Text | None


@with_config(ConfigDict(extra="allow"))
class PartOfData(TypedDict):
    """One corpus of a mixture."""

    path: Text
    digest: Text


@with_config(ConfigDict(extra="allow"))
class Corpus(TypedDict):
    """The corpus, for its tokenizer; of a mixture every part has the same."""

    path: Text
    digest: Text
    parts: NotRequired[list[PartOfData]]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its tensors; JSON-able."""

    step: Positive
    """Optimizer steps done, skipped ones included."""
    tokens: Count
    run_id: Text
    identity: dict[str, Any]
    """What makes the run this run, as its plan has it."""
    model: Model
    world_size: Annotated[int, Field(strict=True, ge=1, le=_RANKS)]
    zero: Annotated[int, Field(strict=True, ge=0, le=3)]
    precision: Annotated[Text, Field(pattern=f"^({'|'.join(precisions.PRECISIONS)})$")]
    batch: dict[Text, Count]
    """`global`, `micro`, `accumulation`."""
    sequence: Positive
    data: Corpus
    optimizer: Optimizer
    guard: Guard
    lr: Finite
    """Of the last step."""
    versions: dict[Text, Text]
    attempt: Name
    time: Finite
    """Seconds since the epoch."""
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        """Size on disk, the manifest not counted."""
        return sum(file.bytes for file in self.files)

    def to_text(self) -> str:
        """Return the manifest as JSON that carries its own digest."""
        tree = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**tree, "digest": digest(_plain(tree), 32)}, indent=1, allow_nan=False) + "\n"


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and look for its files at their sizes; their content is not read.

    Raises Damaged with the reason, Gone where the folder went away meanwhile, and RequestError for a manifest of a
    newer Halfstep.
    """
    try:
        return _read(folder)
    except Damaged:
        if not os.path.lexists(folder):
            raise Gone("it was deleted while it was read") from None
        raise


def _read(folder: Path) -> Manifest:
    file = folder / NAME
    try:
        tree = foreign.read_object(file)
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise Damaged(f"{NAME} is damaged: {error}") from None
    if not isinstance(tree.get("format"), int):
        raise Damaged(f"{NAME} is damaged: it does not say its format")
    stated = tree.pop("digest", None)
    try:
        intact = stated == digest(tree, 32)
    except (ValueError, RecursionError):  # half of a character; nested too deep
        intact = False
    if tree["format"] > FORMAT and intact:
        raise RequestError(
            f"the checkpoint has format {tree['format']}; this Halfstep reads up to {FORMAT}",
            where=str(file),
            fix="start the run with the newer Halfstep that wrote it",
        )
    if not intact:
        raise Damaged(f"{NAME} is damaged: its digest does not fit")
    try:
        manifest = checked(Manifest, tree)
        _check(manifest)
    except ValueError as error:
        raise Damaged(f"{NAME} is damaged: {error}") from None
    for file in manifest.files:
        try:
            about = (folder / file.name).stat(follow_symlinks=False)
        except OSError as error:
            raise Damaged(f"{file.name}: {reason(error)}") from None
        if not stat.S_ISREG(about.st_mode):
            raise Damaged(f"{file.name} is no regular file")
        if about.st_size != file.bytes:
            raise Damaged(f"{file.name} has {about.st_size} bytes, {file.bytes} were written")
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError for a manifest whose parts do not fit each other."""
    names = {file.name for file in manifest.files}
    if len(names) < len(manifest.files):
        raise ValueError("it names a file twice")
    if len(names) < 2 * manifest.world_size:
        raise ValueError(f"it names {len(names)} files of {manifest.world_size} ranks, which write two each")
    for rank in range(manifest.world_size):
        for name in (f"{rank_name(rank)}.safetensors", f"{rank_name(rank)}.json"):
            if name not in names:
                raise ValueError(f"it names no {name}")
    elements = sum(math.prod(shape) for shape in manifest.model["parameters"].values())
    elements += sum(math.prod(kept["shape"]) for kept in manifest.model.get("buffers", {}).values()) // 4
    if 4 * elements > min(manifest.bytes, LARGEST):
        raise ValueError(f"its {elements:,} parameters do not fit into files of {manifest.bytes:,} bytes")


def rank_name(rank: int) -> str:
    """Return how the files of a rank begin."""
    return f"rank-{rank:05d}"


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree as it looks after a way through JSON, which knows no tuples."""
    return json.loads(json.dumps(tree, allow_nan=False))
