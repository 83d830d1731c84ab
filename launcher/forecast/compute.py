"""What one device computes in one micro-step, and how long that takes: a roofline with few constants."""

import math
from dataclasses import dataclass

from halfstep.launcher.forecast import tensors
from halfstep.launcher.forecast.calibration import Calibration
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.workload import Workload

_SELECTIVE = 0.15
"""Of a forward pass, what selective checkpointing recomputes besides attention."""
_WAIT = 4.0
"""How sharply the host or the device decides: (a^p + b^p)^(1/p)."""


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """The seconds of one forward and backward on one device, layers and head, by what limits them."""

    matmul: float
    """Linear layers and the head."""
    attention: float
    memory: float
    """Elementwise kernels, unfused attention scores, logits, and reading weights."""
    host: float
    """Launching kernels; a GPU works meanwhile."""
    serial: bool = False
    """Whether host and device are one: a CPU computes before it launches the next kernel."""

    @property
    def device(self) -> float:
        """Seconds of the device alone."""
        return self.matmul + self.attention + self.memory

    @property
    def seconds(self) -> float:
        """Seconds of the slower of host and device, smoothly; of both where they are one."""
        if self.serial:
            return self.device + self.host
        return (self.device**_WAIT + self.host**_WAIT) ** (1 / _WAIT)


LAUNCHED = {
    (0, "fp32"): (0, 5),
    (0, "bf16"): (1, 24),
    (0, "fp16"): (1, 24),
    (1, "fp32"): (1, 20),
    (1, "bf16"): (6, 4),
    (1, "fp16"): (5, 33),
    (2, "fp32"): (13, 8),
    (2, "bf16"): (14, 23),
    (2, "fp16"): (14, 23),
    (3, "fp32"): (12, 7),
    (3, "bf16"): (13, 7),
    (3, "fp16"): (13, 7),
}
"""Operators for each parameter beside the model's own, in a micro-step and once more in an optimizer step: DeepSpeed's
hooks, sums, buckets, checks and copies. Counted on engines with torch's fused AdamW (tests/process/test_host_share.py).
"""


def launched(workload: Workload) -> float:
    """Return the operators of DeepSpeed's in a micro-step, with its share of what a whole step has but once."""
    micro_step, step = LAUNCHED[workload.zero, workload.precision]
    count = len(tensors.trained(workload).sizes)
    return count * (micro_step + step / workload.accumulation)


def recomputed(workload: Workload, layout: Layout) -> float:
    """Return how much of a forward pass the backward pass does again: 0 to 1."""
    kind = layout.recompute or ("full" if workload.activation_checkpointing else "none")
    return {"none": 0.0, "selective": _SELECTIVE}.get(kind, 1.0)


