"""What runs on GPUs or a later DeepSpeed do, on CPU ranks: other wrappers are mended or left alone, Adam is fused.

Run by itself, this file is one rank: it trains cases of the gate under a changed DeepSpeed and prints what deviates.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from process.conftest import environment

pytestmark = pytest.mark.process


def rank_main() -> None:
    """Train stage 0 in both half precisions, changed in two ways, and every cell with what a GPU's plan has.

    The reference judges.
    """
    from halfstep.launcher import fault_injection, topology
    from halfstep.launcher.parity.cases import POISON, Case, plan_of

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    os.environ[fault_injection.VARIABLE] = POISON
    import deepspeed.runtime.engine as runtime
    import torch

    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.state import training_state
    from halfstep.launcher.parity import distance, trial

    world = topology.describe(1, 1)
    fp16 = Case(zero=0, precision="fp16", accumulation=2, clip=0.05, world_size=1, optimizer="adamw", family="gpt2")
    distributed.join(rank, plan_of(fp16, world, repairs=True), torch.distributed.HashStore())
    wrappers: list[str] = []
    optimizers: list[list] = []
    build, backward = trial.build, runtime.DeepSpeedEngine.backward

    def watched(plan):
        engine, repairs = build(plan)
        wrappers.append(type(engine.optimizer).__name__)
        optimizer = training_state.base_optimizer(engine)
        optimizers.append([type(optimizer).__name__, optimizer.defaults.get("fused")])
        return engine, repairs

    def scaling_backward(engine, loss, **options):
        return backward(engine, loss * engine.optimizer.loss_scale, **options)

    trial.build = watched
    changes = {"scales": (runtime.DeepSpeedEngine, "backward", scaling_backward, [fp16])}
    both = [fp16, dataclasses.replace(fp16, precision="bf16")]
    changes["fused"] = (runtime, "FusedAdam", torch.optim.AdamW, both)  # what the engine asks for the fused wrapper
    rows: list[list] = []

    def wrong(case, series, reference):
        deviations = distance.deviations(case, series, reference, "oracle")
        return {deviation.measure: deviation.value for deviation in deviations if not deviation.ok}

    for name, (place, attribute, other, cases) in changes.items():
        old = getattr(place, attribute)
        for case in cases:
            plan = plan_of(case, world, repairs=True)
            reference = trial.on_the_reference(plan)
            setattr(place, attribute, other)
            try:
                series = trial.on_deepspeed(plan, 0)
            finally:
                setattr(place, attribute, old)
            rows.append([name, case.precision, wrappers[-1], list(series.repairs), wrong(case, series, reference)])
    for precision in ("fp32", "fp16", "bf16"):
        reference = trial.on_the_reference(plan_of(dataclasses.replace(fp16, precision=precision), world, repairs=True))
        for zero in range(4):
            case = dataclasses.replace(fp16, precision=precision, zero=zero)
            plan = plan_of(case, world, repairs=True)
            plan.deepspeed["optimizer"]["params"]["fused"] = True
            series = trial.on_deepspeed(plan, 0)
            rows.append(["torch's fused", precision, zero, optimizers[-1], wrong(case, series, reference)])
    print("\n" + json.dumps(rows))
    distributed.leave()


@pytest.fixture(scope="module")
def rows(scratch: Path) -> list[list]:
    done = subprocess.run(
        [sys.executable, __file__],
        env={**environment(scratch), "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_deepspeed_that_scales_the_loss_is_not_made_to_scale_it_twice(rows: list[list]) -> None:
    (row,) = [row for row in rows if row[0] == "scales"]
    assert row[3] == ["false-optimizer-step", "half-precision-accumulation"]
    assert row[4] == {}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_wrapper_that_fused_adam_gets_is_mended_as_well(rows: list[list], precision: str) -> None:
    (row,) = [row for row in rows if row[:2] == ["fused", precision]]
    scaling = ["unscaled-loss"] if precision == "fp16" else []
    assert row[2:4] == ["FP16_Optimizer", ["false-optimizer-step", *scaling, "half-precision-accumulation"]]
    assert row[4] == {}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("zero", range(4))
def test_every_cell_trains_the_same_model_with_torchs_fused_adam(rows: list[list], zero: int, precision: str) -> None:
    (row,) = [row for row in rows if row[:3] == ["torch's fused", precision, zero]]
    assert row[3:] == [["AdamW", True], {}]


if __name__ == "__main__":
    rank_main()
