"""Compose the DeepSpeed config: fragments and computed values, merged by agree-or-fail, each key with its origin."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config import optimizers, precisions
from halfstep.launcher.config.bucket_sizes import Sizes, bucket
from halfstep.launcher.config.dotted import unflatten
from halfstep.launcher.config.schema import Fp16Keys, RunSpec
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import schedule
from halfstep.launcher.plan.batch import Batch
from halfstep.launcher.plan.ds import dskeys, effects
from halfstep.launcher.plan.ds.dsfile import Own, read_fragment
from halfstep.launcher.system import assets
from halfstep.launcher.topology import Topology

# A reduce bucket below 128 MiB of 16-bit gradients wastes bandwidth (Stas Bekman, Machine Learning Engineering Open
# Book, network benchmarks); above DeepSpeed's default of 5e8 elements it wastes memory.
OFFLOADS = {"none": ("none", "none"), "optimizer-cpu": ("cpu", "none"), "cpu": ("cpu", "cpu"), "nvme": ("nvme", "nvme")}
"""Where the optimizer's states and the weights go, by the run key `offload`."""
AUTOCAST_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
"""What DeepSpeed calls the format that torch.autocast multiplies in."""
REDUCED_IN_16_BITS = "torch_autocast.lower_precision_safe_modules"
"""Whose gradients stages 1 to 3 reduce in that format, and whose weights stage 3 gathers in it: nobody's."""
PARALLELISM = ("tensor_parallel.autotp_size", "sequence_parallel_size", "pipeline.stages")
"""Keys that divide a model or a sequence over ranks."""
UNDIVIDED = (None, 0, 1)
"""Values of them that divide nothing."""
_TORCH_ADAM, _FUSED = "optimizer.params.torch_adam", "optimizer.params.fused"


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A complete DeepSpeed config by dotted path, and where each value came from."""

    leaves: dict[str, Any]
    origins: dict[str, str]
    left_out: tuple[str, ...] = ()
    """What to say of keys of the user's file that it is without."""

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


def compose(
    spec: RunSpec,
    *,
    batch: Batch,
    learning_rate: float,
    sizes: Sizes,
    topology: Topology,
    own: Own | None,
    request_origins: Mapping[str, str],
) -> Composed:
    """Merge fragments, computed values and the user's own keys.

    `own` is what --ds-config says and replaces fragments and tuning; what the run keys decide is still filled in.
    Fragments and computed values may name a key twice only with one value. `ds.*` words win over everything.
    Raises RequestError for two files that disagree, and for keys DeepSpeed does not know, with all of them at once.
    What would break the run and changes no number is left out of the user's file.
    """
    leaves: dict[str, Any] = {}
    origins: dict[str, str] = {}
    demanded = demanded_by_run_keys(spec, batch, learning_rate, topology)
    fragmentary, scaled = _said_by_fragments(spec), tuned(spec, sizes)
    said = {**(own.leaves if own is not None else {}), **spec.ds}
    if own is not None:
        merge(leaves, origins, own.leaves, own.origin)
        for key, (value, origin) in [*fragmentary, *scaled.items()]:
            if key in own.autos or (key == REDUCED_IN_16_BITS and key not in leaves):
                why = f", for {own.name}'s auto" if key in own.autos else ""
                merge(leaves, origins, {key: value}, origin + why)
        for key, (value, origin) in demanded.items():
            if key not in leaves and not _meant_for_another_optimizer(key, said, demanded):
                merge(leaves, origins, {key: value}, origin + _taken_from(own, origin, request_origins))
    else:
        demanded.setdefault("zero_allow_untested_optimizer", (False, "no optimizer asks for it"))
        for key, (value, origin) in [*fragmentary, *demanded.items(), *scaled.items()]:
            if not _meant_for_another_optimizer(key, said, demanded):
                merge(leaves, origins, {key: value}, origin)
    for key, value in spec.ds.items():
        leaves[key] = value
        origins[key] = f"ds.{key} from {request_origins.get(f'ds.{key}', 'the request')}"
    dskeys.require(leaves, origins)
    setting = effects.Setting(zero=spec.zero, precision=spec.precision, topology=topology, leaves=leaves)
    left_out = effects.left_out(setting, origins)
    for key in left_out:
        del leaves[key], origins[key]
    return Composed(leaves=leaves, origins=origins, left_out=tuple(left_out.values()))


def _said_by_fragments(spec: RunSpec) -> list[tuple[str, tuple[Any, str]]]:
    folder = assets.folder("ds_configs").parent
    decided: list[tuple[str, tuple[Any, str]]] = []
    for file in fragments(spec):
        origin = file.relative_to(folder).as_posix()
        decided += [(key, (value, origin)) for key, value in read_fragment(file).items()]
    return decided


