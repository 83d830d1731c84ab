"""Gradients that are not finite, gradients that are summed up, and where they can be seen."""

import math
from typing import Any

from tools.canaries.bench import (
    HALF,
    SCALE,
    SHARDED,
    STAGES,
    Canary,
    Engine,
    Seen,
    adamw,
    engine,
    loss,
    one_weight,
    raised,
    said,
    step,
    weight,
)

# 256 and four times 0.25: bf16 has steps of 2 above 256, so that each addition is lost there.
_LARGE_THEN_SMALL = [256 * 5.0, *[0.25 * 5] * 4]
_FP32_SUM: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}


def nan_poisons() -> Seen:
    """Take one step on a NaN gradient and one on a gradient of 1, in fp32 without ZeRO."""
    built = engine(0)
    step(built, math.nan)
    applied = built.was_step_applied()
    step(built)
    return applied and math.isnan(
        weight(built)
    ), f"the step was applied: {applied}; the weight is {weight(built):g} after it"


def step_dropped() -> Seen:
    """Put a step of one's own in the optimizer's place in fp32 without ZeRO, as a run does, and leave a NaN out."""
    built = engine(0, optimizer=adamw(0.01, decay=0.1))
    step(built)
    before, own = weight(built), built.optimizer.step
    built.optimizer.step = lambda *values, **keys: None
    step(built, math.nan)
    after, counter = weight(built), float(built.optimizer.state[built.module.weight]["step"])
    built.optimizer.step = own
    moved = step(built)
    seen = f"left out, the weight moves by {after - before:g}, Adam's counter is {counter:g}, DeepSpeed counts "
    seen += f"{built.global_steps - 1} steps; the next step moves the weight by {moved:.2g}"
    return (after, counter, built.global_steps) == (before, 1, 3) and math.isfinite(moved) and moved > 0, seen


def nan_skipped_silently() -> Seen:
    """Take ten steps on a NaN gradient, then one on a gradient of 1, where DeepSpeed skips without loss scaling."""
    results = []
    cells: list[tuple[int, str, dict[str, Any]]] = [(zero, "fp32", {}) for zero in SHARDED]
    cells += [(zero, "bf16", {}) for zero in STAGES]
    cells.append((1, "bf16", _FP32_SUM))  # BF16_Optimizer, another class
    for zero, precision, config in cells:
        built = engine(zero, precision, **config)
        still = sum(step(built, math.nan) == 0 for _ in range(10))
        results.append((still, built.skipped_steps, step(built)))
    skipped = said(count for _, count, _ in results)
    seen = f"skipped {skipped} of 10 in fp32 at 1 to 3, in bf16 at 0 to 3, in bf16 at 1 with fp32 sums; nothing raised"
    return results == [(10, 10, 1)] * len(cells), seen


def unchecked_bf16() -> Seen:
    """Take a step on a NaN gradient with `bf16.check_grad_overflow` off."""
    engines = [engine(zero, "bf16", bf16={"check_grad_overflow": False}) for zero in STAGES]
    for built in engines:
        step(built, math.nan)
    poisoned = [zero for zero, built in zip(STAGES, engines, strict=True) if math.isnan(weight(built))]
    return poisoned == [1, 2], f"NaN weights at stages {said(poisoned) or 'none'} of 0, 1, 2, 3"


def hooks_fire() -> Seen:
    """Read the gradient in a hook on the weight, accumulating over two micro-steps."""
    gradients: dict[int, list[float]] = {}
    for zero in STAGES:
        built = engine(zero, "fp16", gradient_accumulation_steps=2)
        seen_here = gradients.setdefault(zero, [])
        built.module.weight.register_hook(lambda gradient, into=seen_here: into.append(float(gradient)))
        for _ in range(2):
            step(built)
    seen = (
        f"half a gradient of 1 at scale 1024, twice: {said(gradients[0])} at stage 0, {said(gradients[3])} at stage 3"
    )
    return gradients == {0: [0.5, 0.5]} | {zero: [SCALE / 2, SCALE / 2] for zero in SHARDED}, seen


def _micro_steps(built: Engine, gradients: list[float]) -> Engine:
    for gradient in gradients:
        step(built, gradient)
    return built


def boundary_only() -> Seen:
    """Call `engine.step` at the end of each window of four micro-steps only, three times."""
    results = []
    for zero in STAGES:
        built = engine(zero, gradient_accumulation_steps=4)
        for micro_step in range(1, 13):
            built.backward(loss(built))
            if micro_step % 4 == 0:
                built.step()
        results.append((weight(built), built.global_steps))
    weights, steps = zip(*results, strict=True)
    seen = (
        f"after 3 windows of 4 the weight has moved by {said(weights)} at stages 0 to 3, global_steps is {said(steps)}"
    )
    return results == [(0, 0)] * 4, seen


def loss_divided() -> Seen:
    """Read what `engine.backward` returns for a loss of 1 with accumulation 4."""
    built = engine(1, model=one_weight(1.0), gradient_accumulation_steps=4)
    returned = float(built.backward(loss(built)))
    return returned == 0.25, f"a loss of 1 comes back as {returned:g}"


def _bf16_norms(**config: Any) -> list[float]:
    engines = [engine(zero, "bf16", gradient_accumulation_steps=5, **config) for zero in SHARDED]
    return [float(_micro_steps(built, _LARGE_THEN_SMALL).get_global_grad_norm()) for built in engines]


