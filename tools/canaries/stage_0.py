"""Stage 0 in half precision: the loss is not scaled, and the optimizer has stepped before training."""

import math
from collections.abc import Callable

import torch

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
    near,
    one_weight,
    said,
    step,
    weight,
)


def loss_unscaled() -> Seen:
    """Compare the gradient of a loss with what `engine.backward` makes of it, and the steps of stages 0 and 1."""
    stage_0 = engine(0, "fp16")
    stage_0.backward(loss(stage_0))
    ratio = float(stage_0.module.weight.grad)
    stage_0.step()
    moved = [-weight(stage_0), step(engine(0, "fp16", fp16={"loss_scale": SCALE})), step(engine(1, "fp16"))]
    seen = f"the gradient is {ratio:.1f} times the raw loss's at scale {SCALE:g}; a step of 1 moves the weight by "
    seen += f"{moved[0]:.3g} (fixed scale: {moved[1]:.3g}), at stage 1 by {moved[2]:.3g}"
    return near([ratio, *moved], [1, 1 / SCALE, 1 / SCALE, 1]), seen


def clipping_inert() -> Seen:
    """Clip a gradient of 8 to 1 at both stages."""
    moved = [step(engine(zero, "fp16", gradient_clipping=1.0), 8.0) for zero in (0, 1)]
    seen = f"a gradient of 8, clipped to 1, moves the weight by {moved[0]:.3g} at stage 0, by {moved[1]:.3g} at stage 1"
    return near(moved, [8 / SCALE, 1]), seen


def _counters(of: Engine) -> list[float]:
    return [float(state["step"]) for state in of.optimizer.optimizer.state.values() if "step" in state]


def false_step() -> Seen:
    """Read Adam's step counters right after `deepspeed.initialize`."""
    counted = {(zero, half): _counters(engine(zero, half, optimizer=adamw(0.01))) for half in HALF for zero in STAGES}
    good = all(counters == ([1.0] if zero == 0 else []) for (zero, _), counters in counted.items())
    return good, "Adam's counter before the first step, " + "; ".join(
        f"{half}: {said(counted[0, half]) or 'none'} at stage 0, "
        f"{said(number for zero in SHARDED for number in counted[zero, half]) or 'none'} at 1 to 3"
        for half in HALF
    )


def spurious_decay() -> Seen:
    """Read a master weight of 1 before training, at learning rate 0.01 and weight decay 0.1."""
    engines = [engine(0, half, one_weight(1.0), optimizer=adamw(0.01, decay=0.1)) for half in HALF]
    masters = [float(built.optimizer.fp32_groups[0][0]) for built in engines]
    seen = f"a master of 1 is {masters[0]:.4f} in fp16 and {masters[1]:.4f} in bf16 before training"
    return all(math.isclose(master, 0.999, abs_tol=1e-4) for master in masters), seen


def _first_updates(undo: Callable[[Engine], None] | None = None) -> dict[tuple[int, str], float]:
    """Return Adam's first update as a part of the learning rate, at stages 0 and 1, with the loss scaled by hand."""
    rate, updates = 2.0**-6, {}
    for half in HALF:
        for zero in (0, 1):
            built = engine(zero, half, optimizer=adamw(rate))
            if undo and zero == 0:
                undo(built)
            moved = step(built, by_hand=SCALE if zero == 0 and half == "fp16" else 1.0)
            updates[zero, half] = (-float(built.optimizer.fp32_groups[0][0]) if zero == 0 else moved) / rate
    return updates


def first_update() -> Seen:
    """Compare Adam's first update, which the second step's bias correction makes too small."""
    updates = _first_updates()
    seen = (
        f"the first update, in learning rates: {updates[0, 'fp16']:.3f} (fp16) and {updates[0, 'bf16']:.3f} (bf16) at "
    )
    seen += f"stage 0, {updates[1, 'fp16']:.3f} and {updates[1, 'bf16']:.3f} at stage 1"
    return near(updates.values(), [0.744, 1, 0.744, 1]), seen


