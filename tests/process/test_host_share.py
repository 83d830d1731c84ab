"""The host's share of a step, counted in every cell, and the step that is done again: real engines on one rank.

Run by itself, this file is that rank: it trains small models through the loop and prints what it counted and saw.
"""

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from process import synthetic
from ranks import printed_alone
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.process
CELLS = [(zero, precision) for precision in ("fp32", "fp16", "bf16") for zero in range(4)]
LAYERS = (2, 4)
BROKEN_STEP, COUNTED_STEP, STEPS = 1, 3, 4
"""The last step is no example: in it the loop counts by itself what is sent (launcher/engine/ranks/traffic.py)."""
LOOKED_AT = [(0, "fp32"), (0, "fp16"), (1, "bf16"), (2, "fp16"), (3, "fp16")]
"""Cells whose broken step is looked at by hooks as well: both wrappers of stage 0, and those of stages 1 to 3."""
OURS = "/halfstep/launcher/"
NOT_OURS = ("/transformers/", "/deepspeed/", "/torch/optim/", "/halfstep/models/", "/halfstep/launcher/parity/")
EVERYBODYS = "everybody's"
"""The count of all operators, whoever calls them."""
MODELS = 150
"""Operators of a block of transformers' GPT-2 in a micro-step, forward and backward."""
WAITS = {"tolist", "cpu", "numpy"}
"""What makes a host wait for its device and is no operator on a CPU, where nothing has to be copied."""


def is_ours() -> bool:
    """Tell whose the call is: the nearest frame's that is Halfstep's, DeepSpeed's, the model's or the optimizer's.

    The loss is the model's, and the batches are the gate's: they count their targets in the host's memory before they
    go anywhere. What autograd runs is called from DeepSpeed's `backward`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.endswith("cpu_fp16.py"):  # stands between every operator and torch
            if any(part in path for part in NOT_OURS):
                return False
            if OURS in path:
                return True
        frame = frame.f_back
    return False


class Operators(TorchDispatchMode):
    """Count every operator that is ours, `_local_scalar_dense` among them: that is `item`, `float` and `bool`."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[EVERYBODYS] += 1
        if is_ours():
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Count what makes a host wait and is no operator."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITS and is_ours():
            self.counts["wait"] += 1
        return func(*args, **(kwargs or {}))


def plan_of(zero: int, precision: str, *keys: str) -> Any:
    steps = [f"steps={STEPS}", "optimizer.clip=0.05", "model.dropout=0.1", "fp16.initial_scale_power=10"]
    fused = ["ds.optimizer.params.torch_adam=true", "ds.optimizer.params.fused=true"]  # what steps on a GPU
    return synthetic.plan_of(*steps, *fused, f"zero={zero}", f"precision={precision}", *keys)


class Rank:
    """One training through the loop, and what came of it."""

    def __init__(self, plan: Any) -> None:
        from halfstep.launcher.engine.build import build
        from halfstep.launcher.engine.numerics.guard import Guard
        from halfstep.launcher.engine.state import rng

        self.plan, self.losses, self.events, self.marks = plan, [], [], Counter()
        self.engine, repairs = build(plan)
        self.guard = Guard(self.engine, plan, repairs, self._event, 0)
        rng.seed(plan, 0, 0)

    def _event(self, kind: str, **about: Any) -> None:
        if kind == "overflow":
            self.events.append(about)

    def train(self, after_step: Any = lambda step: None) -> None:
        from halfstep.launcher.engine.loop import train
        from halfstep.launcher.engine.training import Training
        from halfstep.launcher.parity.trial import SyntheticFeed

        def step(record: Any) -> None:
            self.losses.append(record.loss)
            after_step(record.step)

        feed = SyntheticFeed(self.plan, 0, self.engine.device)

        def mark(phase: str, step: int) -> None:
            self.marks[f"{phase} {step}"] += 1

        train(Training(engine=self.engine, plan=self.plan, feed=feed, guard=self.guard, on_step=step, mark=mark))
        self.engine.destroy()


def counted(zero: int, precision: str, layers: int) -> dict[str, Any]:
    """Return how often the host waits in a step and each operator of ours, and what was said of the broken step."""
    counts: Counter[str] = Counter()
    counting = contextlib.ExitStack()

    def after_step(step: int) -> None:
        counting.close()
        if step == COUNTED_STEP - 1:
            counting.enter_context(Operators(counts))
            counting.enter_context(Waits(counts))

    rank = Rank(plan_of(zero, precision, f"model.layers={layers}"))
    rank.train(after_step)
    everybodys = counts.pop(EVERYBODYS)
    waits = counts.pop("wait", 0) + counts["aten._local_scalar_dense.default"]
    return {
        "waits": waits,
        EVERYBODYS: everybodys,
        "operators": counts,
        "losses": rank.losses,
        "events": rank.events,
        "marks": rank.marks,
    }


