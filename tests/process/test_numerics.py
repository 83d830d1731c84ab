"""Overflow and poison from outside: one policy in every cell, forensics, and an end on all ranks alike."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from process.conftest import BIN, WORDS, Outcome

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]
CELLS = [(zero, precision) for precision in ("fp32", "fp16", "bf16") for zero in range(4)]
LAYERS = ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]


def train(start: Start, name: str, *arguments: str, ranks: int = 2, **environment: str) -> Outcome:
    starter = [str(BIN / "deepspeed"), "--num_gpus", str(ranks)] if ranks > 1 else [sys.executable]
    return start(name, [*starter, "launcher/train.py", *WORDS, "eval.every=0", *arguments, "out={out}"], **environment)


@pytest.fixture(scope="module")
def overflowing(start: Start, data: Path) -> list[Outcome]:
    """Return fp16 runs at all four stages: an absurd first scale, and a batch poisoned on rank 1 at step 30."""
    arguments = ["precision=fp16", "steps=36", "fp16.initial_scale_power=32", "fp16.window=4", "numerics.every=12"]
    return [
        train(start, f"absurd{zero}", *arguments, f"zero={zero}", f"data={data}", HALFSTEP_FAULT="fwd:1:30:nan")
        for zero in range(4)
    ]


def test_the_same_overflows_give_the_same_scales_and_skips_at_every_stage(overflowing: list[Outcome]) -> None:
    for outcome in overflowing:
        assert outcome.returncode == 0, outcome.output
    series = [
        [(row["loss_scale"], row["overflow"], row["skipped_steps"]) for row in outcome.steps] for outcome in overflowing
    ]
    assert series[0] == series[1] == series[2] == series[3]
    scales, overflows, skipped = zip(*series[0], strict=True)
    assert scales[:4] == (2**32, 2**32, 2**31, 2**30), "hysteresis 2 forgives the first overflow only"
    assert any(later > earlier for earlier, later in itertools.pairwise(scales)), "no growth: the test proves nothing"
    assert overflows[29], "the poisoned step"
    assert skipped[-1] == sum(overflows)


def test_the_run_recovers_and_trains_on(overflowing: list[Outcome]) -> None:
    for outcome in overflowing:
        assert [row["step"] for row in outcome.steps if row["loss"] is None] == [30]
        assert all((row["grad_norm"] is None) == row["overflow"] for row in outcome.steps)
        assert outcome.losses[-1] < outcome.losses[0] - 0.5
        assert outcome.evaluations[-1]["eval_loss"] < outcome.evaluations[0]["eval_loss"] - 0.5
        reference = overflowing[1]
        for mine, theirs in zip(outcome.steps, reference.steps, strict=True):
            assert (mine["loss"] is None) == (theirs["loss"] is None)
            assert mine["loss"] is None or mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
            assert mine["overflow"] or mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_every_overflow_names_the_first_parameters(overflowing: list[Outcome]) -> None:
    for outcome in overflowing:
        overflows = {event["step"]: event for event in outcome.events if event["event"] == "overflow"}
        assert list(overflows) == [row["step"] for row in outcome.steps if row["overflow"]]
        for event in overflows.values():
            assert event["non_finite"] >= len({gradient["parameter"] for gradient in event["first"]}) >= 1
            for gradient in event["first"]:
                assert gradient["parameter"].startswith(gradient["layer"])
                assert gradient["rank"] in (0, 1)
                assert gradient["micro_step"] in (1, 2)
        assert {gradient["rank"] for gradient in overflows[1]["first"]} == {0, 1}, "at 2^32 both ranks overflow"
        assert {gradient["rank"] for gradient in overflows[30]["first"]} == {1}, "only rank 1 was poisoned"
        (bad,) = [event for event in outcome.events if event["event"] == "loss_not_finite"]
        assert (bad["step"], bad["ranks"], bad["first_activation"]) == (30, [1], None)


def test_each_layers_underflow_is_counted_with_and_without_the_scale(overflowing: list[Outcome]) -> None:
    for outcome in overflowing:
        statistics = [event for event in outcome.events if event["event"] == "numerics"]
        assert [event["step"] for event in statistics] == [12, 24, 36]
        for event in statistics[1:]:
            assert list(event["layers"]) == LAYERS
            assert event["scale"] == outcome.steps[event["step"] - 1]["loss_scale"]
            block = event["layers"]["transformer.h.0"]
            assert 0 < block["grad_max"] < 10
            assert block["underflow_unscaled"] > 10 * block["underflow_scaled"], "what the loss scale is for"
    first, *others = [outcome.events for outcome in overflowing]
    for layer in LAYERS:
        fractions = [
            next(e for e in events if e["event"] == "numerics" and e["step"] == 24)["layers"][layer][
                "underflow_unscaled"
            ]
            for events in (first, *others)
        ]
        assert max(fractions) - min(fractions) < 0.01, (layer, fractions)


def test_halfstep_numerics_reads_such_a_run(overflowing: list[Outcome], start: Start) -> None:
    picture = overflowing[0].out / "numerics.png"
    done = start("numerics", [str(BIN / "halfstep"), "numerics", str(overflowing[0].out)])
    assert done.returncode == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "transformer.h.1" in done.output


SMOKE = {(0, "fp32"), (3, "fp16")}


@pytest.mark.parametrize(
    ("zero", "precision"), [pytest.param(*cell, marks=[] if cell in SMOKE else [pytest.mark.full]) for cell in CELLS]
)
def test_a_loss_that_stays_bad_ends_every_cell_alike(start: Start, data: Path, zero: int, precision: str) -> None:
    arguments = [f"zero={zero}", f"precision={precision}", f"data={data}"]
    outcome = train(start, f"poisoned{zero}{precision}", *arguments, HALFSTEP_FAULT="fwd:1:5-:nan")
    assert outcome.returncode == 76, outcome.output
    lines = [line for line in outcome.output.splitlines() if line.startswith(("error:", " from:", "  try:"))]
    assert len(lines) == 3, outcome.output
    assert lines[0] == "error: the loss was not finite 3 steps in a row, up to step 7"
    assert lines[1] == " from: first in the loss of rank 1 at step 5; last good step 4"
    assert "Traceback" not in outcome.output
    series = [(row["loss"] is None, row["overflow"], row["skipped_steps"]) for row in outcome.steps]
    assert series == [(False, False, 0)] * 4 + [(True, True, skipped) for skipped in (1, 2, 3)]
    (stopped,) = [event for event in outcome.events if event["event"] == "stopped"]
    assert stopped["weights_finite"] is True
    assert outcome.json("summary.json")["status"] == "diverged"
    for rank in (0, 1):
        assert lines[0].removeprefix("error: ") in (outcome.out / f"attempts/0001/rank-{rank}.log").read_text()
    assert json.loads((outcome.out / "attempts/0001/exit.json").read_text())["code"] == 76


@pytest.mark.parametrize(
    ("zero", "precision"),
    [pytest.param(*cell, marks=[] if cell == (1, "bf16") else [pytest.mark.full]) for cell in CELLS],
)
def test_gradients_that_stay_bad_end_a_run_though_its_loss_is_fine(
    start: Start, data: Path, zero: int, precision: str
) -> None:
    scaling = ["fp16.initial_scale_power=4", "fp16.hysteresis=1"] if precision == "fp16" else []
    arguments = [f"zero={zero}", f"precision={precision}", f"data={data}", "numerics.max_skips=4", *scaling]
    outcome = train(start, f"gradients{zero}{precision}", *arguments, ranks=1, HALFSTEP_FAULT="bwd:0:3-:inf")
    assert outcome.returncode == 76, outcome.output
    assert "from: first in transformer." in outcome.output
    assert "last good step 2" in outcome.output
    if precision == "fp16":
        assert "error: gradients overflow fp16 at the smallest loss scale, 1, in step 7" in outcome.output
        assert [row["loss_scale"] for row in outcome.steps] == [16, 16, 16, 8, 4, 2, 1]
    else:
        assert "error: gradients were not finite 4 steps in a row, up to step 6" in outcome.output
    assert all(row["loss"] is not None for row in outcome.steps)


@pytest.mark.parametrize(
    ("zero", "precision"),
    [(2, "fp16"), *(pytest.param(*cell, marks=pytest.mark.full) for cell in [(1, "fp16"), (1, "bf16")])],
)
def test_a_skipped_step_leaves_nothing_behind_in_offloaded_gradients(
    start: Start, data: Path, zero: int, precision: str
) -> None:
    arguments = [f"zero={zero}", f"precision={precision}", "offload=optimizer-cpu", "steps=10", f"data={data}"]
    outcome = train(start, f"offload{zero}{precision}", *arguments, ranks=1, HALFSTEP_FAULT="fwd:0:5:nan")
    assert outcome.returncode == 0, outcome.output
    assert [row["step"] for row in outcome.steps if row["overflow"]] == [5]
    assert "WARNING: HALFSTEP_FAULT=fwd:0:5:nan: this run is being broken on purpose" in outcome.output


def test_a_static_scale_trains_like_a_dynamic_one_that_never_moved(
    start: Start, cell: Callable[[int, str], Outcome], data: Path
) -> None:
    arguments = ["precision=fp16", "zero=0", "fp16.scale=65536", f"data={data}"]
    outcome = train(start, "static", *arguments)
    assert outcome.returncode == 0, outcome.output
    assert {row["loss_scale"] for row in outcome.steps} == {65536.0}
    assert outcome.losses == pytest.approx(cell(1, "fp16").losses, rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_static_scale_works_at_every_stage_and_ends_a_run_it_cannot_cure(start: Start, data: Path, zero: int) -> None:
    arguments = ["precision=fp16", f"zero={zero}", f"data={data}"]
    fine = train(start, f"static{zero}", *arguments, "fp16.scale=1024", ranks=1)
    assert fine.returncode == 0, fine.output
    assert {row["loss_scale"] for row in fine.steps} == {1024.0}
    far_too_large = train(start, f"overstatic{zero}", *arguments, "fp16.scale=4294967296", ranks=1)
    assert far_too_large.returncode == 76
    assert "3 steps in a row, up to step 3 (the scale is fixed at 4.29497e+09)" in far_too_large.output