def false_step_undone() -> Seen:
    """Undo the false step as a run does, and compare the first update and the masters again."""
    from halfstep.launcher.engine.numerics import repair

    noticed, masters = [], []

    def undo(built: Engine) -> None:
        noticed.append(repair.took_false_step(built))
        repair.undo_false_step(built)

    updates = _first_updates(undo)
    for half in HALF:
        decayed = engine(0, half, one_weight(1.0), optimizer=adamw(0.01, decay=0.1))
        undo(decayed)
        masters.append(float(decayed.optimizer.fp32_groups[0][0]))
    seen = (
        f"noticed {sum(noticed)} times of {len(noticed)}; undone, the first update is {updates[0, 'fp16']:.3f} (fp16) "
    )
    seen += f"and {updates[0, 'bf16']:.3f} (bf16) learning rates, a master of 1 is {said(masters)}"
    return all(noticed) and near([*updates.values(), *masters], [1] * 6), seen


def norm_times_scale() -> Seen:
    """Read the norm of a gradient of 1, the loss scaled by hand where DeepSpeed does not."""
    engines = [engine(zero, "fp16") for zero in (0, 1)]
    for built, by_hand in zip(engines, (SCALE, 1.0), strict=True):
        step(built, by_hand=by_hand)
    norms = [float(built.get_global_grad_norm()) for built in engines]
    return near(norms, [SCALE, 1]), f"the norm of a gradient of 1 is {norms[0]:g} at stage 0, {norms[1]:g} at stage 1"


def no_norm_in_fp32() -> Seen:
    """Ask every stage for its gradient norm after a step in fp32."""
    engines = [engine(zero) for zero in STAGES]
    for built in engines:
        step(built)
    norms = [built.get_global_grad_norm() for built in engines]
    known = [float(norm) for norm in norms[1:] if norm is not None]
    return norms[0] is None and known == [1.0] * 3, f"the norm of a gradient of 1 at stages 0 to 3: {said(norms)}"


def norm_in_16_bits() -> Seen:
    """Give the wrapper a gradient of 100000 in fp32, which fp16 cannot hold, and ask whether the step was applied."""
    built = engine(0, "fp16")
    built.optimizer.loss_scale_config.cur_scale = 1.0
    built.module.weight.grad_dtype = None
    built.module.weight.grad = built.module.weight.new_full((1, 1), 1e5, dtype=torch.float32)
    skipped = bool(built.optimizer.step())
    return skipped, f"an fp32 gradient of 100000 is {'skipped' if skipped else 'applied'} at stage 0"


def fp32_sums() -> Seen:
    """Accumulate 256 and four times 0.25 in bf16 at stage 0 as a run does, and clip the sum to 1."""
    from halfstep.launcher.engine.numerics import repair

    built = engine(0, "bf16", gradient_accumulation_steps=5, communication_data_type="fp32")
    sums = repair.accumulate_in_fp32(built)
    for gradient in (256, 0.25, 0.25, 0.25):
        step(built, gradient * 5)
        sums.collect()
    built.backward(loss(built, 0.25 * 5))
    total = float(built.module.weight.grad)
    repair.unscale_and_clip(built, norm=total, scale=1.0, clip=1.0)
    built.step()
    moved = -float(built.optimizer.fp32_groups[0][0])
    return near(
        [total, moved], [257, 1]
    ), f"256 + 4 x 0.25 is {total:g}; clipped to 1, it moves the master by {moved:g}"


