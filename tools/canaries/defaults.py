"""What a config means when a key is left out, misspelt or "auto"; schedules, and what a model starts with."""

from typing import Any

import torch
from torch import nn

from tools.canaries.bench import HALF, STAGES, Canary, Seen, engine, near, one_weight, raised, said, step


def clipping_by_default() -> Seen:
    """Take a step on a gradient of 8 without the key gradient_clipping."""
    moved = [step(engine(zero, gradient_clipping=None), 8.0) for zero in STAGES]
    return near(moved, [1] * 4), f"a gradient of 8 moves the weight by {said(moved)} at stages 0 to 3"


def unknown_key_accepted() -> Seen:
    """Misspell a key at the top, a section, and a key inside a section."""
    nothing: Any = {}
    misspelt = ("gradient_cliping", "BF16", "zero_optimisation")
    top = [raised(lambda key=key: engine(0, **{key: nothing})) for key in misspelt]
    nested = raised(lambda: engine(0, zero_optimization={"stagee": 2}))
    seen = f"accepted {top.count('')} of 3 at the top; inside zero_optimization: {nested or 'accepted'}"
    return not any(top) and nested.startswith("ValidationError"), seen


def auto_is_off() -> Seen:
    """Write "auto" where a precision, the stage or the clipping belongs."""
    enabled: Any = {"enabled": "auto"}
    fp16, bf16 = (engine(0, half, **{half: enabled}) for half in HALF)
    stage = engine(0, zero_optimization={"stage": "auto"}).zero_optimization_stage()
    clipping = engine(0, gradient_clipping="auto").gradient_clipping()
    kinds = [str(built.module.weight.dtype).removeprefix("torch.") for built in (fp16, bf16)]
    seen = f"weights are {kinds[0]} (fp16) and {kinds[1]} (bf16), the stage is {stage}, the clipping is {clipping!r}"
    return (kinds, stage, clipping) == (["float32"] * 2, 0, "auto"), seen


def batch_derived() -> Seen:
    """Leave members of the batch equation out, and contradict it."""

    def triple(**keys: int | None) -> tuple[int, int]:
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        batch: dict[str, Any] = {name: keys.get(name) for name in names}
        built = engine(0, **batch)
        return built.train_micro_batch_size_per_gpu(), built.gradient_accumulation_steps()

    two, alone = triple(train_batch_size=16, train_micro_batch_size_per_gpu=4), triple(train_batch_size=16)
    keys = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    error = raised(lambda: triple(**keys))
    seen = f"16 and micro 4 give accumulation {two[1]}; 16 alone gives micro {alone[0]}; 16, 4 and 2: "
    return (two, alone) == ((4, 4), (16, 1)) and bool(error), seen + (error.partition(":")[0] or "accepted")


def adam_is_adamw() -> Seen:
    """Ask for "Adam", with and without `adam_w_mode`."""

    def built(**params: Any) -> str:
        return type(engine(0, optimizer={"type": "Adam", "params": {"torch_adam": True, **params}}).optimizer).__name__

    kinds = [built(), built(adam_w_mode=False)]
    return kinds == ["AdamW", "Adam"], f'"Adam" builds {kinds[0]}, with adam_w_mode=false {kinds[1]}'


def defaults_move() -> Seen:
    """Read two keys that nobody set, at every stage and in every precision."""
    overlap = [engine(zero)._config.zero_config.overlap_comm for zero in STAGES]
    kinds = [str(engine(1, precision).communication_data_type).removeprefix("torch.") for precision in ("fp32", *HALF)]
    seen = f"overlap_comm at stages 0 to 3: {', '.join(map(str, overlap))}; gradients travel as {', '.join(kinds)} in "
    return (overlap, kinds) == ([False] * 3 + [True], ["float32", "float16", "bfloat16"]), seen + "fp32, fp16, bf16"


def offload_accepted() -> Seen:
    """Ask for parameter offload where parameters are not sharded, and for optimizer offload at stage 0."""
    device = {"device": "cpu"}
    errors = [
        raised(lambda zero=zero: step(engine(zero, zero_optimization={"offload_param": device}))) for zero in (1, 2)
    ]
    errors.append(raised(lambda: step(engine(0, zero_optimization={"offload_optimizer": device}))))
    return not any(errors), f"trained without an error in {errors.count('')} of 3 cells (stages 1, 2; stage 0)"


def untested_refused() -> Seen:
    """Train with SGD at every stage without `zero_allow_untested_optimizer`."""
    errors = [raised(lambda zero=zero: engine(zero, zero_allow_untested_optimizer=None)) for zero in STAGES]
    refused = [zero for zero, error in zip(STAGES, errors, strict=True) if "untested ZeRO Optimizer" in error]
    return refused == [1, 2, 3], f"SGD is refused at stages {said(refused) or 'none'} of 0, 1, 2, 3"


def warmup_starts_twice() -> Seen:
    """Train five steps with WarmupLR from 0 to 0.01 in 10 steps, and the optimizer's own rate at 1."""
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 10, "warmup_type": "linear"}
    built = engine(0, scheduler={"type": "WarmupLR", "params": params})
    rates = [step(built) for _ in range(5)]
    return near(rates, [0, 0, 0.001, 0.002, 0.003]), f"the first five updates have the rates {said(rates)}"


