"""All twelve (ZeRO stage, precision) cells on two real DeepSpeed ranks, started as a user starts them."""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from process.conftest import BIN, WORDS, Outcome

from launcher.metrics.record import StepRecord

pytestmark = pytest.mark.process
Cell = Callable[[int, str], Outcome]
CELLS = [(zero, precision) for precision in ("fp32", "fp16", "bf16") for zero in range(4)]


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_a_cell_trains_and_leaves_every_field(cell: Cell, zero: int, precision: str) -> None:
    outcome = cell(zero, precision)
    assert outcome.returncode == 0, outcome.output
    assert "Warning: " not in outcome.output, "a library's own warnings bury the run"
    assert [row["step"] for row in outcome.steps] == list(range(1, 21))
    hints = get_type_hints(StepRecord)
    for row in outcome.steps:
        assert list(row) == [field.name for field in fields(StepRecord)]
        for name, value in row.items():
            assert isinstance(value, hints[name]) or (isinstance(value, int) and hints[name] is float), (name, value)
        assert row["tokens"] == row["step"] * 8 * 64
        assert row["grad_norm"] > 0
        assert row["peak_memory_bytes"] > 2**27
        assert 0 < row["data_seconds"] < row["step_seconds"]
    scales = {row["loss_scale"] for row in outcome.steps}
    assert scales == ({65536.0} if precision == "fp16" else {None})
    assert outcome.losses[-1] < outcome.losses[0]
    assert [row["step"] for row in outcome.evaluations] == [0, 10, 20]
    assert all(row["perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in outcome.evaluations)
    summary = outcome.json("summary.json")
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("done", 20, 0)
    assert json.loads((outcome.out / "attempts/0001/exit.json").read_text())["code"] == 0
    assert json.loads((outcome.out / "attempts/0001/env.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-6), ("bf16", 1e-6)])
def test_the_first_step_is_the_same_at_every_stage(cell: Cell, precision: str, tolerance: float) -> None:
    first = [cell(zero, precision).losses[0] for zero in range(4)]
    assert max(first) - min(first) <= tolerance, first
    before = [cell(zero, precision).evaluations[0]["eval_loss"] for zero in range(4)]
    assert max(before) - min(before) <= tolerance, before
    assert abs(first[0] - math.log(512)) < 0.2, "a fresh model guesses uniformly"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-4), ("bf16", 5e-4)])
def test_the_sharded_stages_train_the_same_model(cell: Cell, precision: str, tolerance: float) -> None:
    curves = [cell(zero, precision).losses for zero in (1, 2, 3)]
    norms = [[row["grad_norm"] for row in cell(zero, precision).steps] for zero in (1, 2, 3)]
    for other in (1, 2):
        assert max(abs(a - b) for a, b in zip(curves[0], curves[other], strict=True)) <= tolerance
        assert max(abs(a - b) / a for a, b in zip(norms[0], norms[other], strict=True)) <= 10 * tolerance


def test_fp32_is_the_same_at_stage_0(cell: Cell) -> None:
    zero, one = cell(0, "fp32"), cell(1, "fp32")
    assert max(abs(a - b) for a, b in zip(zero.losses, one.losses, strict=True)) <= 1e-4
    norms = [[row["grad_norm"] for row in outcome.steps] for outcome in (zero, one)]
    assert max(abs(a - b) / a for a, b in zip(*norms, strict=True)) <= 1e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_at_stage_0_warns_on_the_screen(cell: Cell, precision: str) -> None:
    assert f"WARNING: DO NOT TRUST zero=0 precision={precision}" in cell(0, precision).output


def test_a_finished_run_is_not_trained_again(start: Callable[..., Outcome], cell: Cell, data: Path) -> None:
    outcome = cell(2, "fp16")
    before = (outcome.out / "metrics.jsonl").read_bytes()
    words = [*WORDS, "zero=2", "precision=fp16", f"data={data}", f"out={outcome.out}"]
    again = start("again", [str(BIN / "halfstep"), "run", *words])
    assert again.returncode == 0, again.output
    assert "is finished" in again.output
    assert (outcome.out / "metrics.jsonl").read_bytes() == before
    assert [attempt.name for attempt in (outcome.out / "attempts").iterdir()] == ["0001"]
