"""Loss scales: three rules for one thing, the step on which they grow, and torch_autocast's own."""

import math
from typing import Any

from tools.canaries.bench import SCALE, SHARDED, STAGES, Canary, Seen, engine, loss, near, raised, said, step, weight

_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}, "gradient_clipping": 1.0}


def _after_overflows(zero: int, overflows: int, **fp16: float) -> tuple[list[float], str, int]:
    """Return the loss scale after each overflow from 2^8, what was raised, and DeepSpeed's count of skipped steps."""
    built = engine(zero, "fp16", fp16={"initial_scale_power": 8, **fp16})
    scales: list[float] = []

    def overflow() -> None:
        for _ in range(overflows):
            step(built, math.inf)
            scales.append(float(built.optimizer.loss_scale))

    return scales, raised(overflow), built.skipped_steps


def hysteresis_ignored() -> Seen:
    """Overflow three times from a scale of 256 with a hysteresis of 3."""
    scales = [_after_overflows(zero, 3, hysteresis=3)[0] for zero in STAGES]
    seen = f"after three overflows from 256: {said(scales[0])} at stage 0; {said(scales[1])} at stage 1"
    return scales == [[128, 64, 32]] + [[256, 256, 128]] * 3, seen


def stays_at_minimum() -> Seen:
    """Overflow twenty times at stage 0 with a smallest scale of 64."""
    scales, error, skipped = _after_overflows(0, 20, hysteresis=1, min_loss_scale=64)
    seen = f"{skipped} of 20 steps skipped, scale {scales[-1]:g}, {error or 'nothing raised'}"
    return (scales[-1], error, skipped) == (64, "", 20), seen


def raises_at_minimum() -> Seen:
    """Overflow at stages 1 to 3 with a smallest scale of 64."""
    results = [_after_overflows(zero, 20, hysteresis=1, min_loss_scale=64) for zero in SHARDED]
    good = all(scales == [128, 64] and "Current loss scale already at minimum" in error for scales, error, _ in results)
    return (
        good,
        f"overflows survived at stages 1 to 3: {said(len(scales) for scales, _, _ in results)}; {results[0][1]}",
    )


def _growth(zero: int) -> tuple[list[float], list[float]]:
    """Return how far three steps go and their norms, while the scale doubles from the second one on."""
    built, moved, norms = engine(zero, "fp16", fp16={"initial_scale_power": 8, "loss_scale_window": 1}), [], []
    for _ in range(3):
        moved.append(step(built, by_hand=float(built.optimizer.loss_scale) if zero == 0 else 1.0))
        norms.append(float(built.get_global_grad_norm()))
    return moved, norms


def growth_step_halved() -> Seen:
    """Take steps of 1 while the scale doubles from the second step on."""
    moved = [_growth(zero)[0] for zero in STAGES]
    seen = f"steps of 1 as the scale grows: {said(moved[0])} (stage 0, loss scaled by hand); stages 1 to 3: "
    return moved == [[1, 0.5, 0.5]] * 4, seen + "; ".join(said(scales) for scales in moved[1:])


def growth_norm_halved() -> Seen:
    """Read the norms of the same steps."""
    norms = [_growth(zero)[1] for zero in SHARDED]
    good = norms == [[1, 1, 1], [1, 1, 1], [1, 0.5, 0.5]]
    return good, f"the norms of a gradient of 1: {said(norms[2])} at stage 3, {said(norms[0])} at stage 1"


