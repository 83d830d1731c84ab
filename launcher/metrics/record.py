"""The rows of metrics.jsonl: the same fields, of the same type, in every (stage, precision) cell."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, applied or skipped; None where a value has no meaning or is not finite."""

    step: int
    """Counted from 1; a skipped step counts."""
    tokens: int
    """Training tokens read so far, this step included."""
    loss: float | None
    """Mean over the global batch and all ranks, in nats per token, before the update."""
    lr: float
    """Learning rate of this update."""
    grad_norm: float | None
    """Global gradient norm, unscaled, before clipping."""
    loss_scale: float | None
    """Loss scale that this step was computed with; None without loss scaling."""
    overflow: bool
    """Whether the update was skipped for a non-finite gradient."""
    skipped_steps: int
    """Skipped updates so far."""
    step_seconds: float
    """Wall time of the step, data included."""
    data_seconds: float
    """Of that, waiting for data."""
    tokens_per_second: float
    """Over all ranks."""
    mfu: float | None
    """Share of the devices' peak arithmetic, 0 to 1, causal FLOPs; None where the peak is not known."""
    peak_memory_bytes: int
    """The largest over the ranks: most reserved on a GPU, high-water resident size on a CPU."""
    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One pass over the validation sequences; carries no `loss`, so that the two kinds of row cannot be confused."""

    step: int
    """Optimizer steps done before it."""
    eval_loss: float | None
    """Mean over the validation tokens, in nats."""
    perplexity: float | None
    """exp(eval_loss)."""
    time: float
    """Seconds since the epoch."""
