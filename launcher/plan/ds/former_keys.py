"""What DeepSpeed files say that DeepSpeed has no longer, or never had, and what to do instead in a run of Halfstep."""

RENAMED = {
    "aio.thread_count": "aio.intra_op_parallelism",
    "fp32_allreduce": "communication_data_type (fp32)",
    "zero_optimization.find_unused_parameters": "zero_optimization.ignore_unused_parameters",
}
"""What files for earlier versions of DeepSpeed call a key."""

_COMPILE = "use the run key compile=true, which compiles each block, and remove {}"
_ROUTED = "remove {}; tensorboard, wandb, comet and csv_monitor are sections of their own"
FOREIGN = {
    # What runtime/compiler.py took until DeepCompile came; axolotl's files still have two of them.
    **{f"compile.{name}": _COMPILE for name in ("backend", "disable", "dynamic", "enabled", "fullgraph", "kwargs")},
    "comms_config": "remove {}; comms_logger is the section that logs collective calls",
    "cuda_visible_devices": "remove {}; the environment variable CUDA_VISIBLE_DEVICES chooses GPUs",
    "fp16.fp16": "remove {}; fp16.enabled is the switch",  # GPT-NeoX files
    "monitor_config": _ROUTED,
}
"""Keys of other versions and other programs, each with what to do; {} is the key."""

INSTEAD = {
    "amp": "use precision=fp16 or precision=bf16",
    "curriculum_learning": "Halfstep has no curriculum, and DeepSpeed's other one does nothing in it",
    "elasticity": "a run resumes on another number of ranks with the same batch.global",
    "nebula": "checkpoint.every and checkpoint.keep say when Halfstep saves, and how many it keeps",
    "optimizer.params.max_grad_norm": "use gradient_clipping",
    "sparse_attention": "the attention is the model's own",
    "zero_optimization.mics_shard_size": "zero_optimization.zero_hpz_partition_size keeps a copy within each group",
}
"""For keys that DeepSpeed refuses: what does in Halfstep what they did, or why nothing need."""

FORMER_OPTIMIZERS = {"onebitadam": "AdamW", "zerooneadam": "AdamW", "onebitlamb": "Lamb"}
"""Optimizers that DeepSpeed had, in small letters, and their uncompressed kin."""


def fix(path: str) -> str | None:
    """Return what to do about a key that DeepSpeed does not know, None where nothing more is known of it."""
    name = path.rpartition(".")[2]
    if path in RENAMED:
        return f"use {RENAMED[path]}, which took its place"
    if path in FOREIGN:
        return FOREIGN[path].format(path)
    if name.startswith(("_", "#", "/")) or name in ("comment", "comments"):
        return f"remove {path}, or write it as a comment: // in a line of its own"
    return None


def instead(path: str) -> str:
    """Return what to do about a key that DeepSpeed refuses."""
    return f"remove {path}" + (f"; {INSTEAD[path]}" if path in INSTEAD else "")
