"""Whether only the axes changed: confounders, initial weights, data order, and every key in which two cells differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.study.collect import Result

ABSENT = "not used"
WHOLE = "the cell as a whole"
"""What a difference follows from that no axis explains by itself."""
# What is known to change numerics or speed beside the stage and the precision (docs/deepspeed.md).
_CONFOUNDERS = {
    "reduce bucket, elements": "zero_optimization.reduce_bucket_size",
    "gather bucket, elements": "zero_optimization.allgather_bucket_size",
    "overlapped communication": "zero_optimization.overlap_comm",
    "communication dtype": "communication_data_type",
    "accumulation dtype": "data_types.grad_accum_dtype",
    "optimizer": "optimizer.type",
    "optimizer is torch's own": "optimizer.params.torch_adam",
    "torch's optimizer is fused": "optimizer.params.fused",
    "peak learning rate": "optimizer.params.lr",
    "gradient clipping": "gradient_clipping",
    "global batch, sequences": "train_batch_size",
    "micro-batch, sequences": "train_micro_batch_size_per_gpu",
    "accumulation, micro-steps": "gradient_accumulation_steps",
    "fixed loss scale (0 = dynamic)": "fp16.loss_scale",
    "initial loss scale, power of 2": "fp16.initial_scale_power",
    "loss-scale window, steps": "fp16.loss_scale_window",
    "loss-scale hysteresis": "fp16.hysteresis",
    "smallest loss scale": "fp16.min_loss_scale",
}
# Of the plan itself, beside DeepSpeed's config.
_PLANNED = {
    "sequence": "sequence, tokens",
    "steps": "steps",
    "compile": "compiled",
    "activation_checkpointing": "activation checkpointing",
    "fused_head": "head and loss in one",
    "documents": "documents",
    "router_loss": "coefficient of the routers' loss",
    "lora.rank": "rank of the adapters",
    "lora.alpha": "alpha of the adapters",
    "lora.dropout": "dropout of the adapters",
    "lora.parameters": "parameters of the adapters",
    "ema_decay": "decay of the averaged weights",
    "data.digest": "corpus",
    "data.validation_windows": "validation sequences",
    "model.parameters": "parameters",
    "topology.world_size": "ranks",
    "topology.ranks_per_node": "ranks per node",
    "topology.device_name": "device",
    "schedule.kind": "schedule",
    "schedule.warmup": "warm-up, steps",
    "numerics.repairs": "repairs at stage 0",
    "eval_every": "steps between evaluations",
}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One thing that could differ between cells."""

    name: str
    values: dict[str, tuple[str, ...]]
    """Its values, and the cells that have each."""
    follows_from: str | None
    """The axis that decides it, or WHOLE; None where it is the same everywhere, or differs within a cell."""

    @property
    def pinned(self) -> bool:
        """Whether it is the same in every cell that uses it."""
        return len([value for value in self.values if value != ABSENT]) <= 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """All that is known of how equal the cells' conditions were."""

    confounders: tuple[Condition, ...]
    differences: tuple[Condition, ...]
    """Every DeepSpeed key that is not the same in all cells."""
    weights: dict[str, tuple[str, ...]]
    """Seeds and precisions in which cells did not begin with the same weights, and the checksums; empty is good."""
    other_data: str
    """What makes cells of one seed read other batches; empty where they read the same."""
    mixed: dict[str, tuple[str, ...]]
    """Devices, versions and revisions of which there is more than one."""
    machines: tuple[str, ...]
    versions: dict[str, tuple[str, ...]]
    """Of each package, all versions that were met."""
    revisions: tuple[str, ...]

    @property
    def unexplained(self) -> tuple[Condition, ...]:
        """Return what differs between the seeds of one cell."""
        return tuple(
            difference for difference in self.differences if difference.follows_from is None and not difference.pinned
        )


