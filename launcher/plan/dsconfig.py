"""Compose the DeepSpeed config: fragments and computed values, merged by agree-or-fail, each key with its origin."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import assets
from launcher.errors import RequestError
from launcher.plan import dskeys
from launcher.plan.batch import Batch
from launcher.spec.dotted import flatten, unflatten
from launcher.spec.schema import Fp16Keys, OptimizerKeys, RunSpec
from launcher.topology import Topology

ABOUT = "//"
"""The key under which a fragment says in one sentence what it decides; it never reaches DeepSpeed."""

# A reduce bucket below 128 MiB of 16-bit gradients wastes bandwidth (Stas Bekman, Machine Learning Engineering Open
# Book, network benchmarks); above DeepSpeed's default of 5e8 elements it wastes memory.
_SMALLEST_USEFUL_BUCKET = 2**26
_LARGEST_BUCKET = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What bucket sizes depend on, in elements."""

    parameters: int
    largest_tensor: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A complete DeepSpeed config by dotted path, and where each value came from."""

    leaves: dict[str, Any]
    origins: dict[str, str]

    def config(self) -> dict[str, Any]:
        """Return the nested dictionary that `deepspeed.initialize` takes."""
        return unflatten(self.leaves)


def fragments(spec: RunSpec) -> list[Path]:
    """Return the files that a request names, in the order they are read."""
    folder = assets.folder("ds_configs")
    return [
        folder / "base.json",
        folder / "zero" / f"{spec.zero}.json",
        folder / "precision" / f"{spec.precision}.json",
        folder / "offload" / f"{spec.offload}.json",
    ]


def read_fragment(path: Path) -> dict[str, Any]:
    """Return a fragment's keys by dotted path, without its sentence."""
    content = json.loads(path.read_text("utf-8"))
    content.pop(ABOUT, None)
    return flatten(content)


def compose(
    spec: RunSpec,
    *,
    batch: Batch,
    learning_rate: float,
    sizes: Sizes,
    topology: Topology,
    own: dict[str, Any] | None,
    request_origins: dict[str, str],
) -> Composed:
    """Merge fragments, computed values and the user's own keys.

    `own` is the content of --ds-config and replaces fragments and tuning; what the run keys decide is still filled in.
    Fragments and computed values may name a key twice only with one value. `ds.*` words win over everything.
    Raises RequestError for two files that disagree, and for keys DeepSpeed does not know, with all of them at once.
    """
    leaves: dict[str, Any] = {}
    origins: dict[str, str] = {}
    demanded = demanded_by_run_keys(spec, batch, learning_rate, topology)
    if own is not None:
        merge(leaves, origins, flatten(own), f"--ds-config {Path(spec.ds_config or '').name}")
        for key, (value, origin) in demanded.items():
            if key not in leaves and not _meant_for_another_optimizer(key, leaves, demanded):
                merge(leaves, origins, {key: value}, origin)
    else:
        folder = assets.folder("ds_configs").parent
        for file in fragments(spec):
            merge(leaves, origins, read_fragment(file), file.relative_to(folder).as_posix())
        demanded.setdefault("zero_allow_untested_optimizer", (False, "no optimizer asks for it"))
        for key, (value, origin) in {**demanded, **tuned(spec, sizes)}.items():
            if not _meant_for_another_optimizer(key, spec.ds, demanded):
                merge(leaves, origins, {key: value}, origin)
    for key, value in spec.ds.items():
        leaves[key] = value
        origins[key] = f"ds.{key} from {request_origins.get(f'ds.{key}', 'the request')}"
    try:
        config = unflatten(leaves)
    except KeyError as error:
        key = str(error.args[0])
        raise RequestError(
            f"{key} is given both as a value and as a section",
            where=origins.get(key, "the DeepSpeed config"),
            fix="keep one of the two",
        ) from None
    _refuse_unknown(config, origins)
    return Composed(leaves=leaves, origins=origins)


def merge(leaves: dict[str, Any], origins: dict[str, str], more: dict[str, Any], origin: str) -> None:
    """Add keys in place; a key that is there already must have the same value, or both files are named."""
    for key, value in more.items():
        if key in leaves and leaves[key] != value:
            raise RequestError(
                f"{key} is {leaves[key]!r} in {origins[key]} and {value!r} in {origin}",
                where=f"{origins[key]} and {origin}",
                fix="let one file decide it: remove the key from the other",
            )
        leaves.setdefault(key, value)
        origins.setdefault(key, origin)


def _meant_for_another_optimizer(key: str, own: dict[str, Any], demanded: dict[str, tuple[Any, str]]) -> bool:
    """Tell whether a user's own optimizer type makes a parameter of ours meaningless; all types have these two."""
    kind = own.get("optimizer.type", demanded["optimizer.type"][0])
    general = ("optimizer.type", "optimizer.params.lr", "optimizer.params.weight_decay")
    return key.startswith("optimizer.") and key not in general and kind != demanded["optimizer.type"][0]


