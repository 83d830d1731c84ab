"""What ranks send each other in an optimizer step, as DeepSpeed 0.19.8 implements the stages, and how long it takes."""

import math
from dataclasses import dataclass

from halfstep.launcher.forecast import tensors
from halfstep.launcher.forecast.calibration import Calibration
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.workload import Workload

_BUCKET = 500_000_000
_QUANTIZED_GATHER, _QUANTIZED_REDUCE = 0.5, 0.25  # int8 against 16 bits; int4 (ZeRO++, Wang et al. 2023)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """What one rank sends in one optimizer step, with the (n - 1) / n of a ring taken as 1."""

    hidden_bytes: float = 0.0
    """Sent while the rank computes, where the backend can do both."""
    exposed_bytes: float = 0.0
    """Sent while nothing else goes on."""
    node_bytes: float = 0.0
    """Sent inside a node only, while the rank computes (ZeRO++'s second copy)."""
    calls: float = 0.0
    """Collectives."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.hidden_bytes + self.exposed_bytes + self.node_bytes


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that talk to each other: how many, and how many of them share a node."""

    ranks: int
    local: int
    """On each node."""

    @property
    def nodes(self) -> int:
        """Nodes that they span."""
        return max(1, math.ceil(self.ranks / self.local))


def data_parallel_group(workload: Workload, layout: Layout, hardware: Hardware) -> Group:
    """Return the ranks that share gradients; tensor-parallel ranks are neighbours, and so take up the node first."""
    ranks = workload.ranks * layout.context
    node = _node(workload, hardware)
    if ranks * layout.tensor <= node:
        return Group(ranks=ranks, local=ranks)
    return Group(ranks=ranks, local=max(1, min(ranks, node // layout.tensor)))


def volume(workload: Workload, layout: Layout) -> Volume:
    """Return a rank's traffic for gradients and weights in one optimizer step.

    With psi parameters, g micro-steps, and w and d bytes of a weight and of a gradient on the wire: stage 0 sends
    2 psi d; stage 1 2 psi d + psi w, because `allreduce_and_scatter` (stage_1_and_2.py) ends in a real all-reduce;
    stage 2 (2 g psi d + psi w), for it reduces at every micro-step; stage 3 g (2 psi w + psi d), g (psi w + psi d)
    where all weights may stay from the forward to the backward pass (engine/build.py), and a third gathering where
    blocks are recomputed by reentrant checkpointing. Of frozen weights there are no gradients, and none are gathered
    but at stage 3. FSDP gathers
    and reduces at every micro-step as stage 3 does; with SHARD_GRAD_OP it gathers once for forward and backward.
    """
    if workload.ranks * layout.context == 1:
        return Volume()
    trained = tensors.trained(workload).elements
    every = trained + (workload.parameters if workload.adapter_rank else 0)
    psi, whole, g = trained / layout.cut, every / layout.cut, workload.accumulation
    weight = workload.element_bytes
    gradient = 4 if workload.communication_dtype == "fp32" else weight
    layers = (workload.shape.layers if workload.shape else 32) / layout.pipeline
    buckets = max(1.0, psi / min(workload.reduce_bucket, _BUCKET))
    if layout.collectives == "ddp":
        return Volume(hidden_bytes=2 * psi * weight, calls=2 * buckets)
    if layout.collectives == "megatron":  # gradients are reduced in fp32 at the boundary, weights gathered once
        return Volume(hidden_bytes=psi * (4 + weight), calls=2 * buckets)
    if layout.collectives == "fsdp" and layout.pipeline > 1:  # gathered once, reduced once: FSDP2 under a pipeline
        return Volume(hidden_bytes=2 * psi * weight, calls=2 * layers)
    if layout.collectives == "fsdp":
        passes = 2 if workload.zero == 3 else 1
        return Volume(hidden_bytes=g * psi * weight * (passes + 1), calls=g * layers * (passes + 1))
    if workload.zero == 3:
        if layout.quantized:
            hidden = g * (whole * weight * _QUANTIZED_GATHER + psi * gradient * _QUANTIZED_REDUCE)
            return Volume(hidden_bytes=hidden, node_bytes=g * whole * weight, calls=3 * g * layers)
        # The first weights come again when all others have been used twice.
        stay = every <= min(workload.max_live_parameters, workload.max_reuse_distance / 2)
        gathers = 3 if layout.reentrant and workload.activation_checkpointing else 1 if stay else 2
        return Volume(hidden_bytes=g * (gathers * whole * weight + psi * gradient), calls=(gathers + 1) * g * layers)
    reduced = 2 * psi * gradient * (g if workload.zero == 2 else 1)
    calls = buckets * (g if workload.zero == 2 else 1)
    gathered = psi * weight if workload.zero else 0.0
    if workload.overlap_comm:
        return Volume(hidden_bytes=reduced, exposed_bytes=gathered, calls=calls + 1)
    return Volume(exposed_bytes=reduced + gathered, calls=calls + 1)


def seconds(sent: float, calls: float, group: Group, hardware: Hardware, layout: Layout, known: Calibration) -> float:
    """Return how long one rank's `sent` bytes take in `calls` collectives: alpha-beta over rings.

    Inside a node the link is the limit. Between nodes it is also what the node's adapters carry, which the group shares
    with nobody while it talks: a ring brings every byte into each node once, through as many adapters as the group has
    ranks there.
    """
    if group.ranks == 1 or not (sent or calls):
        return 0.0
    share = (group.ranks - 1) / group.ranks
    rate = (hardware.link or math.inf) * known.link
    latency = (hardware.link_latency or known.link_latency) * math.log2(2 * min(group.ranks, group.local))
    if group.nodes > 1:
        rate = min(rate, _network(hardware, layout) * known.network * group.local)
        latency += known.network_latency * (group.nodes - 1)
    return sent * share / rate + calls * latency


def tensor_seconds(
    workload: Workload, layout: Layout, hardware: Hardware, known: Calibration, recompute: float
) -> float:
    """Return the all-reduces of tensor parallelism in one layer of one micro-step: two forward, two backward."""
    if layout.tensor == 1:
        return 0.0
    assert workload.shape is not None, "a layer's messages have its width"
    message = workload.micro * workload.sequence / layout.context * workload.shape.width * 2
    node = _node(workload, hardware)
    group = Group(ranks=layout.tensor, local=min(layout.tensor, node))
    count = 4 + 2 * recompute
    return seconds(2 * message * count, count, group, hardware, layout, known)


def context_seconds(
    workload: Workload, layout: Layout, hardware: Hardware, known: Calibration, recompute: float
) -> float:
    """Return what the ranks of a sequence take to exchange their keys and values in one layer of one micro-step."""
    if layout.context == 1:
        return 0.0
    shape = workload.shape
    assert shape is not None, "a layer's keys have a width"
    gathered = workload.micro * workload.sequence * 2 * shape.kv_heads * shape.head_dim / layout.tensor * 2
    node = _node(workload, hardware)
    ranks = layout.context
    local = ranks if ranks * layout.tensor <= node else max(1, min(ranks, node // layout.tensor))
    count = 2 + (1 if recompute else 0)
    return seconds(gathered * count, count, Group(ranks=ranks, local=local), hardware, layout, known)


def pipeline_seconds(workload: Workload, layout: Layout, hardware: Hardware, known: Calibration) -> float:
    """Return what a micro-step's activations and their gradients take from stage to stage.

    Every tensor-parallel rank sends its part. Interleaved schedules send while they compute (Narayanan et al. 2021).
    """
    if layout.pipeline == 1:
        return 0.0
    assert workload.shape is not None, "a stage's messages have the model's width"
    message = workload.micro * workload.sequence / layout.context * workload.shape.width * 2 / layout.tensor
    hides = layout.virtual > 1
    sent = 2 * layout.virtual * message * (min(1.0, known.shown) if hides else 1.0)
    wait = 0.0 if hides else known.pipeline_latency
    devices = workload.ranks * layout.context * layout.cut
    inside = hardware.domain is not None or devices <= workload.ranks_per_node
    if inside:
        return wait + sent / ((hardware.link or math.inf) * known.link)
    return wait + sent / (_network(hardware, layout) * known.network)


def _network(hardware: Hardware, layout: Layout) -> float:
    return layout.network or hardware.network or math.inf


def _node(workload: Workload, hardware: Hardware) -> int:
    return max(workload.ranks_per_node, hardware.domain or 1)
