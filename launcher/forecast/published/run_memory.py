"""The peak memory of published rows: our own forecast for our own stack, closed formulas for what others keep."""

from halfstep.launcher.forecast import memory
from halfstep.launcher.forecast.calibration import OWN_STACK
from halfstep.launcher.forecast.published.published_runs import Row

_SLACK = 1.06
"""Reserved over needed: what the caching allocator holds back."""
_CONTEXT = 1.5 * 2**30
"""CUDA context and NCCL, where the metric sees them (nvidia-smi)."""
_FITS = 0.95
"""A published run did run: nothing needs more than this of its device."""
_SELECTIVE = 0.5
"""Of what a layer keeps, with selective checkpointing of every other product."""
_COMPILED = 0.6
"""The same where torch.compile decides what is kept and what is computed again."""


def peak_gib(row: Row) -> float | None:
    """Return the peak of one device in GiB as the row's metric has it; None where the shape is not known."""
    if row.workload.shape is None:
        return None
    metric = row.text.get("metric", "")
    plain = row.layout.cut == 1 and row.layout.context == 1
    if row.stack == OWN_STACK and plain:
        forecast = memory.forecast(row.workload)
        needed = float(forecast.allocated_bytes if "allocated" in metric else forecast.peak_bytes)
        if row.workload.fused_loss:  # Liger's head and loss make no logits
            needed -= sum(term.bytes for term in forecast.device if term.name in ("logits", "loss"))
        outside = float(forecast.outside_bytes)
    else:
        needed = _states(row) + _activations(row) + _head(row)
        needed *= 1.0 if "allocated" in metric else _SLACK
        outside = _CONTEXT
    if "smi" in metric or "max over" in metric or not metric:
        needed += outside
    limit = row.device.memory if row.device else None
    return min(needed, _FITS * limit if limit else needed) / 2**30


def _states(row: Row) -> float:
    """Return the bytes of weights, gradients and optimizer states of one device's part, the embedding's rank."""
    workload, layout, shape = row.workload, row.layout, row.workload.shape
    assert shape is not None, "the caller looks"
    embedding = shape.vocabulary * shape.width
    own = (workload.parameters - embedding) / layout.cut + embedding / layout.tensor
    ranks = workload.ranks * layout.context
    # fp32 gradients where the trainer adds them up so: Megatron, nanotron, the bf16 optimizer of Megatron-DeepSpeed.
    wide = workload.precision == "bf16" and layout.collectives != "fsdp"
    gradient = 4 if wide or layout.collectives == "megatron" else 2
    if row.stack == "nanotron":  # and those that the backward pass makes
        gradient += 2
    said = f"{row.text.get('sharding', '')} {row.text.get('precision', '')}"
    if "LoRA" in said:  # nothing but the weights is worth counting
        return 2 * own
    if "bf16-true" in said:  # moments in bf16 too, and no masters
        return 8 * own / (ranks if "FSDP" in said else 1)
    if workload.zero == 3 and layout.pipeline > 1 and layout.collectives == "fsdp":
        return 16 * own / ranks + 6 * own  # gathered once for all micro-batches, gradients kept in fp32
    if workload.zero == 3:
        # What is gathered: two layers at a time, in FSDP with their gradients; up to 1e9 elements in DeepSpeed.
        layer = own / max(1, shape.layers / layout.pipeline)
        gathered = 2 * layer * (4 if layout.collectives == "fsdp" else 2) + (0 if layout.collectives == "fsdp" else 2e9)
        return 16 * own / ranks + gathered
    buckets = 2e9 if layout.collectives == "deepspeed" else 0.0
    if workload.zero == 2:
        return own * (2 + (gradient + 12) / ranks) + buckets
    if workload.zero == 1:
        return own * (2 + gradient + 12 / ranks) + buckets
    return own * (2 + gradient + 12)


def _activations(row: Row) -> float:
    """Return what the layers of the first stage keep, for every micro-batch in flight (Korthikanti et al. 2022)."""
    workload, layout, shape = row.workload, row.layout, row.workload.shape
    assert shape is not None, "the caller looks"
    tokens = workload.micro * workload.sequence / layout.context
    layers = max(1.0, shape.layers / layout.pipeline)
    flying = min(layout.pipeline, workload.accumulation)
    kv = shape.kv_heads * shape.head_dim
    if shape.family == "gpt2":
        inner, outer = 24.0 * shape.width, 10.0 * shape.width
    else:
        inner, outer = 4.0 * shape.width + 4.0 * kv + 8.0 * shape.ffn, 8.0 * shape.width
    whole = tokens * (inner / layout.tensor + outer / (layout.tensor if layout.sequence_parallel else 1))
    scores = 0.0
    if layout.attention == "unfused":
        scores = 5.0 * workload.micro * workload.sequence**2 * shape.heads / layout.tensor
    layer = whole + scores
    edge = 2 * tokens * shape.width / (layout.tensor if layout.sequence_parallel else 1)
    kind = layout.recompute
    if kind == "full":
        return edge * layers * flying + layer
    if kind == "none":
        return layer * layers * flying * (_COMPILED if layout.compiled else 1.0)
    return _SELECTIVE * whole * layers * flying


def _head(row: Row) -> float:
    """Return the logits and their gradients; the stage that counts is the first where there are several."""
    workload, layout, shape = row.workload, row.layout, row.workload.shape
    assert shape is not None, "the caller looks"
    if layout.pipeline > 1:
        return 0.0
    tokens = workload.micro * workload.sequence / layout.context
    return (6 if row.stack.startswith("megatron") else 10) * tokens * shape.vocabulary / layout.tensor
