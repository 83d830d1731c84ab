"""Combinations that DeepSpeed 0.19.8 accepts in its configuration and ends at when it builds or trains."""

from halfstep.launcher.plan.rule import Case, Rule, offload, set_by

_HPZ = "zero_optimization.zero_hpz_partition_size"
_ALLGATHER = "zero_optimization.allgather_bucket_size"
_MASTERS = ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states")
_ADAM = ("adam", "adamw")
_TORCH_ADAM, _FUSED, _FOREACH = (f"optimizer.params.{name}" for name in ("torch_adam", "fused", "foreach"))
_OF_TORCH = (_FUSED, _FOREACH, *(f"optimizer.params.{name}" for name in ("capturable", "differentiable", "maximize")))
_OF_DEEPSPEED = ("optimizer.params.bias_correction", "optimizer.params.set_grad_none")
_PRESCALING = ("prescale_gradients", "gradient_predivide_factor")
_GPU_ONLY = (  # all but the first have an effect at stage 3 alone
    "aio.use_gds",
    "zero_optimization.offload_optimizer.super_offload",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
)


def _any(case: Case, *paths: str) -> bool:
    return any(case.leaves.get(path) for path in paths)


def _within(case: Case, *sections: str) -> list[str]:
    """Return the keys that are set in some sections, or say a section itself."""
    return [path for path in case.leaves if path in sections or path.startswith(tuple(f"{name}." for name in sections))]


def _optimizer(case: Case) -> str:
    return str(case.leaves.get("optimizer.type")).lower()


def _needs_gpu(case: Case) -> list[str]:
    paths = _GPU_ONLY if case.spec.zero == 3 else _GPU_ONLY[:1]
    return [path for path in paths if case.leaves.get(path)]


def _has_no_cpu_adam(case: Case) -> bool:
    return offload(case, "optimizer") is None or bool(case.leaves.get(_TORCH_ADAM))


def _strange_to_adam(case: Case) -> list[str]:
    """Return the parameters that the implementation of Adam does not take: a TypeError when DeepSpeed makes it."""
    if _optimizer(case) not in _ADAM:
        return []
    return [path for path in (_OF_DEEPSPEED if case.leaves.get(_TORCH_ADAM) else _OF_TORCH) if path in case.leaves]


def _clips_before_muon(case: Case) -> bool:
    in_fp32 = case.leaves.get("data_types.grad_accum_dtype") in ("fp32", "float32", "float", "torch.float32")
    sharded = case.spec.zero == 1 and case.spec.precision == "bf16" and in_fp32 and offload(case, "optimizer") is None
    return case.spec.zero == 0 or sharded