CANARIES = (
    Canary(
        name="fp16-stage-0-norm-in-16-bits",
        sentence="at stage 0 the wrapper takes the norm from 16-bit copies, and skips an fp32 gradient beyond 65504",
        trap="T9",
        reference="moe/utils.py, split_params_grads_into_shared_and_expert_params",
        look=norm_in_16_bits,
        changed="unscale_and_clip in launcher/engine/numerics/repair.py could leave clipping to DeepSpeed again",
    ),
    Canary(
        name="stage-0-can-sum-in-fp32",
        sentence="at stage 0 gradients that are given in fp32 are reduced, clipped and stepped with as they are",
        trap="T9",
        reference="runtime/engine.py, buffered_allreduce_fallback; launcher/engine/numerics/repair.py",
        look=fp32_sums,
        changed="fix accumulate_in_fp32 in launcher/engine/numerics/repair.py",
    ),
    Canary(
        name="fp16-stage-0-loss-unscaled",
        sentence=(
            "at stage 0 in fp16 engine.backward does not scale the loss, and the gradients are unscaled all the same"
        ),
        trap="T1",
        reference="runtime/engine.py, backward; since v0.18.3 (#7665), fix proposed in #8393",
        look=loss_unscaled,
        changed=(
            "DeepSpeed scales differently now: if it scales the loss at stage 0, the repair unscaled-loss stops "
            "by itself; drop it from launcher/engine/numerics/repair.py"
        ),
    ),
    Canary(
        name="fp16-stage-0-clipping-inert",
        sentence="at stage 0 in fp16 gradient_clipping sees gradients too small by the scale, and does not bind",
        trap="T1",
        reference="#7665, #8393",
        look=clipping_inert,
        changed="see fp16-stage-0-loss-unscaled; correct the number in docs/deepspeed.md",
    ),
    Canary(
        name="stage-0-false-optimizer-step",
        sentence=(
            "at stage 0 in fp16 and bf16 the optimizer steps once on zero gradients before training; at stages 1 "
            "to 3 it does not"
        ),
        trap="T1",
        reference="runtime/fp16/unfused_optimizer.py, initialize_optimizer_states; #5104 (open)",
        look=false_step,
        changed=(
            "if stage 0 no longer steps, the repair false-optimizer-step stops by itself and can be dropped from "
            "launcher/engine/numerics/repair.py; if other stages do now, extend repair to them"
        ),
    ),
    Canary(
        name="stage-0-spurious-weight-decay",
        sentence="at stage 0 in fp16 and bf16 the fp32 masters have been decayed once before training",
        trap="T1",
        reference="runtime/fp16/unfused_optimizer.py, initialize_optimizer_states",
        look=spurious_decay,
        changed=(
            "look at stage-0-false-optimizer-step; undo_false_step may no longer have to take the masters from "
            "the weights"
        ),
    ),
    Canary(
        name="stage-0-first-update-small",
        sentence=(
            "at stage 0 in fp16 and bf16 Adam's first update has the second step's bias correction, 0.744 of "
            "what it should be"
        ),
        trap="T1",
        reference="runtime/fp16/unfused_optimizer.py, initialize_optimizer_states",
        look=first_update,
        changed="look at stage-0-false-optimizer-step; correct the number in docs/deepspeed.md",
    ),
    Canary(
        name="stage-0-false-step-can-be-undone",
        sentence=(
            "clearing the optimizer's state and refreshing the masters makes the first update at stage 0 that of "
            "stage 1"
        ),
        trap="T1",
        reference="launcher/engine/numerics/repair.py",
        look=false_step_undone,
        changed=(
            "fix undo_false_step and took_false_step in launcher/engine/numerics/repair.py, and refuse zero=0 in half "
            "precision until then"
        ),
    ),
    Canary(
        name="fp16-stage-0-norm-not-divided",
        sentence="at stage 0 in fp16 get_global_grad_norm is the norm times the loss scale, once the loss is scaled",
        trap="T1",
        reference="runtime/fp16/unfused_optimizer.py, step; #8588 (open)",
        look=norm_times_scale,
        changed=(
            "Halfstep works this norm out itself (launcher/engine/readings.py, before_step); it could ask "
            "DeepSpeed again"
        ),
    ),
    Canary(
        name="fp32-stage-0-has-no-norm",
        sentence="at stage 0 in fp32 there is no gradient norm",
        trap="T1",
        reference="runtime/engine.py, get_global_grad_norm",
        look=no_norm_in_fp32,
        changed=(
            "Halfstep works this norm out itself (launcher/engine/readings.py, before_step); it could ask "
            "DeepSpeed again"
        ),
    ),
)
