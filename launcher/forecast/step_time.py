"""How long an optimizer step takes: computing, communication, what of that hides, the optimizer."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from halfstep.launcher.forecast import communication, compute, tensors
from halfstep.launcher.forecast.calibration import CPU_STACK, OWN_STACK, Calibration, shipped
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.workload import Workload
from halfstep.models import lora, shapes

CONVENTION = "causal"
"""Of `halfstep.models.shapes.flops_per_token`: 6 (N - V h) + 6 L h s."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The seconds of one optimizer step by cause; they add up to it."""

    matmul: float
    attention: float
    memory_bound: float
    """Elementwise kernels, logits, reading weights."""
    host_bound: float
    """Waiting for the host to launch kernels."""
    tensor_parallel: float
    """Sending inside a layer, context parallelism included."""
    pipeline: float
    """Sending between stages, and the bubble."""
    communication: float
    """Gradients and weights, as far as computing does not hide them."""
    optimizer: float
    """The update, and moving what is offloaded."""


@dataclass(frozen=True, kw_only=True)
class TimeForecast:
    """One optimizer step of one workload on one device type."""

    step_seconds: float
    low_seconds: float
    """Nine runs of ten lie between this"""
    high_seconds: float
    """and this, as far as the published runs of the calibration tell."""
    tokens: int
    """Of one optimizer step."""
    devices: int
    flops_per_token: float
    peak_flops: float
    """Of one device."""
    communication_bytes: float
    """Sent by one rank in one step."""
    hidden_seconds: float
    """Of communication, behind computing."""
    terms: Terms

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.step_seconds

    @property
    def tokens_per_second_per_device(self) -> float:
        """Of each device."""
        return self.tokens_per_second / self.devices

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation by the convention `causal`, 0 to 1."""
        return self.tokens_per_second_per_device * self.flops_per_token / self.peak_flops

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON-able numbers."""
        return {
            "step_seconds": self.step_seconds,
            "low_seconds": self.low_seconds,
            "high_seconds": self.high_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_device,
            "mfu": self.mfu,
            "flops_convention": CONVENTION,
            "communication_bytes_per_rank": self.communication_bytes,
            "hidden_communication_seconds": self.hidden_seconds,
            "terms": asdict(self.terms),
        }


def forecast(
    workload: Workload,
    hardware: Hardware,
    *,
    layout: Layout | None = None,
    stack: str | None = None,
    known: Calibration | None = None,
) -> TimeForecast | None:
    """Return how long a step takes, or None where the shape or the device is not known well enough.

    `workload.ranks` are data-parallel; `layout` says what else there is. `stack` names whose calibrated factor applies.
    """
    layout = layout or Layout(compiled=workload.compile)
    known = known or shipped(workload.accelerator)
    stack = stack or (CPU_STACK if workload.accelerator == "cpu" else OWN_STACK)
    if stack != OWN_STACK:  # what was counted are DeepSpeed's operators around a model of transformers
        known = known.replace(operator=0.0)
    hardware = hardware.shared(workload.ranks_per_node)
    if not compute.can_tell(workload, layout, hardware):
        return None
    shape, peak = workload.shape, hardware.peak(layout.arithmetic or workload.arithmetic)
    assert shape is not None
    peak = peak or hardware.peak(workload.arithmetic)
    assert peak is not None
    precision = layout.arithmetic or workload.arithmetic
    sent = communication.volume(workload, layout)
    terms, hidden = _terms(workload, layout, hardware, known, sent, known.factor(stack, hardware.name, precision))
    total = sum(asdict(terms).values())
    spread = known.spread_seen if f"stack:{stack}" in known.factors else known.spread_unseen
    return TimeForecast(
        step_seconds=total,
        low_seconds=total / spread,
        high_seconds=total * spread,
        tokens=workload.micro * workload.sequence * workload.accumulation * workload.ranks,
        devices=workload.ranks * layout.context * layout.cut,
        flops_per_token=_flops_per_token(workload, shape),
        peak_flops=peak,
        communication_bytes=sent.total_bytes,
        hidden_seconds=hidden,
        terms=terms,
    )