def stage(workload: Workload, layout: Layout, hardware: Hardware, known: Calibration) -> MicroStep:
    """Return the seconds of one micro-step of the layers of one pipeline stage, without the head.

    A forward pass takes 2 FLOPs for each weight and token, the backward pass twice that. Attention forward takes 4 s h
    FLOPs a token, half of that where a fused kernel leaves the masked half out; the fused backward computes the scores
    again, 2.5 times the forward (Dao 2023). Bytes are counted in passes over tensors, and the passes are calibrated.
    """
    shape = workload.shape
    assert shape is not None, "the caller asks `can_tell` first"
    assert hardware.bandwidth, "the caller asks `can_tell` first"
    again = recomputed(workload, layout)
    tokens = workload.micro * workload.sequence / layout.context
    layers = shape.layers / layout.pipeline
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    feed = (2 if shape.family == "gpt2" else 3) * shape.ffn
    weights = shape.width * (2 * query + 2 * kv + feed) / layout.tensor
    # A CPU's elementwise kernels convert 16 bits to 32, compute and convert back: fewer bytes save them nothing.
    serial = workload.accelerator == "cpu"
    width, size = shape.width, 4 if serial else (workload.element_bytes + workload.product_bytes) / 2

    # What is frozen has no gradient of its own: the backward pass goes through it once.
    frozen = bool(workload.adapter_rank)
    adapters = tensors.trained(workload).elements / layout.cut if frozen else 0
    multiplied = (2 if frozen else 3) * weights * layers + 3 * adapters + again * (weights * layers + adapters)
    narrow = 1 + known.narrow * math.sqrt(1024 * layout.tensor / shape.width)
    matmul = narrow * 2 * tokens * multiplied / _linear(workload, layout, hardware, known)
    unfused = layout.attention == "unfused"
    causal, passes = (1.0, 3 + again) if unfused else (0.5, 3.5 + (1 if again else 0))
    scores = causal * passes * 4 * tokens * workload.sequence * query / layout.tensor * layers
    attention = scores / (_reach(workload, hardware) * _attention_share(layout, hardware, known, shape.head_dim))

    fused = known.compiled if layout.compiled else 1.0
    whole = 0.0 if layout.sequence_parallel else 0.4  # norms and residuals, on every tensor-parallel rank
    spread = whole + (1 - whole) / layout.tensor
    if serial and workload.product_bytes == 2:
        fused *= known.converted * (known.copied if workload.widened else 1.0)
    moved = (
        fused * known.elementwise * (1 + again / 3) * spread * tokens * (0.5 * width + 0.0625 * feed) * size * layers
    )
    if unfused:
        seen = tokens * workload.sequence * shape.heads / layout.tensor
        moved += known.scores * (1 + again / 3) * seen * size * layers
    moved += known.weight_passes * (1 + again / 3) * weights * layers * (4 if serial else workload.element_bytes)
    host = known.host * layers * (2 + again) * (known.host_tensor if layout.tensor > 1 else 1.0)
    host *= known.host_compiled if layout.compiled else 1.0
    if not serial:
        host += known.operator * launched(workload) / layout.cut
    return MicroStep(
        matmul=matmul,
        attention=attention,
        memory=moved / hardware.bandwidth,
        host=host,
        serial=serial,
    )


def head(workload: Workload, layout: Layout, hardware: Hardware, known: Calibration) -> MicroStep:
    """Return the seconds of one micro-step of the output head and the loss, in 16 bits in every precision."""
    shape = workload.shape
    assert shape is not None, "the caller asks `can_tell` first"
    assert hardware.bandwidth, "the caller asks `can_tell` first"
    tokens = workload.micro * workload.sequence / layout.context
    logits = tokens * shape.vocabulary / layout.tensor
    fused = known.compiled if layout.compiled else 1.0
    passes = 3 + workload.fused_head - (1 if workload.adapter_rank else 0)
    return MicroStep(
        matmul=passes * 2 * logits * shape.width / (_reach(workload, hardware) * known.matmul),
        attention=0.0,
        memory=known.loss * fused * logits * workload.product_bytes / hardware.bandwidth,
        host=0.0,
    )


def _reach(workload: Workload, hardware: Hardware) -> float:
    peak = hardware.peak(workload.arithmetic)
    assert peak, "the caller asks `can_tell` first"
    return peak * (hardware.matmul or 0.8)


def _linear(workload: Workload, layout: Layout, hardware: Hardware, known: Calibration) -> float:
    low = hardware.peak(layout.arithmetic) if layout.arithmetic else None
    if low is None:
        return _reach(workload, hardware) * known.matmul
    return low * (hardware.matmul or 0.8) * known.matmul * known.low_precision


def _attention_share(layout: Layout, hardware: Hardware, known: Calibration, head_dim: int) -> float:
    lag = 1.0
    if layout.attention == "flash":
        lag = known.attention_early * (known.attention_lag if hardware.fp8 else 1.0)
    return known.attention * lag * known.attention_small ** max(0.0, math.log2(128 / head_dim))


def can_tell(workload: Workload, layout: Layout, hardware: Hardware) -> bool:
    """Tell whether shape and device are known well enough for a forecast."""
    return bool(workload.shape and hardware.peak(workload.arithmetic) and hardware.bandwidth and workload.micro > 0)
