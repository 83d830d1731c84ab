"""Take what a user's DeepSpeed file decides into the run keys that nobody has set."""

import dataclasses
from typing import Any

from halfstep.launcher.config.load import Request, extend
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.ds import adopt_schedule, dsconfig, dsfile
from halfstep.launcher.plan.ds.dsfile import Own
from halfstep.launcher.topology import Topology

Taken = dict[str, tuple[Any, str]]
"""By run key, a value and its place in the file."""

_SAME = {
    "zero_optimization.stage": "zero",
    "gradient_clipping": "optimizer.clip",
}
_SCALING = {
    "fp16.loss_scale": "fp16.scale",
    "fp16.initial_scale_power": "fp16.initial_scale_power",
    "fp16.loss_scale_window": "fp16.window",
    "fp16.hysteresis": "fp16.hysteresis",
    "fp16.min_loss_scale": "fp16.min_scale",
}


def adopt(request: Request, content: dict[str, Any] | None, topology: Topology) -> tuple[Request, Own | None]:
    """Return the request with the file's word wherever it gave none itself, and what is left of the file, if any.

    A run key that was given stays: where the file says something else, the rules refuse both by name. Raises
    RequestError where the file contradicts itself, or asks for what no run key can say.
    """
    if content is None:
        return request, None
    own, ranks = _plainly_autocast(dsfile.own(request.spec.ds_config or "", content), topology), topology.ranks.data
    _require_data_parallelism(own)
    taken: Taken = {key: (own.leaves[path], own.place(path)) for path, key in _SAME.items() if path in own.leaves}
    taken |= _precision(own, request) | _offload(own, request) | _batch(own, request, ranks)
    precision = request.spec.precision if "precision" in request.origins else taken.get("precision", ("",))[0]
    if precision in ("fp16", "fp16-autocast"):
        more, own = _loss_scaling(own)
        taken |= more
    more, own = adopt_schedule.schedule(request, own)
    taken |= more
    taken = {key: value for key, value in taken.items() if key not in request.origins}
    return extend(request, taken), own


def _require_data_parallelism(own: Own) -> None:
    """Refuse other parallelism before the batch equation, which would count other ranks than DeepSpeed."""
    said = [path for path in dsconfig.PARALLELISM if own.leaves.get(path) not in dsconfig.UNDIVIDED]
    if said:
        raise RequestError(
            f"{said[0]} is {own.leaves[said[0]]}, and Halfstep's ranks are all data-parallel",
            where=own.place(*said),
            fix="remove it; zero=3 shards a model that is too large for one device",
        )


def _precision(own: Own, request: Request) -> Taken:
    fp16, bf16 = own.leaves.get("fp16.enabled"), own.leaves.get("bf16.enabled")
    if fp16 and bf16 and "precision" not in request.origins:
        raise RequestError(
            "fp16.enabled and bf16.enabled are both true", where=own.origin, fix="leave one of them on, or none"
        )
    if fp16 or bf16:
        name = "fp16" if fp16 else "bf16"
        return {"precision": (name, own.place(f"{name}.enabled"))}
    if own.leaves.get("torch_autocast.enabled"):
        name = {dtype: name for name, dtype in dsconfig.AUTOCAST_DTYPES.items()}.get(own.leaves["torch_autocast.dtype"])
        if name is None and "precision" not in request.origins:
            raise RequestError(
                f"torch.autocast has no {own.leaves['torch_autocast.dtype']}",
                where=own.place("torch_autocast.dtype"),
                fix="write bfloat16 or float16, or turn torch_autocast.enabled off",
            )
        return {"precision": (f"{name}-autocast", own.place("torch_autocast.enabled", "torch_autocast.dtype"))}
    if bf16 is False and "fp16.enabled" in own.autos and "precision" not in request.origins:
        raise RequestError(
            'bf16.enabled is false and fp16.enabled "auto", which leaves open whether to train in fp16 or fp32',
            where=own.place("fp16.enabled", "bf16.enabled"),
            fix="write true or false, or give precision=fp16 or precision=fp32",
        )
    said = [path for path in ("fp16.enabled", "bf16.enabled") if path in own.leaves]
    # A file that speaks of 16 bits and turns them on nowhere trains in fp32; "auto" leaves it to Halfstep.
    if said and not {"fp16.enabled", "bf16.enabled"} & set(own.autos):
        return {"precision": ("fp32", own.place(*said))}
    return {}