def conditions(results: Sequence[Result], axes: dict[str, Any]) -> Conditions:
    """Compare what the run directories say was really asked of DeepSpeed, cell by cell."""
    planned = [result for result in results if result.plan]
    leaves = {id(result): flatten(result.plan["deepspeed"]) for result in planned}
    names = sorted(set[str]().union(*(set(tree) for tree in leaves.values())) if leaves else [])
    of_deepspeed = {
        key: _condition(key, planned, lambda result, key=key: leaves[id(result)].get(key), axes) for key in names
    }
    others = [
        _condition(title, planned, lambda result, key=key: flatten(result.plan).get(key), axes)
        for key, title in _PLANNED.items()
    ]
    named = [_renamed(of_deepspeed[key], title) for title, key in _CONFOUNDERS.items() if key in of_deepspeed]
    started = [result for result in planned if result.environment]
    versions, revisions = (
        _versions(started),
        _seen(str(result.environment and result.environment.code_revision) for result in started),
    )
    several = {name: seen for name, seen in versions.items() if len(seen) > 1}
    several |= {
        name: seen for name, seen in (("device", _seen(map(_device, started))), ("code", revisions)) if len(seen) > 1
    }
    moved = [
        condition.name
        for condition in others
        if condition.name in ("sequence, tokens", "corpus") and not condition.pinned
    ]
    moved += [
        condition.name for condition in named if condition.name.startswith("global batch") and not condition.pinned
    ]
    return Conditions(
        confounders=(*named, *others),
        differences=tuple(condition for condition in [*of_deepspeed.values(), *others] if len(condition.values) > 1),
        weights=_weights(planned),
        other_data=", ".join(moved),
        mixed=several,
        machines=_seen(f"{result.environment and result.environment.host}: {_device(result)}" for result in started),
        versions=versions,
        revisions=revisions,
    )


def _condition(name: str, results: Sequence[Result], value: Any, axes: dict[str, Any]) -> Condition:
    values: dict[str, list[str]] = {}
    for result in results:
        got = value(result)
        values.setdefault(ABSENT if got is None else _text(got), []).append(result.name)
    cells = {text: tuple(dict.fromkeys(names)) for text, names in values.items()}
    return Condition(name=name, values=cells, follows_from=_follows(results, value, axes) if len(cells) > 1 else None)


def _follows(results: Sequence[Result], value: Any, axes: dict[str, Any]) -> str | None:
    """Return the axis whose value decides a key's: equal there, equal here; or WHOLE; or None."""
    several = [axis for axis, labels in axes.items() if len(labels) > 1]
    for chosen in [*([axis] for axis in several), several]:
        decided: dict[tuple[str, ...], str] = {}
        if chosen and all(
            decided.setdefault(tuple(result.values[axis] for axis in chosen), _text(value(result)))
            == _text(value(result))
            for result in results
        ):
            return chosen[0].removesuffix(".name") if len(chosen) == 1 else WHOLE
    return None


def _renamed(condition: Condition, name: str) -> Condition:
    return Condition(name=name, values=condition.values, follows_from=condition.follows_from)


def _weights(results: Sequence[Result]) -> dict[str, tuple[str, ...]]:
    """Return where checksums of the initial masters differ that should not.

    A half-precision cell begins with the same draw, rounded to its type: one checksum for each precision and model.
    """
    groups: dict[str, dict[str, None]] = {}
    for result in results:
        if result.checksum is not None:
            parameters = (result.plan.get("model") or {}).get("parameters")
            groups.setdefault(f"seed {result.seed}, {result.precision}, {parameters} parameters", {})[
                result.checksum
            ] = None
    return {name: tuple(seen) for name, seen in groups.items() if len(seen) > 1}


def _device(result: Result) -> str:
    named = (result.plan.get("topology") or {}).get("device_name")
    return named or (result.environment.cpu if result.environment else "unknown processor")


def _versions(results: Sequence[Result]) -> dict[str, tuple[str, ...]]:
    known = [result.environment.versions for result in results if result.environment]
    names = dict.fromkeys(name for versions in known for name in versions)
    return {name: _seen(versions.get(name) for versions in known) for name in names}


def _seen(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value) for value in values if value is not None))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