def scale_taken_over() -> Seen:
    """Move the scale between steps as a run does, and take steps of 1, then one that overflows."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    moved, scales = [], []
    for zero in STAGES:
        built = engine(zero, "fp16", fp16={"loss_scale_window": 1})
        holder: Any = built.optimizer.loss_scale_config if zero == 0 else LossScaler(int(SCALE))
        if zero == 0:
            holder.dynamic_loss_scale = False
        else:
            built.optimizer.loss_scaler = holder
        for scale in (256.0, 512.0, 64.0, 64.0):
            holder.cur_scale = scale
            gradient = math.inf if len(moved) % 4 == 3 else 1.0
            moved.append(step(built, gradient, by_hand=scale if zero == 0 else 1.0))
        scales.append(float(built.optimizer.loss_scale))
    seen = f"steps of 1 at scales 256, 512, 64, then an overflow: {said(moved[:4])} at stage 0, {said(moved[4:8])} at "
    return moved == [1, 1, 1, 0] * 4 and scales == [64] * 4, seen + f"stage 1; the scale stays {said(scales)}"


def direct_backward_unscaled() -> Seen:
    """Call `loss.backward()` with a fixed scale, and with a dynamic one for comparison."""

    def direct(zero: int, **fp16: float) -> float:
        built = engine(zero, "fp16", fp16=fp16)
        loss(built).backward()
        built.step()
        return -weight(built)

    moved = [direct(zero, loss_scale=SCALE) for zero in SHARDED]
    errors = [
        raised(lambda: direct(0, loss_scale=SCALE)),
        *(raised(lambda zero=zero: direct(zero)) for zero in SHARDED),
    ]
    seen = (
        f"a step of 1 moves the weight by {said(moved)} at stages 1 to 3; refused {sum(map(bool, errors))} of 4 times "
    )
    return near(moved, [1 / SCALE] * 3) and all(errors), seen + "at stage 0 and with a dynamic scale"


def autocast_clips_scaled() -> Seen:
    """Take a step on a gradient of 0.5, which clipping at 1 should leave alone."""
    engines = [engine(zero, **_AUTOCAST) for zero in STAGES]
    moved = [step(built, 0.5) for built in engines]
    norm = float(engines[1].get_global_grad_norm())
    seen = f"a step of 0.5 moves the weight by {said(moved)} at stages 0 to 3; stage 1 reports the norm {norm:g}"
    return near([*moved, norm], [0.5, *[0.5 / 32768] * 3, 32768]), seen


def autocast_stuck() -> Seen:
    """Take twenty steps on a gradient of 1, which overflows at the scale 65536 that GradScaler starts from."""
    applied = []
    for zero in STAGES:
        built = engine(zero, **_AUTOCAST)
        applied.append(sum(step(built) != 0 for _ in range(20)))
    return applied == [19, 0, 0, 0], f"of 20 steps, those that moved the weight at stages 0 to 3: {said(applied)}"


def process_wide() -> Seen:
    """Make an fp16 engine after one with torch_autocast in the same process."""
    moved = [step(engine(1, "fp16"))]
    engine(1, **_AUTOCAST)
    moved.append(step(engine(1, "fp16", first=False)))
    return moved == [1, 0], f"an fp16 step of 1 at stage 1 moves the weight by {moved[0]:g}, after it by {moved[1]:g}"


CANARIES = (
    Canary(
        name="fp16-stage-0-ignores-hysteresis",
        sentence="stage 0 halves the scale at the first overflow whatever fp16.hysteresis says; stages 1 to 3 obey it",
        trap="T2",
        reference="runtime/fp16/loss_scaler.py, LossScaleConfig",
        look=hysteresis_ignored,
        changed="compare engine/numerics/loss_scale.py with DeepSpeed's rule again, and correct docs/deepspeed.md",
    ),
    Canary(
        name="fp16-stage-0-stays-at-minimum",
        sentence="at stage 0 overflows at the smallest scale are skipped for ever",
        trap="T2",
        reference="runtime/fp16/unfused_optimizer.py, _update_scale",
        look=stays_at_minimum,
        changed=(
            "Halfstep ends such a run itself (launcher/engine/numerics/guard.py); see that DeepSpeed does not end it "
            "first, and correct docs/deepspeed.md"
        ),
    ),
    Canary(
        name="fp16-sharded-raises-at-minimum",
        sentence="at stages 1 to 3 an overflow at the smallest scale raises a bare Exception",
        trap="T2",
        reference="runtime/fp16/loss_scaler.py, DynamicLossScaler.update_scale",
        look=raises_at_minimum,
        changed="Halfstep replaces this scaler (launcher/engine/numerics/guard.py); correct docs/deepspeed.md",
    ),
    Canary(
        name="fp16-growth-step-halved",
        sentence=(
            "the step on which the scale doubles is divided by the doubled scale, so that it is half as large, "
            "at every stage"
        ),
        trap="T4",
        reference="runtime/zero/stage_1_and_2.py and stage3.py, step; runtime/fp16; #8588 (open)",
        look=growth_step_halved,
        changed=(
            "the scale now moves after the step: DeepSpeed's own scaler could be used again at the stages that "
            "are right (launcher/engine/numerics/guard.py)"
        ),
    ),
    Canary(
        name="fp16-stage-3-growth-norm-halved",
        sentence="at stage 3 the norm of the step on which the scale doubles is halved too, not at stages 1 and 2",
        trap="T4",
        reference="runtime/zero/stage3.py, step",
        look=growth_norm_halved,
        changed="look at fp16-growth-step-halved, and correct docs/deepspeed.md",
    ),
    Canary(
        name="fp16-scale-can-be-taken-over",
        sentence=(
            "a scale written between steps is the one a whole step uses, at every stage, and an overflow does "
            "not move it"
        ),
        trap="T4",
        reference="launcher/engine/numerics/guard.py",
        look=scale_taken_over,
        changed=(
            "fix Guard._take_over and Guard._write_scale in launcher/engine/numerics/guard.py: the loss scale is no "
            "longer Halfstep's"
        ),
    ),
    Canary(
        name="fp16-direct-backward-unscaled",
        sentence=(
            "with a fixed loss scale loss.backward() is accepted at stages 1 to 3 and leaves the gradients "
            "divided by the scale"
        ),
        trap="T10",
        reference="runtime/base_optimizer.py, needs_scaler",
        look=direct_backward_unscaled,
        changed="Halfstep calls engine.backward only; correct docs/deepspeed.md",
    ),
    Canary(
        name="autocast-fp16-clips-scaled",
        sentence="torch_autocast in float16 clips gradients that are still scaled at stages 1 to 3; stage 0 is right",
        trap="T3",
        reference="runtime/zero/stage_1_and_2.py, step",
        look=autocast_clips_scaled,
        changed=(
            "if stages 1 to 3 are right now, and autocast-fp16-stuck is gone too, take torch's "
            "scaler no longer away (launcher/engine/numerics/guard.py, _take_over)"
        ),
    ),
    Canary(
        name="autocast-fp16-stuck",
        sentence="torch_autocast in float16 never lowers its scale at stages 1 to 3: once a step overflows, all do",
        trap="T3",
        reference="runtime/zero/stage_1_and_2.py, step",
        look=autocast_stuck,
        changed=(
            "if stages 1 to 3 recover now, and autocast-fp16-clips-scaled is gone too, take torch's "
            "scaler no longer away (launcher/engine/numerics/guard.py, _take_over)"
        ),
    ),
    Canary(
        name="autocast-fp16-process-wide",
        sentence=(
            "one engine with torch_autocast in float16 puts a GradScaler into every later engine of stages 1 to "
            "3 in the process"
        ),
        trap="T3",
        reference="runtime/torch_autocast.py, TORCH_AUTOCAST_INITIALIZED; #7946 (open)",
        look=process_wide,
        changed=(
            "the mark on the process is gone or elsewhere: see that `engine` in "
            "tools/canaries/bench.py still starts every canary afresh"
        ),
    ),
)
