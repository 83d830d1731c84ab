"""What one device computes in one micro-step, and how long that takes: a roofline with few constants."""

from dataclasses import dataclass

from launcher.plan.calibration import Calibration
from launcher.plan.hardware import Hardware
from launcher.plan.layout import Layout
from launcher.plan.setting import Setting

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
    """Launching kernels; the device does something else meanwhile."""

    @property
    def device(self) -> float:
        """Seconds of the device alone."""
        return self.matmul + self.attention + self.memory

    @property
    def seconds(self) -> float:
        """Seconds of the slower of host and device, smoothly."""
        return (self.device**_WAIT + self.host**_WAIT) ** (1 / _WAIT)


def recomputed(setting: Setting, layout: Layout) -> float:
    """Return how much of a forward pass the backward pass does again: 0 to 1."""
    kind = layout.recompute or ("full" if setting.activation_checkpointing else "none")
    return {"none": 0.0, "selective": _SELECTIVE}.get(kind, 1.0)


def micro_step(setting: Setting, layout: Layout, hardware: Hardware, known: Calibration) -> MicroStep:
    """Return the seconds of one micro-step on one device of one pipeline stage, the head shared out over the stages.

    A forward pass multiplies 2 FLOPs for each weight and token; the backward pass twice that. Attention forward is 4 s h
    FLOPs a token, half of that where a fused kernel leaves the masked half out; the fused backward computes the scores
    again, 2.5 times the forward (Dao 2023). Bytes are counted in passes over tensors, and the passes are calibrated.
    """
    shape = setting.shape
    assert shape is not None, "a family whose arithmetic is not known has no compute time"
    precision = layout.arithmetic or setting.precision
    low = precision not in ("fp32", "fp16", "bf16")
    base = hardware.peak(setting.precision)
    peak = hardware.peak(precision) or base
    assert base and peak and hardware.bandwidth, "the caller asks `can_tell` first"
    reach = base * (hardware.matmul or 0.8)
    linear = peak * (hardware.matmul or 0.8) * known.matmul * (known.low_precision if low else 1.0)
    again = recomputed(setting, layout)
    tokens = setting.micro * setting.sequence / layout.context
    layers = shape.layers / layout.pipeline
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    feed = (2 if shape.family == "gpt2" else 3) * shape.ffn
    weights = shape.width * (2 * query + 2 * kv + feed) / layout.tensor
    width, size = shape.width, setting.element_bytes

    matmul = (3 + again) * 2 * tokens * weights * layers / linear
    head = 6 * tokens * shape.vocabulary * width / layout.tensor / layout.pipeline / (reach * known.matmul)
    causal, passes = (0.5, 3.5 + (1 if again else 0)) if layout.flash else (1.0, 3 + again)
    scores = causal * passes * 4 * tokens * setting.sequence * query / layout.tensor * layers
    attention = scores / (reach * known.attention * min(1.0, shape.head_dim / 128) ** 0.5)

    fused = known.compiled if layout.compiled else 1.0
    spread = 0.4 + 0.6 / layout.tensor  # norms and residuals stay whole on every tensor-parallel rank
    moved = (
        fused * known.elementwise * (1 + again / 3) * spread * tokens * (0.5 * width + 0.0625 * feed) * size * layers
    )
    if not layout.flash:
        seen = tokens * setting.sequence * shape.heads / layout.tensor
        moved += known.scores * (1 + again / 3) * seen * size * layers
    moved += known.loss * fused * tokens * shape.vocabulary / layout.tensor / layout.pipeline * size
    moved += known.weight_passes * (1 + again / 3) * weights * layers * size
    host = known.host * layers * (2 + again) * (known.host_tensor if layout.tensor > 1 else 1.0)
    return MicroStep(
        matmul=matmul + head,
        attention=attention,
        memory=moved / hardware.bandwidth,
        host=host * (known.host_compiled if layout.compiled else 1.0),
    )


def can_tell(setting: Setting, layout: Layout, hardware: Hardware) -> bool:
    """Tell whether shape and device are known well enough for a forecast."""
    return bool(setting.shape and hardware.peak(setting.precision) and hardware.bandwidth and setting.micro > 0)
