"""What cannot be derived: constants of the time forecast, fitted to published runs (benchmarks/planner_score.py)."""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

OWN_STACK = "deepspeed+transformers"
"""What a Halfstep run on a GPU is: DeepSpeed's engine around a model of transformers."""
CPU_STACK = "halfstep-cpu"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Constants that hold for every stack, and factors of the stacks, devices and precisions that were seen."""

    matmul: float = 0.85
    """Share of a device's best matrix products (`Hardware.matmul`) that the linear layers reach when they are large."""
    narrow: float = 0.15
    """How much longer a product takes for each FLOP where matrices are 1024 wide; half of that where they are 4096."""
    attention: float = 0.65
    """The same for attention with heads of 128."""
    attention_early: float = 0.7
    """What is left of that with the first fused kernels (FlashAttention 1 and 2, Triton's),"""
    attention_lag: float = 0.6
    """and of that where these run on devices later than the A100 they were made for."""
    attention_small: float = 0.9
    """What is left of it with heads of 64."""
    low_precision: float = 0.75
    """Share of fp8's or fp4's own peak, relative to that of 16 bits."""
    weight_passes: float = 8.0
    """Times that a layer's weights or gradients are read or written in a micro-step: the price of a small batch."""
    elementwise: float = 20.0
    """Times that an activation as wide as the model is read or written in a layer's forward and backward."""
    converted: float = 1.0
    """What 16 bits make of that on a CPU, which converts to fp32 and back,"""
    copied: float = 1.0
    """and fp32 copies of whatever is multiplied (launcher/engine/numerics/cpu_fp16.py)."""
    compiled: float = 0.6
    """What fusing leaves of that."""
    scores: float = 8.0
    """Times that attention scores are read or written where attention is not fused."""
    loss: float = 10.0
    """Times that logits are read or written."""
    host: float = 1.0e-3
    """Seconds of Python to launch one layer's kernels once; the device waits where its work is shorter."""
    host_tensor: float = 1.3
    """What tensor parallelism makes of that."""
    operator: float = 8.8e-6
    """Seconds of the host for one operator of DeepSpeed's: 77 ms of a step's 8,779 on an H200's, under a profiler."""
    host_compiled: float = 0.35
    """What compiling leaves of that."""
    link: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    network: float = 0.7
    """Share of the network's."""
    link_latency: float = 1.0e-5
    """Seconds of one collective in a node, times the logarithm of the ranks."""
    network_latency: float = 1.0e-5
    """Seconds for each further node that a ring passes through."""
    shown: float = 0.4
    """Share of overlapped communication that costs time all the same: it takes memory bandwidth and processors."""
    optimizer: float = 40.0
    """Bytes that the optimizer step moves for each of its parameters."""
    host_adam: float = 1.5e10
    """Bytes/s of one rank's optimizer step on the host, whose memory some eight ranks share."""
    pipeline_latency: float = 5.0e-4
    """Seconds that a pipeline stage loses to the other stages in a micro-step besides what it sends."""
    stage3: float = 2.0
    """How much longer DeepSpeed's stage 3 communicates than its bytes need: it gathers parameter by parameter."""
    straggling: float = 0.01
    """What every doubling of the nodes adds, as a share of the step."""
    spread_seen: float = 1.2
    """Nine forecasts of ten are within this factor, for a stack that the calibration has seen,"""
    spread_unseen: float = 1.6
    """and for one that it has not."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Logarithms that add up: by stack, device, precision, and their pairs."""

    def factor(self, stack: str, device: str, arithmetic: str) -> float:
        """Return what the seconds of a step are multiplied by; 1 for what was never seen."""
        return 2.718281828459045 ** sum(self.factors.get(key, 0.0) for key in factor_keys(stack, device, arithmetic))

    def replace(self, **changes: float) -> "Calibration":
        """Return a copy with other constants."""
        return dataclasses.replace(self, **changes)


def factor_keys(stack: str, device: str, arithmetic: str) -> tuple[str, ...]:
    """Return the names of the factors that apply, the general ones first; bf16 and fp16 are one precision."""
    kind = "half" if arithmetic in ("fp16", "bf16") else arithmetic
    return (
        f"device:{device}",
        f"precision:{kind}",
        f"stack:{stack}",
        f"stack:{stack} device:{device}",
        f"stack:{stack} precision:{kind}",
        f"stack:{stack} device:{device} precision:{kind}",
    )


@functools.cache
def shipped(accelerator: str = "cuda") -> Calibration:
    """Return the calibration that comes with Halfstep; that of CPU ranks has constants of its own."""
    tree = tomllib.loads(resources.files("halfstep.launcher.forecast").joinpath("calibration.toml").read_text("utf-8"))
    if accelerator == "cpu":
        return Calibration(**{**tree["constants"], **tree.get("cpu", {})})
    return Calibration(**tree["constants"], factors=tree["factors"])
