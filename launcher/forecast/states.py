"""Weights, gradients, fp32 masters and optimizer states of one rank, byte for byte as DeepSpeed 0.19.8 holds them."""

from dataclasses import dataclass

from halfstep.launcher.config import optimizers
from halfstep.launcher.forecast import tensors as cuts
from halfstep.launcher.forecast.tensors import Tensors
from halfstep.launcher.forecast.workload import Workload

FULL = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on one rank; gradients are those at the end of a step's backward passes, before they are reduced."""

    weights: int
    persistent: int
    """Of stage 3: the small tensors that stay whole beside their shards."""
    gradients: int
    """What micro-batches are added up in."""
    resting_gradients: int
    """Of them, what stays allocated when the step is over."""
    reduced_gradients: int
    """What is left of them after the reduction: what the optimizer steps with."""
    masters: int
    moments: int
    average: int
    """The moving average of the masters, beside them."""
    host_masters: int
    host_moments: int
    host_average: int
    host_gradients: int
    host_weights: int
    """Offloaded weights, and the 16-bit copy that an offloaded optimizer of stages 1 and 2 writes new weights to."""

    def totals(self) -> dict[str, int]:
        """Return the bytes of each kind wherever they lie: what a plan calls model states."""
        average = self.average + self.host_average
        return {
            "weights": self.weights + self.persistent + self.host_weights,
            "gradients": max(self.gradients, self.host_gradients),
            "fp32_masters": self.masters + self.host_masters,
            "optimizer_moments": self.moments + self.host_moments,
            **({"weight_average": average} if average else {}),
        }


def accumulator_bytes(workload: Workload) -> int:
    """Return the bytes of one element of what gradients are added up in."""
    return FULL if "fp32" in (workload.precision, workload.accumulation_dtype) else 2


def uses_bf16_optimizer(workload: Workload) -> bool:
    """Tell whether DeepSpeed takes BF16_Optimizer, which shards no gradient (engine.py, _do_optimizer_sanity_check)."""
    return (
        workload.zero == 1
        and workload.precision == "bf16"
        and workload.accumulation_dtype == "fp32"
        and workload.offload_optimizer == "none"
    )


def optimizer_bytes(workload: Workload, elements: int) -> int:
    """Return the bytes that the optimizer keeps beside some elements of the masters.

    Where it keeps less of hidden matrices than of the rest, they are taken to have their share of both.
    """
    every = cuts.trained(workload)
    options = {"momentum": workload.momentum, **dict.fromkeys(workload.optimizer_switches, 1)}
    of_hidden = optimizers.state_bytes(workload.optimizer, options)
    elsewhere = optimizers.state_bytes_elsewhere(workload.optimizer, options)
    if of_hidden == elsewhere:
        return of_hidden * elements
    both = of_hidden * every.hidden + elsewhere * (every.elements - every.hidden)
    return -(-both * elements // every.elements)


def states(workload: Workload, rank: int | None = None) -> States:
    """Return what one rank holds; without `rank`, what the rank that holds most does.

    The sharding: stage 1 cuts masters and moments, stage 2 also gradients, stage 3 also weights. Flat groups are padded
    to equal shards at stages 1 and 2, every tensor by itself at stage 3. In fp32 the masters are a second copy wherever
    they are a shard, and the weights themselves at stage 0.
    Frozen weights under adapters have a part in the weights alone.
    """
    every, frozen = cuts.trained(workload), cuts.frozen(workload)
    whole, shard = _elements(workload, every)
    compute, fp32 = workload.element_bytes, workload.precision == "fp32"
    masters = 0 if workload.zero == 0 and fp32 else FULL * shard
    moments = optimizer_bytes(workload, shard)
    average = FULL * shard if workload.averaged else 0
    weights = compute * (shard if workload.zero == 3 else whole)
    kept = compute * cuts.persistent(every, workload.persistence_threshold) if workload.zero == 3 else 0
    if frozen:
        weights += compute * (cuts.split(frozen, workload.ranks) if workload.zero == 3 else frozen.elements)
        kept += compute * cuts.persistent(frozen, workload.persistence_threshold) if workload.zero == 3 else 0
    gradients, resting, reduced = _gradients(workload, every, whole, shard, rank)
    optimizer_away = workload.offload_optimizer != "none" and workload.zero > 0
    weights_away = workload.offload_param != "none" and workload.zero == 3
    host_gradients = host_weights = 0
    if optimizer_away:
        host_gradients = FULL * shard * (2 if workload.zero == 3 else 1)
        if workload.zero == 3:  # the accumulation buffer moves to the host too (stage3.py, grad_partitions_flat_buffer)
            gradients = resting = reduced = 0
        else:
            host_weights = compute * shard
            if accumulator_bytes(workload) == workload.element_bytes:  # each gradient goes to the host as it is reduced
                reduced = 0
                gradients = gradients if workload.zero == 1 else 0
    if weights_away:
        host_weights, weights = host_weights + weights, 0
    return States(
        weights=weights,
        persistent=kept,
        gradients=gradients,
        resting_gradients=resting,
        reduced_gradients=reduced,
        masters=0 if optimizer_away else masters,
        moments=0 if optimizer_away else moments,
        average=0 if optimizer_away else average,
        host_masters=masters if optimizer_away and workload.offload_optimizer == "cpu" else 0,
        host_moments=moments if optimizer_away and workload.offload_optimizer == "cpu" else 0,
        host_average=average if optimizer_away else 0,
        host_gradients=host_gradients,
        host_weights=host_weights if workload.offload_param != "nvme" else 0,
    )


def _elements(workload: Workload, every: Tensors) -> tuple[int, int]:
    """Return the elements of whole weights, padding included, and of one rank's shard."""
    if workload.zero == 0:
        return every.elements, every.elements
    if workload.zero == 3:
        return every.elements, cuts.split(every, workload.ranks)
    padded = cuts.flat(every, workload.ranks)
    return padded, padded // workload.ranks


def _gradients(workload: Workload, every: Tensors, whole: int, shard: int, rank: int | None) -> tuple[int, int, int]:
    """Return the bytes of gradients before the reduction, at rest, and after the reduction."""
    each = accumulator_bytes(workload)
    if workload.zero == 0:
        return each * every.elements, 0, each * every.elements
    if workload.zero == 3:
        return each * shard, each * shard, each * shard
    if uses_bf16_optimizer(workload):
        # An fp32 sum of everything for good, and bf16 gradients beside it until the step is over.
        return FULL * whole + 2 * every.elements, FULL * whole, FULL * whole + 2 * every.elements
    if each != workload.element_bytes:  # 16-bit gradients into a flat fp32 shard
        reduced = each * shard
    else:
        touched = cuts.touched(every, workload.ranks)
        reduced = each * (max(touched) if rank is None else touched[rank])
    return each * every.elements if workload.zero == 1 else reduced, 0, reduced