def initialisation_lost() -> Seen:
    """Build a GPT-2 under zero.Init with and without a live HfDeepSpeedConfig."""
    import deepspeed
    from transformers import AutoModelForCausalLM, GPT2Config
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    names = ("transformer.wte.weight", "transformer.h.0.mlp.c_proj.weight")
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 32}
    shape = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}

    def deviations(model: nn.Module) -> list[float]:
        deviations = []
        for parameter in (model.get_parameter(name) for name in names):
            with deepspeed.zero.GatheredParameters([parameter]):
                deviations.append(float(parameter.float().std()))
        return deviations

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        alone = deviations(AutoModelForCausalLM.from_config(shape))
    held = HfDeepSpeedConfig(config)  # transformers holds it weakly: it counts while this name lives
    live = deviations(AutoModelForCausalLM.from_config(shape))
    del held
    seen = f"standard deviations of the embedding and of mlp.c_proj: {said(alone)}; with HfDeepSpeedConfig {said(live)}"
    return all(
        abs(value / wanted - 1) < 0.1 for value, wanted in zip([*alone, *live], [1, 0.02, 0.02, 0.0141], strict=True)
    ), seen


def buffers_stay_fp32() -> Seen:
    """Look for a 16-bit buffer in every half-precision cell."""
    kinds = set()
    for half in HALF:
        for zero in STAGES:
            model = one_weight()
            model.register_buffer("frequencies", torch.tensor([1 / 3]), persistent=False)
            kinds |= {str(buffer.dtype) for buffer in engine(zero, half, model).module.buffers()}
    return kinds == {"torch.float32"}, f"a buffer made in fp32 is {', '.join(sorted(kinds))} in the 8 cells"


CANARIES = (
    Canary(
        name="clipping-defaults-to-one",
        sentence="without the key gradient_clipping gradients are clipped to 1.0",
        trap="T5",
        reference="runtime/constants.py; since v0.19.3 (#8068)",
        look=clipping_by_default,
        changed="Halfstep always writes the key; correct docs/deepspeed.md",
    ),
    Canary(
        name="unknown-top-level-key-accepted",
        sentence="a misspelt key at the top of the config is ignored; inside a section it is refused",
        trap="T6",
        reference="runtime/config.py; runtime/config_utils.py",
        look=unknown_key_accepted,
        changed="Halfstep refuses unknown keys itself (launcher/plan/ds/dskeys.py); correct docs/deepspeed.md",
    ),
    Canary(
        name="auto-means-off",
        sentence=(
            'outside HF Trainer "auto" turns fp16 and bf16 off and means stage 0; in gradient_clipping it stays a word'
        ),
        trap="T6",
        reference="runtime/config.py",
        look=auto_is_off,
        changed='Halfstep lets no "auto" through; correct docs/deepspeed.md',
    ),
    Canary(
        name="batch-size-derived",
        sentence=(
            "members of the batch equation that are left out are worked out from the others; only a "
            "contradiction is refused"
        ),
        trap="T7",
        reference="runtime/config.py, _batch_assertion",
        look=batch_derived,
        changed="Halfstep writes all three; compare launcher/plan/batch.py with what DeepSpeed accepts now",
    ),
    Canary(
        name="adam-means-adamw",
        sentence='an optimizer of type "Adam" is AdamW unless adam_w_mode is false',
        trap="T11",
        reference="runtime/engine.py, _configure_basic_optimizer",
        look=adam_is_adamw,
        changed="correct docs/deepspeed.md; Halfstep writes AdamW",
    ),
    Canary(
        name="defaults-follow-stage-and-precision",
        sentence=(
            "left out, overlap_comm is on at stage 3 only, and the dtype of gradients between ranks follows the "
            "precision"
        ),
        trap="T6",
        reference="runtime/zero/config.py; runtime/engine.py, communication_data_type",
        look=defaults_move,
        changed=(
            "both keys are written in ds_configs; see whether what they are compared with has moved, and correct "
            "docs/deepspeed.md"
        ),
    ),
    Canary(
        name="offload-accepted-without-sharding",
        sentence="offload_param at stages 1 and 2 and offload_optimizer at stage 0 are accepted without a word",
        trap="T6",
        reference="runtime/zero/config.py",
        look=offload_accepted,
        changed=(
            "DeepSpeed refuses them now: correct docs/deepspeed.md; the rules in launcher/plan/rules.py still "
            "refuse them earlier"
        ),
    ),
    Canary(
        name="untested-optimizer-refused",
        sentence=(
            "an optimizer that DeepSpeed does not know is refused at stages 1 to 3 without "
            "zero_allow_untested_optimizer"
        ),
        trap="T11",
        reference="runtime/engine.py, _do_optimizer_sanity_check",
        look=untested_refused,
        changed="look at the rule untested-optimizer-needs-consent in launcher/plan/rules.py",
    ),
    Canary(
        name="warmup-lr-two-zero-updates",
        sentence="WarmupLR gives the first two updates its smallest rate and ignores the optimizer's own",
        trap="T12",
        reference="runtime/lr_schedules.py, WarmupLR",
        look=warmup_starts_twice,
        changed="Halfstep writes the rate itself (launcher/plan/schedule.py); correct docs/deepspeed.md",
    ),
    Canary(
        name="stage-3-initialisation-lost",
        sentence=(
            "under zero.Init a transformers model keeps torch's initial values unless an HfDeepSpeedConfig is alive"
        ),
        trap="T13",
        reference="transformers, _init_weights under zero.Init; transformers #43847",
        look=initialisation_lost,
        changed="Halfstep draws the values itself (models/network.py); correct docs/deepspeed.md",
    ),
    Canary(
        name="buffers-stay-fp32",
        sentence="fp32 buffers, such as rotary frequencies, stay fp32 in half precision",
        trap="T13",
        reference="runtime/engine.py; since v0.19.2 (#8066)",
        look=buffers_stay_fp32,
        changed=(
            "rotary embeddings may be rounded now: compare the cells again with `halfstep verify`, and fix "
            "models/network.py"
        ),
    ),
)
