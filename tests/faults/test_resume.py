"""Going on is exact: to the bit in every cell, and within rounding where world size, stage or precision changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from faults.rig import Launch

pytestmark = pytest.mark.faults
CELLS = [(zero, precision) for zero in range(4) for precision in ("fp32", "fp16", "bf16")]
MORE = {
    "offloaded optimizer": ("zero=2", "precision=bf16", "offload=optimizer-cpu"),
    "DeepSpeed's own Adam on the host": (
        "zero=1",
        "precision=bf16",
        "offload=optimizer-cpu",
        "ds.optimizer.params.torch_adam=false",
    ),
    "all offloaded": ("zero=3", "precision=fp16", "offload=cpu"),
    "llama, accumulation 4, clipping": ("model=llama-nano", "zero=3", "batch.micro=1", "optimizer.clip=0.05"),
    "sgd with momentum": ("optimizer.kind=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1", "zero=1"),
    "a moving loss scale": ("zero=1", "precision=fp16", "fp16.window=4", "fp16.initial_scale_power=32"),
    "activation checkpointing": ("zero=3", "precision=bf16", "activation_checkpointing=true"),
}


def _killed_and_resumed(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], name: str, arguments: tuple[str, ...]
) -> Path:
    launched = launch(name, *arguments, HALFSTEP_FAULT="bwd:1:27:kill9")
    assert launched.wait()[1] == -9, launched.output
    again = launch(launched.out, *arguments)
    assert again.wait() == [0, 0], again.output
    assert [event["logits_differ_by"] for event in rig.events(launched.out, "resumed")] == [0.0]
    rig.assert_same(launched.out, undisturbed(*arguments))
    return launched.out


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_every_cell_resumes_to_the_bit_with_dropout(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    zero: int,
    precision: str,
    record: Callable[..., None],
) -> None:
    arguments = (f"zero={zero}", f"precision={precision}")
    out = _killed_and_resumed(launch, undisturbed, f"cell-{zero}-{precision}", arguments)
    record(f"resume, zero={zero} precision={precision}", injected=1, survived=1, worst_redone=rig.redone(out))


@pytest.mark.parametrize("what", MORE)
def test_so_does(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], what: str, record: Callable[..., None]
) -> None:
    out = _killed_and_resumed(launch, undisturbed, f"more-{what}", MORE[what])
    record(f"resume, {what}", injected=1, survived=1, worst_redone=rig.redone(out))


def test_a_finished_run_is_made_longer(launch: Callable[..., Launch], undisturbed: Callable[..., Path]) -> None:
    arguments = ("zero=2", "precision=fp16", "schedule.kind=constant", "schedule.warmup=5")
    launched = launch("longer", *arguments, "steps=20")
    assert launched.wait() == [0, 0], launched.output
    longer = launch(launched.out, *arguments, "steps=40")
    assert longer.wait() == [0, 0], longer.output
    assert json.loads((launched.out / "summary.json").read_text())["steps"] == 40
    rig.assert_same(launched.out, undisturbed(*arguments))


# (from, to): words and world size of the first half and of the second.
RESHAPES = {
    "2 -> 1 ranks, stage 2": (("zero=2",), 2, ("zero=2",), 1),
    "1 -> 2 ranks, stage 2": (("zero=2",), 1, ("zero=2",), 2),
    "2 -> 1 ranks, stage 3": (("zero=3",), 2, ("zero=3",), 1),
    "1 -> 2 ranks, stage 3": (("zero=3",), 1, ("zero=3",), 2),
    "2 -> 3 ranks, stage 3": (("zero=3", "batch.global=12"), 2, ("zero=3", "batch.global=12"), 3),
    "stage 1 -> 2": (("zero=1",), 2, ("zero=2",), 2),
    "stage 2 -> 1": (("zero=2",), 2, ("zero=1",), 2),
    "stage 2 -> 3": (("zero=2",), 2, ("zero=3",), 2),
    "stage 3 -> 2": (("zero=3",), 2, ("zero=2",), 2),
    "stage 3 -> 1": (("zero=3",), 2, ("zero=1",), 2),
    "stage 0 -> 1": (("zero=0",), 2, ("zero=1",), 2),
    "stage 0 -> 3, 2 -> 1 ranks": (("zero=0",), 2, ("zero=3",), 1),
    "stage 3 -> 0": (("zero=3",), 2, ("zero=0",), 2),
    "stage 1 -> 0, 1 -> 2 ranks": (("zero=1",), 1, ("zero=0",), 2),
    "offload on": (("zero=2",), 2, ("zero=2", "offload=optimizer-cpu"), 2),
    "micro-batch 2 -> 4": (("zero=2",), 2, ("zero=2", "batch.micro=4"), 2),
}


@pytest.mark.parametrize("what", RESHAPES)
@pytest.mark.parametrize("precision", ["fp32"])
def test_a_reshaped_run_resumes_as_the_unchanged_one(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    what: str,
    precision: str,
    record: Callable[..., None],
) -> None:
    first, world, second, other_world = RESHAPES[what]
    common = ("model.dropout=0", f"precision={precision}")
    _reshape(
        launch, undisturbed, f"reshape-{what}", (common, first, world), (common, second, other_world), 1e-4, record
    )


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp16", "bf16"), ("fp32", "bf16"), ("fp16", "fp32")])
def test_the_masters_are_kept_in_another_precision(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    before: str,
    after: str,
    record: Callable[..., None],
) -> None:
    common = ("model.dropout=0", "zero=2")
    _reshape(
        launch,
        undisturbed,
        f"precision-{before}-{after}",
        (common, (f"precision={before}",), 2),
        (common, (f"precision={after}",), 2),
        1e-3,  # one half precision rounds what the other does not
        record,
    )


Half = tuple[tuple[str, ...], tuple[str, ...], int]


def _reshape(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    name: str,
    before: Half,
    after: Half,
    tolerance: float,
    record: Callable[..., None],
) -> None:
    (common, first, world), (_, second, other_world) = before, after
    reference = undisturbed(*common, *first, world=world)
    launched = launch(
        name.replace(" ", "").replace(">", ""), *common, *first, world=world, HALFSTEP_FAULT="step:*:25:kill9"
    )
    assert set(launched.wait()) == {-9}
    again = launch(launched.out, *common, *second, world=other_world)
    assert again.wait() == [0] * other_world, again.output
    assert "reshaped: " in again.output or "batch.micro" in " ".join(second) or "offload" in " ".join(second)
    ours = {row["step"]: row["loss"] for row in rig.rows(launched.out) if "loss" in row}
    theirs = {row["step"]: row["loss"] for row in rig.rows(reference) if "loss" in row}
    assert list(ours) == list(theirs) == list(range(1, 41))
    assert all(ours[step] == theirs[step] for step in range(1, 21)), "what was before stands"
    difference = abs(ours[21] - theirs[21])
    assert difference <= tolerance, (ours[21], theirs[21])
    assert max(abs(ours[step] - theirs[step]) for step in range(21, 41)) <= 20 * tolerance
    record(f"reshape, {name.removeprefix('reshape-')}", injected=1, survived=1, first_loss_differs_by=difference)


def test_what_cannot_be_done_is_refused_in_one_sentence(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path]
) -> None:
    out = undisturbed("zero=2", "precision=fp16")
    third = launch(out, "zero=2", "precision=fp16", "steps=80", world=3)
    assert set(third.wait(timeout=60)) == {2}
    assert "error: " in third.output
    assert "Traceback" not in third.output
    other = launch(out, "zero=2", "precision=fp16", "steps=80", "model.width=64")
    assert set(other.wait(timeout=60)) == {2}
    assert "belongs to a different run: model.width was None and is now 64" in other.output