RULES: tuple[Rule, ...] = (
    Rule(
        name="allgather-bucket-is-even",
        sentence="at ZeRO stages 1 and 2 DeepSpeed gathers weights in aligned pieces: a bucket is a multiple of 2",
        broken=lambda c: c.spec.zero in (1, 2) and (c.leaves.get(_ALLGATHER, 2) or 1) % 2 != 0,
        where=set_by(_ALLGATHER),
        fix="write an even number above zero, or drop the key",
    ),
    Rule(
        name="hpz-divides-the-ranks",
        sentence="the groups of ranks that keep a second copy of the weights are all of one size",
        broken=lambda c: c.spec.zero == 3 and c.topology.ranks.data % max(1, int(c.leaves.get(_HPZ) or 1)) != 0,
        where=set_by(_HPZ),
        fix="take a divisor of the number of ranks, as a rule the ranks of one host",
    ),
    Rule(
        name="no-autotuning",
        sentence="DeepSpeed's autotuner makes short runs of its own and ends this one after a few steps",
        broken=lambda c: _any(c, "autotuning.enabled"),
        where=set_by("autotuning.enabled"),
        fix="drop the key; `halfstep plan --search` and `halfstep study` compare settings",
    ),
    Rule(
        name="no-scaling-before-a-reduce-scatter",
        sentence="at ZeRO stages 2 and 3 gradients are scaled after they were reduced and scattered, never before",
        broken=lambda c: (
            c.spec.zero in (2, 3)
            and c.leaves.get("zero_optimization.reduce_scatter", True)
            and (_any(c, "prescale_gradients") or c.leaves.get("gradient_predivide_factor", 1) != 1)
        ),
        where=set_by(*_PRESCALING),
        fix="drop prescale_gradients and gradient_predivide_factor, or take zero=1",
    ),
    Rule(
        name="half-masters-need-cpu-adam",
        sentence="16-bit masters and optimizer states are kept by DeepSpeed's own CPU Adam alone",
        broken=lambda c: _any(c, *_MASTERS) and _has_no_cpu_adam(c),
        where=set_by(*_MASTERS),
        fix="drop the key; or take zero=2 offload=optimizer-cpu ds.optimizer.params.torch_adam=false",
    ),
    Rule(
        # engine.py, get_optimizer_configuration: all parameters but torch_adam and adam_w_mode go to the constructor.
        name="adam-takes-its-own-parameters",
        sentence="torch's Adam has no bias_correction or set_grad_none; DeepSpeed's have no fused, foreach and such",
        broken=lambda c: bool(_strange_to_adam(c)),
        where=lambda c: set_by(*_strange_to_adam(c), _TORCH_ADAM)(c),
        fix="drop the key, or choose with ds.optimizer.params.torch_adam=true or false",
    ),
    Rule(
        name="fused-or-foreach",
        sentence="torch's Adam is fused or steps by foreach, not both",
        broken=lambda c: _optimizer(c) in _ADAM and _any(c, _FUSED) and _any(c, _FOREACH),
        where=set_by(_FUSED, _FOREACH),
        fix="drop ds.optimizer.params.foreach",
    ),
    Rule(
        name="half-states-need-half-masters",
        sentence="optimizer states in bf16 stand beside masters in bf16 only",
        broken=lambda c: _any(c, _MASTERS[2]) and not _any(c, _MASTERS[1]),
        where=set_by(_MASTERS[2]),
        fix="drop the key, or add bf16.bf16_master_weights_and_grads",
    ),
    Rule(
        name="fused-optimizers-need-a-gpu",
        sentence="DeepSpeed has Lamb for GPUs only, and Lion for CPU ranks only with its states offloaded",
        broken=lambda c: (
            c.topology.accelerator == "cpu"
            and (_optimizer(c) == "lamb" or (_optimizer(c) == "lion" and offload(c, "optimizer") is None))
        ),
        where=set_by("optimizer.type"),
        fix="take AdamW or SGD; for Lion zero=1 offload=optimizer-cpu; or plan for GPUs with hardware=NAME",
    ),
    Rule(
        # stage_1_and_2.py and stage3.py make torch's Adagrad a second time; the second group is then an IndexError.
        name="adagrad-is-not-sharded",
        sentence="DeepSpeed makes a sharded Adagrad again with one group of parameters, and Halfstep has two",
        broken=lambda c: (
            _optimizer(c) == "adagrad"
            and c.spec.zero > 0
            and offload(c, "optimizer") is None
            and (c.spec.zero, c.spec.precision) != (1, "bf16")
        ),
        where=set_by("optimizer.type"),
        fix="take zero=0, or offload=optimizer-cpu",
    ),
    Rule(
        # Of the sharded ones bf16_optimizer.py alone clips before Muon (docs/deepspeed.md, 11).
        name="no-clipping-after-muon",
        sentence="at ZeRO 2 and 3, and at 1 except in bf16, DeepSpeed norms and clips Muon's updates, not gradients",
        broken=lambda c: _optimizer(c) == "muon" and not _clips_before_muon(c),
        where=set_by("optimizer.type"),
        fix="take zero=0, or zero=1 precision=bf16 without offload",
    ),
    Rule(
        name="mup-needs-base-shapes",
        sentence="mup's optimizers scale by the shape of each weight in a base model, and Halfstep has no base model",
        broken=lambda c: _optimizer(c) in ("muadam", "muadamw", "musgd"),
        where=set_by("optimizer.type"),
        fix="take AdamW or SGD",
    ),
    Rule(
        name="optimizer-takes-gradients-as-they-are",
        sentence="LBFGS evaluates the loss several times a step, and SparseAdam takes sparse gradients only",
        broken=lambda c: _optimizer(c) in ("lbfgs", "sparseadam"),
        where=set_by("optimizer.type"),
        fix="take another optimizer",
    ),
    Rule(
        name="no-legacy-stage-1",
        sentence="the first implementation of ZeRO stage 1 is gone from DeepSpeed",
        broken=lambda c: _any(c, "zero_optimization.legacy_stage1"),
        where=set_by("zero_optimization.legacy_stage1"),
        fix="drop the key",
    ),
    Rule(
        name="no-hybrid-engine",
        sentence="the hybrid engine switches between training and generating; Halfstep trains",
        broken=lambda c: _any(c, "hybrid_engine.enabled"),
        where=set_by("hybrid_engine.enabled"),
        fix="drop the key",
    ),
    Rule(
        name="no-zenflow",
        sentence="ZenFlow decides by itself at which micro-step the optimizer steps, and Halfstep counts steps",
        broken=lambda c: bool(_within(c, "zero_optimization.zenflow")),
        where=lambda c: set_by(*_within(c, "zero_optimization.zenflow"))(c),
        fix="drop the section; offload=optimizer-cpu moves the optimizer to the host",
    ),
    Rule(
        name="halfstep-saves-checkpoints",
        sentence="Halfstep writes checkpoints itself; DeepSpeed's own writers have no part in it",
        broken=lambda c: bool(_within(c, "checkpoint.writer", "datastates_ckpt")),
        where=lambda c: set_by(*_within(c, "checkpoint.writer", "datastates_ckpt"))(c),
        fix="drop the section; checkpoint.every and checkpoint.keep say when and how many",
    ),
    Rule(
        name="gpu-only",
        sentence="what this key turns on has no implementation for CPU ranks",
        broken=lambda c: c.topology.accelerator == "cpu" and bool(_needs_gpu(c)),
        where=lambda c: set_by(*_needs_gpu(c))(c),
        fix="drop the key, or plan for GPUs with hardware=NAME",
    ),
)
