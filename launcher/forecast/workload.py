"""One way to train one shape: what the forecasts of memory and of time both read."""

from dataclasses import dataclass
from typing import Any

from halfstep.launcher.config import precisions
from halfstep.launcher.system.machine import multiplies_fp16
from halfstep.launcher.topology import Topology
from halfstep.models.lora import Linear
from halfstep.models.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A shape, its cell, its ranks and batch, and the DeepSpeed keys that cost memory or time; DeepSpeed's defaults."""

    shape: Shape | None
    """None: a family whose arithmetic is not known."""
    parameters: int
    """Distinct parameters; a tied head counts once."""
    zero: int
    """ZeRO stage, 0 to 3."""
    precision: str
    """`fp32`, `fp16` or `bf16`: what the weights and their gradients are in."""
    ranks: int
    """Data-parallel ranks."""
    ranks_per_node: int
    micro: int
    """Sequences per rank and micro-step."""
    accumulation: int
    """Micro-steps per optimizer step."""
    sequence: int
    """Tokens per sequence."""
    accelerator: str
    """`cuda` or `cpu`."""
    offload_optimizer: str = "none"
    """`none`, `cpu` or `nvme`."""
    offload_param: str = "none"
    """`none`, `cpu` or `nvme`."""
    activation_checkpointing: bool = False
    optimizer: str = "AdamW"
    """DeepSpeed's `optimizer.type`."""
    momentum: float = 0.0
    """SGD's and RMSprop's."""
    optimizer_switches: tuple[str, ...] = ()
    """Parameters of the optimizer that are true: `amsgrad` and `centered` keep a state more."""
    accumulation_dtype: str = "fp32"
    """What gradients are added up in."""
    communication_dtype: str = "fp32"
    """What gradients are reduced in."""
    reduce_bucket: int = 500_000_000
    """Elements."""
    allgather_bucket: int = 500_000_000
    """Elements."""
    prefetch_bucket: int = 50_000_000
    """Elements; stage 3."""
    max_live_parameters: int = 1_000_000_000
    """Elements; stage 3."""
    max_reuse_distance: int = 1_000_000_000
    """Elements; stage 3."""
    persistence_threshold: int = 100_000
    """Elements; stage 3 keeps smaller parameters whole."""
    overlap_comm: bool = False
    fused_loss: bool = True
    """Our own loss; False: transformers'."""
    fused_head: bool = False
    """Whether the head and the loss are made in one, in chunks of tokens (models/fused_head.py)."""
    documents_apart: bool = False
    """Whether a mask keeps attention inside documents."""
    adapter_rank: int = 0
    """Of the low-rank adapters that are trained beside frozen weights; 0: every parameter is trained."""
    adapted: tuple[Linear, ...] = ()
    """The layers that have them."""
    adapter_dropout: float = 0.0
    averaged: bool = False
    """Whether a moving average of the masters is kept."""
    compile: bool = False
    products: str = ""
    """What matrices are multiplied in where that is not what the weights are in: `tf32`, by autocast `fp16`, `bf16`."""
    widened: bool = False
    """Whether matrices are multiplied as fp32 copies: fp16 on a CPU without it (engine/numerics/cpu_fp16.py)."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the weights, of their gradients and of what is added up along the blocks."""
        return 4 if self.precision == "fp32" else 2

    @property
    def arithmetic(self) -> str:
        """What matrices are multiplied in."""
        return self.products or self.precision

    @property
    def product_bytes(self) -> int:
        """Bytes of one element of what goes into a product of matrices and comes out of it."""
        return 2 if self.arithmetic in ("fp16", "bf16") else 4

    @property
    def autocast(self) -> bool:
        """Whether 16-bit copies of fp32 weights are multiplied."""
        return self.product_bytes < self.element_bytes


def of(
    deepspeed: dict[str, Any],
    *,
    shape: Shape | None,
    parameters: int,
    zero: int,
    precision: str,
    micro: int,
    accumulation: int,
    topology: Topology,
    sequence: int,
    activation_checkpointing: bool = False,
    compile: bool = False,
    fused_head: bool = False,
    documents_apart: bool = False,
    adapter_rank: int = 0,
    adapted: tuple[Linear, ...] = (),
    adapter_dropout: float = 0.0,
    averaged: bool = False,
    repairs: bool = True,
) -> Workload:
    """Return the workload of a DeepSpeed config; `precision` is the run key.

    `repairs`: whether stage 0 accumulates in fp32 as the rest do.

    A key that the config leaves out has DeepSpeed 0.19.8's default (runtime/zero/config.py).
    """
    section: dict[str, Any] = deepspeed.get("zero_optimization", {})
    optimizer: dict[str, Any] = deepspeed.get("optimizer", {})
    kind = precisions.of(precision)
    accumulation_dtype = deepspeed.get("data_types", {}).get("grad_accum_dtype") or kind.weights
    return Workload(
        shape=shape,
        parameters=parameters,
        zero=zero,
        precision=kind.weights,
        products=kind.products if kind.products != kind.weights else "",
        ranks=topology.ranks.data,
        ranks_per_node=topology.ranks_per_node,
        micro=micro,
        accumulation=accumulation,
        sequence=sequence,
        accelerator=topology.accelerator,
        offload_optimizer=_device(section, "offload_optimizer"),
        offload_param=_device(section, "offload_param"),
        activation_checkpointing=activation_checkpointing,
        optimizer=str(optimizer.get("type", "AdamW")),
        momentum=float(optimizer.get("params", {}).get("momentum") or 0.0),
        optimizer_switches=tuple(name for name, value in optimizer.get("params", {}).items() if value is True),
        accumulation_dtype="fp32" if zero == 0 and repairs else accumulation_dtype,
        communication_dtype=deepspeed.get("communication_data_type") or kind.weights,
        reduce_bucket=int(section.get("reduce_bucket_size", 500_000_000)),
        allgather_bucket=int(section.get("allgather_bucket_size", 500_000_000)),
        prefetch_bucket=int(section.get("stage3_prefetch_bucket_size", 50_000_000)),
        max_live_parameters=int(section.get("stage3_max_live_parameters", 1_000_000_000)),
        max_reuse_distance=int(section.get("stage3_max_reuse_distance", 1_000_000_000)),
        persistence_threshold=int(section.get("stage3_param_persistence_threshold", 100_000)),
        overlap_comm=bool(section.get("overlap_comm", zero == 3)),
        compile=compile,
        fused_head=fused_head,
        documents_apart=documents_apart,
        adapter_rank=adapter_rank,
        adapted=adapted,
        adapter_dropout=adapter_dropout,
        averaged=averaged,
        widened=kind.products == "fp16" and topology.accelerator == "cpu" and not compile and not multiplies_fp16(),
    )


def _device(section: dict[str, Any], name: str) -> str:
    return str((section.get(name) or {}).get("device", "none"))