def _terms(
    workload: Workload,
    layout: Layout,
    hardware: Hardware,
    known: Calibration,
    sent: communication.Volume,
    factor: float,
) -> tuple[Terms, float]:
    stage = compute.stage(workload, layout, hardware, known)
    last = compute.head(workload, layout, hardware, known)
    again = compute.recomputed(workload, layout)
    layers = workload.shape.layers if workload.shape else 0
    tensor = communication.tensor_seconds(workload, layout, hardware, known, again)
    tensor *= min(1.0, known.shown) if layout.tensor_overlap else 1.0
    tensor += communication.context_seconds(workload, layout, hardware, known, again)
    tensor *= layers / layout.pipeline
    between = communication.pipeline_seconds(workload, layout, hardware, known)
    # The head slows its stage down, and all wait for it, unless it and the embedding were given the place of layers.
    part = 1 / layout.pipeline if (layers + 2) % layout.pipeline == 0 else 1.0
    busy, micro_steps = stage.seconds + tensor + part * last.seconds, workload.accumulation
    bubble = (layout.pipeline - 1) / layout.virtual * (stage.seconds + tensor + between)

    group = communication.data_parallel_group(workload, layout, hardware)
    apart = sent.exposed_bytes / sent.total_bytes if sent.total_bytes else 0.0
    hidden = communication.seconds(sent.hidden_bytes, sent.calls * (1 - apart), group, hardware, layout, known)
    if workload.zero == 3 and layout.collectives == "deepspeed":
        hidden *= known.stage3
    exposed = communication.seconds(sent.exposed_bytes, sent.calls * apart, group, hardware, layout, known)
    if sent.node_bytes:
        inside = communication.Group(ranks=group.local, local=group.local)
        hidden += communication.seconds(sent.node_bytes, 0, inside, hardware, layout, known)
    if workload.offload_param != "none" and hardware.pcie:  # a rank fetches its shard from the host before every gather
        hidden += 2 * micro_steps * workload.parameters / workload.ranks * workload.element_bytes / hardware.pcie
    window = busy * micro_steps * (1.0 if workload.zero >= 2 or layout.collectives == "fsdp" else 2 / 3 / micro_steps)
    share = min(1.0, known.shown)
    shown = share * hidden + max(0.0, (1 - share) * hidden - window)

    # Stragglers and switches: what no term explains grows with the number of nodes.
    nodes = max(1.0, workload.ranks * layout.context * layout.cut / workload.ranks_per_node)
    pace = factor * (1 + known.straggling * math.log2(nodes))
    return (
        Terms(
            matmul=(stage.matmul + part * last.matmul) * micro_steps * pace,
            attention=stage.attention * micro_steps * pace,
            memory_bound=(stage.memory + part * last.memory) * micro_steps * pace,
            host_bound=(stage.seconds - stage.device) * micro_steps * pace,
            tensor_parallel=tensor * micro_steps * pace,
            pipeline=(bubble + between * micro_steps) * pace,
            communication=(shown + exposed) * pace,
            optimizer=_optimizer(workload, layout, hardware, known) * pace,
        ),
        hidden - shown,
    )


def _flops_per_token(workload: Workload, shape: shapes.Shape) -> float:
    if not workload.adapter_rank:
        return shapes.flops_per_token(shape, workload.sequence, CONVENTION)
    attention = shapes.attention_width(shape) * workload.sequence
    trained = tensors.trained(workload).elements
    return lora.flops_per_token(shapes.multiplied_parameters(shape), trained, attention)


def _optimizer(workload: Workload, layout: Layout, hardware: Hardware, known: Calibration) -> float:
    """Return the seconds of the update of a rank's parameters; on the host, with gradients going and weights coming."""
    shard = workload.ranks * layout.context if workload.zero or layout.collectives == "megatron" else 1
    own = tensors.trained(workload).elements / layout.cut / shard
    assert hardware.bandwidth is not None, "the caller asks `can_tell` first"
    if workload.offload_optimizer == "none":
        return own * known.optimizer / hardware.bandwidth
    moved = own * (4 + workload.element_bytes)
    return own * 30 / known.host_adam + moved / (hardware.pcie or known.host_adam)
