"""What GPUs and a later DeepSpeed do, on a CPU rank: Adam is fused, and a loss that is scaled at stage 0 is left alone.

Run by itself, this file is one rank: it trains cases of the gate under another optimizer or DeepSpeed and prints what
deviates.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest
from ranks import printed_alone

pytestmark = pytest.mark.process
# Of fp16/fused_optimizer.py both precisions, of no wrapper, bf16_optimizer.py and zero/ one cell each.
CELLS = {(0, "fp16"): "FP16_Optimizer", (0, "bf16"): "FP16_Optimizer", (0, "fp32"): "AdamW",
         (1, "bf16"): "BF16_Optimizer", (2, "fp16"): "DeepSpeedZeroOptimizer",
         (3, "bf16"): "DeepSpeedZeroOptimizer_Stage3"}  # fmt: skip


def rank_main() -> None:
    """Train stage 0 under a DeepSpeed that scales, then cells with the optimizer of a GPU; the reference judges."""
    from halfstep.launcher import fault_injection, topology
    from halfstep.launcher.parity.case_plan import plan_of
    from halfstep.launcher.parity.cases import POISON, Case

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    os.environ[fault_injection.VARIABLE] = POISON
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.state import training_state
    from halfstep.launcher.parity import distance, trial

    world = topology.describe(1, 1)
    fp16 = Case(zero=0, precision="fp16", accumulation=2, clip=0.05, world_size=1, optimizer="adamw", family="gpt2")
    distributed.join(rank, plan_of(fp16, world, repairs=True), torch.distributed.HashStore())
    built: list[tuple[str, bool | None]] = []
    build, backward = trial.build, DeepSpeedEngine.backward

    def watched(plan):
        engine, repairs = build(plan)
        fused = training_state.base_optimizer(engine).defaults["fused"]
        built.append((type(engine.optimizer).__name__, fused))
        return engine, repairs

    def scaling_backward(engine, loss, **options):
        return backward(engine, loss * engine.optimizer.loss_scale, **options)

    @functools.cache
    def reference_of(precision):
        return trial.on_the_reference(plan_of(dataclasses.replace(fp16, precision=precision), world, repairs=True))

    def judged(name, case, *, fused):
        plan = plan_of(case, world, repairs=True)
        if fused:
            plan.deepspeed["optimizer"]["params"]["fused"] = True
        series = trial.on_deepspeed(plan, 0)
        deviations = distance.deviations(case, series, reference_of(case.precision), "oracle")
        wrong = {deviation.measure: deviation.value for deviation in deviations if not deviation.ok}
        return [name, case.zero, case.precision, *built[-1], list(series.repairs), wrong]

    trial.build = watched
    DeepSpeedEngine.backward = scaling_backward
    rows = [judged("scales", fp16, fused=False)]
    DeepSpeedEngine.backward = backward
    rows += [
        judged("fused", dataclasses.replace(fp16, zero=zero, precision=precision), fused=True)
        for zero, precision in CELLS
    ]
    print("\n" + json.dumps(rows))
    distributed.leave()


@pytest.fixture(scope="module")
def rows(scratch: Path) -> list[list]:
    return json.loads(printed_alone(__file__, scratch)[-1])


def test_a_deepspeed_that_scales_the_loss_is_not_made_to_scale_it_twice(rows: list[list]) -> None:
    (row,) = [row for row in rows if row[0] == "scales"]
    assert row[3:] == ["FP16_UnfusedOptimizer", None, ["false-optimizer-step", "half-precision-accumulation"], {}]


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_torchs_fused_adam_trains_the_same_model_under_every_wrapper(
    rows: list[list], zero: int, precision: str
) -> None:
    (row,) = [row for row in rows if row[:3] == ["fused", zero, precision]]
    scaling = ["unscaled-loss"] if precision == "fp16" else []
    faults = ["false-optimizer-step", *scaling, "half-precision-accumulation"]
    repairs = faults if (zero, precision) in ((0, "fp16"), (0, "bf16")) else []
    assert row[3:] == [CELLS[zero, precision], True, repairs, {}]


if __name__ == "__main__":
    rank_main()