def half_accumulation() -> Seen:
    """Accumulate 256 and four times 0.25 in bf16, with and without grad_accum_dtype."""
    norms, full = _bf16_norms(), _bf16_norms(communication_data_type="fp32", **_FP32_SUM)
    seen = f"256 + 4 x 0.25 is {said(norms)} at stages 1 to 3; with grad_accum_dtype fp32 {said(full)}"
    return (norms, full) == ([256] * 3, [257] * 3), seen


def sum_rounded() -> Seen:
    """Accumulate the same in fp32 without communication_data_type."""
    norms = _bf16_norms(**_FP32_SUM)
    return norms == [256, 257, 257], f"256 + 4 x 0.25 is {said(norms)} at stages 1, 2 and 3"


def stage_0_needs_half_sums() -> Seen:
    """Ask for fp32 accumulation at stage 0."""
    errors = [raised(lambda half=half: engine(0, half, **_FP32_SUM)) for half in HALF]
    return all(error.startswith("NotImplementedError") for error in errors), f"fp16: {errors[0] or 'accepted'}"


CANARIES = (
    Canary(
        name="fp32-stage-0-nan-poisons",
        sentence="at stage 0 in fp32 a NaN gradient goes into the weights, and the step counts as applied",
        trap="T2",
        reference="runtime/engine.py, _take_model_step",
        look=nan_poisons,
        changed="DeepSpeed looks before it steps now: drop the unguarded cell from launcher/engine/numerics/guard.py",
    ),
    Canary(
        name="fp32-stage-0-step-can-be-dropped",
        sentence=(
            "at stage 0 in fp32 replacing optimizer.step leaves a step out: the gradients go, and the step counts"
        ),
        trap="T2",
        reference="launcher/engine/numerics/guard.py",
        look=step_dropped,
        changed="change engine/numerics/guard.py, which leaves out a step with a non-finite gradient in this way",
    ),
    Canary(
        name="nan-skipped-silently",
        sentence=(
            "without loss scaling a non-finite gradient is skipped at stages 1 to 3 and in bf16 at stage 0: no "
            "error, no end"
        ),
        trap="T2",
        reference="#8415 (open), #8035",
        look=nan_skipped_silently,
        changed=(
            "every cell has to skip the same steps: see what launcher/engine/numerics/guard.py still has to do, and "
            "correct docs/deepspeed.md"
        ),
    ),
    Canary(
        name="bf16-unchecked-poisons",
        sentence="with bf16.check_grad_overflow=false a NaN goes into the weights at stages 1 and 2, not at 0 and 3",
        trap="T2",
        reference="runtime/precision_config.py, check_grad_overflow; #8035",
        look=unchecked_bf16,
        changed="look at the rule overflow-check-is-needed in launcher/plan/rules.py, and correct docs/deepspeed.md",
    ),
    Canary(
        name="hooks-see-every-gradient",
        sentence=(
            "a hook on a parameter sees its gradient once a micro-step at every stage, divided by the "
            "accumulation, times the scale"
        ),
        trap="T2",
        reference="launcher/engine/numerics/forensics.py",
        look=hooks_fire,
        changed=(
            "fix `hooked` in launcher/engine/numerics/forensics.py: by such hooks it counts what fp16 would lose, and "
            "finds the first non-finite gradient when a skipped step is done again"
        ),
    ),
    Canary(
        name="step-only-at-boundary-never-updates",
        sentence="engine.step called only at the end of an accumulation window never updates",
        trap="T8",
        reference="runtime/engine.py, step; #7439, #8183",
        look=boundary_only,
        changed="Halfstep calls it after every micro-step (launcher/engine/loop.py): see whether that is still right",
    ),
    Canary(
        name="backward-returns-divided-loss",
        sentence="engine.backward returns the loss divided by the accumulation",
        trap="T8",
        reference="runtime/engine.py, backward",
        look=loss_divided,
        changed="Halfstep logs its own loss; correct docs/deepspeed.md",
    ),
    Canary(
        name="half-precision-accumulation",
        sentence=(
            "gradients are summed up in the precision of the model unless data_types.grad_accum_dtype says otherwise"
        ),
        trap="T9",
        reference="runtime/engine.py, get_data_types",
        look=half_accumulation,
        changed=(
            "look at data_types.grad_accum_dtype in ds_configs/zero: fp32 sums may be the default now, or no "
            "longer what the key gives"
        ),
    ),
    Canary(
        name="bf16-stage-1-rounds-the-sum",
        sentence=(
            "an fp32 sum is rounded to bf16 at stage 1, even on one rank, unless communication_data_type is "
            "fp32; not at 2 and 3"
        ),
        trap="T9",
        reference="runtime/engine.py, communication_data_type; runtime/bf16_optimizer.py",
        look=sum_rounded,
        changed=(
            "communication_data_type in ds_configs/base.json may no longer be needed for this; correct "
            "docs/deepspeed.md"
        ),
    ),
    Canary(
        name="stage-0-refuses-fp32-accumulation",
        sentence="fp32 accumulation in half precision is not implemented at stage 0",
        trap="T9",
        reference="runtime/engine.py, _do_optimizer_sanity_check; #7790",
        look=stage_0_needs_half_sums,
        changed=(
            "drop the rule no-fp32-accumulation-at-stage-0 from launcher/plan/rules.py and set the key in "
            "ds_configs/zero/0.json"
        ),
    ),
)