def _plainly_autocast(own: Own, topology: Topology) -> Own:
    """Return the file with one name for the format that autocast has; unset, it is torch's own for the device."""
    if not own.leaves.get("torch_autocast.enabled"):
        return own
    said = own.leaves.get("torch_autocast.dtype") or ("float16" if topology.accelerator == "cuda" else "bfloat16")
    name = str(said).lower().removeprefix("torch.")
    plain = {"half": "float16", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    return dataclasses.replace(own, leaves={**own.leaves, "torch_autocast.dtype": plain})


def _loss_scaling(own: Own) -> tuple[Taken, Own]:
    """Return the run keys of loss scaling; beside a fixed scale DeepSpeed reads none of the others."""
    keys = {path: name for path, name in _SCALING.items() if path in own.leaves}
    if own.leaves.get("fp16.loss_scale"):
        own = own.without([path for path in keys if path != "fp16.loss_scale"])
        keys = {"fp16.loss_scale": "fp16.scale"}
    return {name: (own.leaves[path], own.place(path)) for path, name in keys.items()}, own


def _offload(own: Own, request: Request) -> Taken:
    paths = [f"zero_optimization.offload_{what}" for what in ("optimizer", "param")]
    said = [f"{path}.device" for path in paths if f"{path}.device" in own.leaves]
    taken: Taken = {}
    if said and "offload" not in request.origins:
        moved = [own.leaves.get(f"{path}.device", "none") for path in paths]
        name = next((key for key, devices in dsconfig.OFFLOADS.items() if devices == (moved[0], moved[1])), None)
        if name is None:
            stay = ["stay" if device == "none" else f"go to {device}" for device in moved]
            raise RequestError(
                f"the optimizer's states {stay[0]} and the weights {stay[1]}, which is not one of the ways",
                where=own.place(*said),
                fix="move nothing, the optimizer to cpu, both to cpu, or both to nvme (run key offload)",
            )
        taken["offload"] = (name, own.place(*said))
    folders = {f"{path}.nvme_path": own.leaves.get(f"{path}.nvme_path") for path in paths}
    folders = {path: folder for path, folder in folders.items() if folder is not None}
    if folders and "nvme" in {own.leaves.get(f"{path}.device") for path in paths}:
        if len(set(folders.values())) > 1:
            raise RequestError(
                "the two nvme_path are different folders", where=own.place(*folders), fix="name one folder in both"
            )
        taken["nvme_path"] = (next(iter(folders.values())), own.place(*folders))
    return taken


def _batch(own: Own, request: Request, ranks: int) -> Taken:
    """Solve the batch equation as DeepSpeed does for what the file says, and as Halfstep for what it leaves out.

    DeepSpeed takes an accumulation of 1 where a file gives the micro-batch alone (runtime/config.py,
    _set_batch_related_parameters).
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, accumulation = (own.leaves.get(name) for name in names)
    if total and micro and accumulation and total != micro * accumulation * ranks:
        raise RequestError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accumulation} x {ranks} ranks",
            where=own.origin,
            fix=f"write train_batch_size {micro * accumulation * ranks}, or leave one of the three out",
        )
    spec, given = request.spec.batch, request.origins
    said = [name for name in names if name in own.leaves]
    where = own.place(*said) + (f" x {ranks} ranks" if said != ["train_batch_size"] else "")
    global_ = spec.global_ if "batch.global" in given else total
    each = spec.micro if "batch.micro" in given else micro
    if accumulation and global_ is None and each is None:
        global_ = spec.global_
    if accumulation and global_ is None and each is not None:
        global_ = each * accumulation * ranks
    elif accumulation and global_ is not None and each is None:
        each = _whole(global_, accumulation, ranks, where)
    elif micro and global_ is None and "batch.micro" not in given:
        global_ = micro * ranks
    taken: Taken = {"batch.global": (global_, where), "batch.micro": (each, where)}
    return {key: value for key, value in taken.items() if value[0] is not None}


def _whole(global_: int, accumulation: int, ranks: int, where: str) -> int:
    """Return the micro-batch that a global batch and an accumulation leave."""
    step = accumulation * ranks
    if global_ % step:
        near = [size for size in (global_ // step * step, -(-global_ // step) * step) if size]
        raise RequestError(
            f"batch.global={global_} is not a whole micro-batch x gradient_accumulation_steps={accumulation} x "
            f"{ranks} ranks",
            where=where,
            fix=f"take batch.global={' or '.join(map(str, near))}, or another accumulation",
        )
    return global_ // step