def looked_at(zero: int, precision: str) -> dict[str, Any]:
    """Train the same with hooks in every step, none of which is done again; return what the hooks saw."""
    from halfstep.launcher.engine.numerics import forensics

    rank, calls, bad = Rank(plan_of(zero, precision, f"model.layers={LAYERS[0]}")), Counter(), []
    rank.guard._do_again = lambda losses: ([], 0.0)

    def see(name: str, gradient: Tensor) -> None:
        step = len(rank.losses) + 1
        calls[step, name] += 1
        if step == BROKEN_STEP and not gradient.isfinite().all():
            bad.append({"parameter": name, "micro_step": calls[step, name]})

    with forensics.hooked(rank.engine.module, see):
        rank.train()
    return {"bad": bad, "losses": rank.losses}


def rank_main(wanted: list[str]) -> None:
    """Print one line for every training, those of `wanted` or all."""
    from halfstep.launcher import fault_injection, topology

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    os.environ[fault_injection.VARIABLE] = f"bwd:0:{BROKEN_STEP}:inf"
    from halfstep.launcher.engine.ranks import distributed

    distributed.join(rank, plan_of(1, "fp32"), torch.distributed.HashStore())
    trainings = {f"z{zero} {precision} {n}": (counted, zero, precision, n) for zero, precision in CELLS for n in LAYERS}
    trainings |= {f"z{zero} {precision} looked at": (looked_at, zero, precision) for zero, precision in LOOKED_AT}
    for name, (run, *arguments) in trainings.items():
        if not wanted or name in wanted:
            print("\n" + json.dumps([name, run(*arguments)]), flush=True)
    distributed.leave()


@pytest.fixture(scope="module")
def seen(scratch: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads(line) for line in printed_alone(__file__, scratch) if line.startswith("["))


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_a_step_waits_for_its_device_once_and_at_stage_0_for_its_norm(
    seen: dict[str, Any], zero: int, precision: str
) -> None:
    for layers in LAYERS:
        assert seen[f"z{zero} {precision} {layers}"]["waits"] == (2 if zero == 0 else 1)


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_our_operators_in_a_step_do_not_grow_with_the_model(seen: dict[str, Any], zero: int, precision: str) -> None:
    two, four = (seen[f"z{zero} {precision} {layers}"]["operators"] for layers in LAYERS)
    assert two == four
    assert 10 < sum(two.values()) < 60, two


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_the_planner_knows_how_many_operators_deepspeed_adds(seen: dict[str, Any], zero: int, precision: str) -> None:
    from halfstep.launcher.forecast import compute

    two, four = (seen[f"z{zero} {precision} {layers}"][EVERYBODYS] for layers in LAYERS)
    micro_step, step = compute.LAUNCHED[zero, precision]
    assert (four - two) / 2 == pytest.approx(2 * MODELS + 12 * (2 * micro_step + step), rel=0.05)


@pytest.mark.parametrize("cell", [f"z{zero} {precision}" for zero, precision in LOOKED_AT])
def test_a_broken_step_done_again_names_what_hooks_saw_and_leaves_no_trace(seen: dict[str, Any], cell: str) -> None:
    (event,), hooks = seen[f"{cell} 2"]["events"], seen[f"{cell} looked at"]
    bad = {gradient["parameter"]: gradient["micro_step"] for gradient in reversed(hooks["bad"])}
    first = [{"parameter": name, "micro_step": bad[name]} for name in list(reversed(bad))[:5]]
    assert event["step"] == BROKEN_STEP
    assert event["repeated"] is True
    assert event["non_finite"] == len(bad) > 5
    assert [{key: named[key] for key in ("parameter", "micro_step")} for named in event["first"]] == first
    assert seen[f"{cell} 2"]["losses"] == hooks["losses"], "to the bit: masks of dropout, weights and gradients"
    assert len(set(hooks["losses"])) == STEPS


@pytest.mark.parametrize("cell", [f"z{zero} {precision}" for zero, precision in LOOKED_AT])
def test_a_step_done_again_makes_marks_on_its_way(seen: dict[str, Any], cell: str) -> None:
    """It may take longer than a rank may stand still."""
    marks = seen[f"{cell} 2"]["marks"]
    assert [marks[f"forward {step}"] for step in (BROKEN_STEP, COUNTED_STEP)] == [2 * 2, 2]


if __name__ == "__main__":
    rank_main(sys.argv[1:])
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
