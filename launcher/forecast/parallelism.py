"""How a trainer cuts a model besides data parallelism, and what its kernels are: what a Workload does not say."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Other kinds of parallelism, the collectives and the kernels; the defaults are Halfstep's own."""

    tensor: int = 1
    """Ranks that share each matrix."""
    pipeline: int = 1
    """Stages that share the layers."""
    virtual: int = 1
    """Pieces of a pipeline stage, interleaved."""
    tensor_overlap: bool = False
    """Whether its messages are sent while the matrices are multiplied."""
    context: int = 1
    """Ranks that share each sequence."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also share norms and residuals, each for a part of the sequence."""
    collectives: str = "deepspeed"
    """`deepspeed`, `fsdp` (full or gradient sharding), `ddp`, or `megatron` (its distributed optimizer)."""
    quantized: bool = False
    """ZeRO++: weights gathered in int8 and kept whole in a node, gradients reduced in int4."""
    arithmetic: str | None = None
    """`fp8`, `fp8-mx`, `fp8-rowwise` or `fp4` where the linear layers compute in less than the setting's precision."""
    recompute: str | None = None
    """`none`, `selective` or `full`; None: as the setting's `activation_checkpointing`."""
    reentrant: bool = False
    """Whether checkpointed blocks are run as modules of their own, for which stage 3 gathers once more."""
    attention: str = "hopper"
    """`unfused` writes its scores to memory and computes both halves; `flash` are the first fused kernels, made for
    A100; `hopper` those that keep later devices busy too (FlashAttention-3, cuDNN's, which torch takes by itself)."""
    compiled: bool = False
    """Whether elementwise kernels are fused: torch.compile, or written by hand."""
    network: float | None = None
    """Bytes/s of one device between nodes in one direction, where it is not the usual of the hardware."""

    @property
    def cut(self) -> int:
        """Devices that hold one copy of the model between them, sharding aside."""
        return self.tensor * self.pipeline