def demanded_by_run_keys(
    spec: RunSpec, batch: Batch, learning_rate: float, topology: Topology
) -> dict[str, tuple[Any, str]]:
    """Return the keys that run keys decide, each as (value, origin)."""
    keys: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch.global_, "run key batch.global"),
        "train_micro_batch_size_per_gpu": (batch.micro, "run key batch.micro"),
        "gradient_accumulation_steps": (batch.accumulation, "the batch equation"),
        "gradient_clipping": (spec.optimizer.clip, "run key optimizer.clip"),
        "zero_optimization.stage": (spec.zero, "run key zero"),
        "fp16.enabled": (spec.precision == "fp16", "run key precision"),
        "bf16.enabled": (spec.precision == "bf16", "run key precision"),
    }
    if spec.optimizer.kind == "sgd":
        # torch's SGD works at stages 1 to 3 but is not on DeepSpeed's list (engine.py, _do_sanity_check).
        keys["zero_allow_untested_optimizer"] = (True, "run key optimizer.kind")
    if spec.precision == "fp16":
        keys |= _loss_scaling(spec.fp16)
    keys |= {f"optimizer.{key}": value for key, value in _optimizer(spec.optimizer, learning_rate, topology).items()}
    offload = read_fragment(assets.folder("ds_configs") / "offload" / f"{spec.offload}.json")
    keys |= {key: (value, "run key offload") for key, value in offload.items() if key.endswith(".device")}
    if spec.offload == "nvme" and spec.nvme_path:
        keys |= {
            f"zero_optimization.offload_{what}.nvme_path": (spec.nvme_path, "run key nvme_path")
            for what in ("optimizer", "param")
        }
    return keys


def _loss_scaling(fp16: Fp16Keys) -> dict[str, tuple[Any, str]]:
    return {
        "fp16.loss_scale": (fp16.scale, "run key fp16.scale"),
        "fp16.initial_scale_power": (fp16.initial_scale_power, "run key fp16.initial_scale_power"),
        "fp16.loss_scale_window": (fp16.window, "run key fp16.window"),
        "fp16.hysteresis": (fp16.hysteresis, "run key fp16.hysteresis"),
        "fp16.min_loss_scale": (fp16.min_scale, "run key fp16.min_scale"),
    }


def _optimizer(keys: OptimizerKeys, learning_rate: float, topology: Topology) -> dict[str, tuple[Any, str]]:
    rate = (learning_rate, "run key optimizer.lr" if keys.lr is not None else "default by model size")
    decay = (keys.weight_decay, "run key optimizer.weight_decay")
    if keys.kind == "sgd":
        return {
            "type": ("SGD", "run key optimizer.kind"),
            "params.lr": rate,
            "params.momentum": (keys.momentum, "run key optimizer.momentum"),
            "params.weight_decay": decay,
        }
    return {
        "type": ("AdamW", "run key optimizer.kind"),
        "params.lr": rate,
        "params.betas": ([keys.beta1, keys.beta2], "run keys optimizer.beta1, optimizer.beta2"),
        "params.eps": (keys.epsilon, "run key optimizer.epsilon"),
        "params.weight_decay": decay,
        # Without it the first use compiles FusedAdam or CPUAdam, which needs a CUDA or C++ toolchain (T11).
        "params.torch_adam": (not topology.fused_adam, "whether a fused build is possible here"),
        "params.adam_w_mode": (True, "run key optimizer.kind"),
    }


def tuned(spec: RunSpec, sizes: Sizes) -> dict[str, tuple[Any, str]]:
    """Return the sizes that are scaled to the model, each as (value, origin).

    A bucket smaller than the largest tensor is bypassed by it; one larger than the model is memory for nothing.
    """
    origin = "scaled to the model"
    if spec.zero == 0:
        return {}
    elements = bucket(sizes)
    keys: dict[str, tuple[Any, str]] = {
        "zero_optimization.reduce_bucket_size": (elements, origin),
        "zero_optimization.allgather_bucket_size": (elements, origin),
    }
    if spec.zero == 3:
        keys |= {
            "zero_optimization.stage3_prefetch_bucket_size": (min(50_000_000, elements), origin),
            # Biases and norms stay whole on every rank: gathering such small pieces costs more than they weigh.
            "zero_optimization.stage3_param_persistence_threshold": (10 * sizes.width, origin),
        }
    return keys


def bucket(sizes: Sizes) -> int:
    """Return the elements of a reduce bucket: of use, no larger than the model, and no smaller than any tensor."""
    return min(_LARGEST_BUCKET, sizes.parameters, max(sizes.largest_tensor, _SMALLEST_USEFUL_BUCKET))


def _refuse_unknown(config: dict[str, Any], origins: dict[str, str]) -> None:
    problems = [
        RequestError(f"{one.path}: {one.sentence}", where=one.where, fix=one.suggestion)
        for one in dskeys.problems(config, origins)
    ]
    if problems:
        raise problems[0].with_more(problems[1:])