def _taken_from(own: Own, origin: str, request_origins: Mapping[str, str]) -> str:
    """Say which key of the file a run key was taken from, if it was."""
    places = [request_origins.get(name, "") for name in named(origin)]
    return "".join(f", from {place}" for place in places if place.startswith(f"{own.name}: "))


def named(origin: str) -> list[str]:
    """Return the run keys that the origin of a demanded key names."""
    return origin.removeprefix("run keys ").removeprefix("run key ").split(", ")


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


def _meant_for_another_optimizer(key: str, said: dict[str, Any], demanded: dict[str, tuple[Any, str]]) -> bool:
    """Tell whether what a user says of the optimizer makes a parameter of ours meaningless.

    Nearly all types take lr and weight_decay. `fused` is of torch's Adam alone, and torch refuses it beside `foreach`.
    """
    kind = said.get("optimizer.type", demanded["optimizer.type"][0])
    if key == _FUSED and (said.get(_TORCH_ADAM) is False or said.get("optimizer.params.foreach")):
        return True
    if kind == demanded["optimizer.type"][0] or not key.startswith("optimizer.params."):
        return False
    known = dskeys.parameters(kind)
    name = key.removeprefix("optimizer.params.")
    return name not in ("lr", "weight_decay") or (known is not None and name not in known)


def demanded_by_run_keys(
    spec: RunSpec, batch: Batch, learning_rate: float, topology: Topology
) -> dict[str, tuple[Any, str]]:
    """Return the keys that run keys decide, each as (value, origin)."""
    precision = precisions.of(spec.precision)
    keys: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch.global_, "run key batch.global"),
        "train_micro_batch_size_per_gpu": (batch.micro, "run key batch.micro"),
        "gradient_accumulation_steps": (batch.accumulation, "the batch equation"),
        "gradient_clipping": (spec.optimizer.clip, "run key optimizer.clip"),
        "zero_optimization.stage": (spec.zero, "run key zero"),
        "fp16.enabled": (spec.precision == "fp16", "run key precision"),
        "bf16.enabled": (spec.precision == "bf16", "run key precision"),
        "torch_autocast.enabled": (precision.autocast, "run key precision"),
    }
    if precision.autocast:
        keys["torch_autocast.dtype"] = (AUTOCAST_DTYPES[precision.products], "run key precision")
    if not optimizers.BY_KIND[spec.optimizer.kind].tested_with_zero:
        keys["zero_allow_untested_optimizer"] = (True, "run key optimizer.kind")
    if precision.scaled:
        keys |= _loss_scaling(spec.fp16)
    keys |= {f"optimizer.{key}": value for key, value in _optimizer(spec, learning_rate, topology).items()}
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


def _optimizer(spec: RunSpec, learning_rate: float, topology: Topology) -> dict[str, tuple[Any, str]]:
    keys = spec.optimizer
    row, by_kind = optimizers.BY_KIND[keys.kind], "run key optimizer.kind"
    decided: dict[str, tuple[Any, str]] = {
        "type": (row.type, by_kind),
        "params.lr": (learning_rate, "run key optimizer.lr" if keys.lr is not None else schedule.BY_SIZE),
    }
    for name, run_keys in row.parameters.items():
        values = [getattr(keys, key) for key in run_keys]
        origin = ("run keys " if len(run_keys) > 1 else "run key ") + ", ".join(f"optimizer.{key}" for key in run_keys)
        decided[f"params.{name}"] = (values if len(values) > 1 else values[0], origin)
    decided["params.weight_decay"] = (keys.weight_decay, "run key optimizer.weight_decay")
    if row.operators:
        decided |= _implementation(spec, topology)
    return decided | {f"params.{name}": (value, by_kind) for name, value in row.fixed.items()}


def _implementation(spec: RunSpec, topology: Topology) -> dict[str, tuple[Any, str]]:
    """Choose who steps Adam: DeepSpeed's own are compiled at their first use, which needs a toolchain (T11).

    On a GPU torch's fused one is as fast as FusedAdam (H200). On the host DeepSpeed's CPUAdam is the fast one.
    """
    if topology.accelerator == "cuda" and spec.offload == "none":
        origin = "torch's own is as fast on a GPU, with nothing to compile"
        return {"params.torch_adam": (True, origin), "params.fused": (True, origin)}
    return {"params.torch_adam": (not topology.fused_adam, "whether a fused build is possible here")}


def tuned(spec: RunSpec, sizes: Sizes) -> dict[str, tuple[Any, str]]:
    """Return the sizes that are scaled to the model, each as (value, origin).

    A bucket smaller than the largest tensor is bypassed by it; one larger than the model is memory for nothing.
    """
    origin = "scaled to the model"
    if spec.zero == 0:
        return {}
    elements = bucket(sizes, spec.zero)
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
