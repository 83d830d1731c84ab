"""Read a DeepSpeed JSON file as DeepSpeed reads it: comments, trailing commas and a byte-order mark, no key twice."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson

from halfstep.launcher.config import legal
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.load import DuplicateKey, unique
from halfstep.launcher.config.text_file import read_text
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.ds import dskeys
from halfstep.launcher.system import assets

ABOUT = "//"
"""The key under which a fragment says in one sentence what it decides; it never reaches DeepSpeed."""
AUTO = "auto"

# Keys of no fragment that Halfstep decides: what run keys say, and what is scaled to the model.
_COMPUTED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization.stage", "zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path",
    "fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis", "fp16.min_loss_scale",
    "optimizer.type", "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps",
    "optimizer.params.weight_decay", "optimizer.params.momentum", "optimizer.params.torch_adam",
    "optimizer.params.fused", "optimizer.params.adam_w_mode", "zero_allow_untested_optimizer",
    "bfloat16.enabled",  # an older name; "auto" leaves it to Halfstep like the other, a value is refused
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a user's DeepSpeed file decides, and what it leaves to Halfstep."""

    name: str
    """Of the file."""
    leaves: dict[str, Any]
    """By dotted path."""
    autos: tuple[str, ...] = ()
    """Keys that it says "auto" to."""
    warnings: tuple[str, ...] = ()
    """What is done otherwise than DeepSpeed would."""

    @property
    def origin(self) -> str:
        """Say where its keys come from."""
        return f"--ds-config {self.name}"

    def place(self, *paths: str) -> str:
        """Say where keys of it stand."""
        return f"{self.name}: {', '.join(paths)}"

    def without(self, paths: Iterable[str]) -> "Own":
        """Return it without some keys."""
        gone = set(paths)
        return dataclasses.replace(self, leaves={key: value for key, value in self.leaves.items() if key not in gone})


def read(path: Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed file; raises RequestError for what DeepSpeed could not read.

    runtime/config.py reads with hjson and refuses a key that stands twice. Plain JSON is read as such, so that a file
    keeps its digest: hjson makes 5e8 a whole number.
    """
    where = str(path)
    text = read_text(path, "the DeepSpeed config", "--ds-config")
    content, plain = None, ""
    try:
        try:
            content = json.loads(text, object_pairs_hook=unique)
        except json.JSONDecodeError as error:
            plain = f"; as plain JSON it is wrong at line {error.lineno}, column {error.colno}"
            content = hjson.loads(text, object_pairs_hook=unique, parse_float=_finite)
    except RecursionError:
        raise _unreadable(
            f"it is nested more than {legal.DEEPEST} levels deep", where, "check how it is nested"
        ) from None
    except IndexError:  # hjson, in a comment or a text that does not end
        raise _unreadable(f"it ends in the middle{plain}", where, "close the comment or the text") from None
    except DuplicateKey as error:
        raise _unreadable(str(error), where, "keep one of the two") from None
    except ValueError as error:
        fix = "fix that place: a comma or the end of a line stands between keys, and texts take quotes"
        raise _unreadable(f"{error}{plain}", where, fix) from None
    if not isinstance(content, dict) or not text.strip():
        raise RequestError("the DeepSpeed config is not a JSON object", where=where, fix="wrap it in { }")
    for key, value in content.items():
        legal.check(key, value, where, typed=False)
    return content


def own(path: str, content: dict[str, Any]) -> Own:
    """Return what a file decides, key by key, once all of it is known to DeepSpeed; else raises RequestError.

    "auto" is how a file for the Hugging Face Trainer leaves a key to it.
    """
    made = Own(name=Path(path).name, leaves={}, autos=())
    _refuse_dots(content, "", made)
    autos = []
    for key, value in flatten(content).items():
        entry = dskeys.entry(key, content)
        if value == AUTO and _is_decided(key):
            autos.append(key)
        elif value in (None, {}) and entry.get("type") == "section":
            continue  # DeepSpeed takes null, or nothing in it, for a section that is not there
        elif isinstance(value, float) and value.is_integer() and entry.get("exact"):
            made.leaves[key] = int(value)  # as hjson reads 8.0
        else:
            made.leaves[key] = value
    dskeys.require(made.leaves, dict.fromkeys(made.leaves, made.origin))
    return Own(name=made.name, leaves=made.leaves, autos=tuple(autos))


def read_fragment(path: Path) -> dict[str, Any]:
    """Return a fragment's keys by dotted path, without its sentence."""
    content = json.loads(path.read_text("utf-8"))
    content.pop(ABOUT, None)
    return flatten(content)


def _is_decided(key: str) -> bool:
    """Tell whether Halfstep decides a key, in some cell at least."""
    return key in _COMPUTED or key in _in_fragments() or key.startswith("scheduler.")


@functools.cache
def _in_fragments() -> frozenset[str]:
    files = assets.folder("ds_configs").rglob("*.json")
    return frozenset(key for file in files for key in read_fragment(file))


def _refuse_dots(tree: dict[str, Any], path: str, made: Own) -> None:
    """Refuse a key like "fp16.enabled": DeepSpeed would ignore it, and among dotted paths it would mean a section."""
    for key, value in tree.items():
        if "." in key:
            parts = key.split(".")
            nested = "".join(f'{{"{part}": ' for part in parts) + "..." + "}" * len(parts)
            raise RequestError(
                f"the key {path}{key!r} has a dot in it, which is no section to DeepSpeed",
                where=made.origin,
                fix=f"write sections within each other: {nested}",
            )
        if isinstance(value, dict):
            _refuse_dots(value, f"{path}{key}.", made)


def _unreadable(what: str, where: str, fix: str) -> RequestError:
    return RequestError(f"the DeepSpeed config cannot be read: {what}", where=where, fix=fix)


def _finite(text: str) -> float:
    """Read a number; hjson would end in an OverflowError at one that no float holds."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{legal.shown(text)} is larger than a number can be")
    return number
