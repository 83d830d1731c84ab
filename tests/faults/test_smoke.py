"""One fault of each class, in every `make test`; the whole matrix is `make test-faults`."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from faults.rig import Launch

pytestmark = pytest.mark.process
CELL = ("zero=2", "precision=fp16")


def test_a_kill_in_mid_save_and_a_flipped_bit_cost_nothing_but_time(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path]
) -> None:
    reference = undisturbed(*CELL)
    killed = launch("mid-save", *CELL, HALFSTEP_FAULT="save.rename:0:30:kill9")
    assert killed.wait()[0] == -signal.SIGKILL
    out = killed.out
    assert rig.steps_saved(out) == [10, 20], "the checkpoint of step 30 had everything but its name"
    assert [folder.name[:9] for folder in (out / "checkpoints").glob(".*")] == [".writing-"]
    cause = rig.exit_of(out)
    assert (cause["code"], "rank 0 was killed by signal 9" in cause["cause"]) == (128 + 9, True), cause
    assert cause["kind"] == "signal"

    shard = out / "checkpoints/step-00000020/rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x40
    shard.write_bytes(content)
    with rig.nothing_left(out):
        again = launch(out, *CELL)
        assert again.wait() == [0, 0], again.output
    assert "step-00000020 is damaged and passed over: rank-00001.safetensors is not what was written" in again.output
    (resumed,) = rig.events(out, "resumed")
    assert (resumed["step"], resumed["logits_differ_by"]) == (10, 0.0)
    (damaged,) = rig.events(out, "checkpoint_damaged")
    assert damaged["folder"] == "step-00000020"
    assert (out / "checkpoints/step-00000020.bad-0002").is_dir(), "its step was written again, beside it"
    rig.assert_same(out, reference)
    assert rig.redone(out) <= 20


def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_checkpoint(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path]
) -> None:
    reference = undisturbed(*CELL)
    stopped = launch("signal", *CELL)
    stopped.until_step(13)
    stopped.kill(signal.SIGTERM, ranks=(1,))
    out = stopped.out
    with rig.nothing_left(out):
        assert stopped.wait() == [75, 75], stopped.output
    last = rig.last_step(out)
    assert rig.steps_saved(out)[-1] == last
    assert f"stopped: SIGTERM after step {last}" in stopped.output
    assert rig.exit_of(out)["code"] == 75
    assert json.loads((out / "summary.json").read_text())["status"] == "stopped"
    assert launch(out, *CELL).wait() == [0, 0]
    rig.assert_same(out, reference)
    assert rig.redone(out) == 0


def test_a_rank_that_stands_still_is_named_and_the_run_ended(launch: Callable[..., Launch]) -> None:
    stalled = launch("stall", *CELL, "watch.timeout=3")
    stalled.until_step(12)
    stalled.kill(signal.SIGSTOP, ranks=(1,))
    with rig.nothing_left(stalled.out):
        codes = stalled.wait(timeout=30)
    assert 77 in codes, (codes, stalled.output)
    cause = rig.exit_of(stalled.out)
    assert cause["code"] == 77
    assert "rank 1 stopped moving in phase" in cause["cause"]
    assert "stopped by a signal" in cause["cause"]
    assert "most recent call first" in (stalled.out / "attempts/0001/rank-0.log").read_text(), "stacks are dumped"


def test_a_run_resumes_with_another_world_stage_and_precision(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path]
) -> None:
    arguments = ("model.dropout=0", "eval.every=0")
    reference = undisturbed("zero=2", "precision=bf16", *arguments)
    half = launch("reshape", "zero=2", "precision=bf16", *arguments, HALFSTEP_FAULT="step:*:21:kill9")
    half.wait()
    again = launch(half.out, "zero=3", "precision=fp16", *arguments, world=1)
    assert again.wait() == [0], again.output
    assert "reshaped: world_size 2 -> 1, zero 2 -> 3, precision bf16 -> fp16" in again.output
    ours, theirs = rig.rows(half.out), rig.rows(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    at = [row["step"] for row in ours].index(21)
    assert abs(ours[at]["loss"] - theirs[at]["loss"]) < 1e-3, "bf16 against fp16"
    assert abs(ours[-1].get("eval_loss", 0) - theirs[-1].get("eval_loss", 0)) < 1e-2
