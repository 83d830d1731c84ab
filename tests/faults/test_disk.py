"""The disk is full, slow, read-only or gone while a checkpoint is written."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import rig
from faults.rig import Launch

pytestmark = pytest.mark.faults
CELL = ("zero=2", "precision=fp16")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of its own, with room for six checkpoints of 6 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False)


def test_a_full_disk_is_found_before_the_save_and_the_last_checkpoint_stands(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    small_disk: Path,
    record: Callable[..., None],
) -> None:
    launched = launch(small_disk / "run", *CELL)
    launched.until(lambda: rig.steps_saved(launched.out)[-1:] == [10])
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (os.statvfs(small_disk).f_bavail * 4096 - (2 << 20)))
    assert launched.wait(timeout=40) == [3, 3], launched.output
    assert rig.exit_of(launched.out)["kind"] == "disk-full"
    assert "and 2.0 MiB are free" in launched.output or "MiB are free; the last good one is of step" in launched.output
    assert launched.output.count("error:") == 1
    saved = rig.steps_saved(launched.out)[-1]
    ballast.unlink()
    again = launch(launched.out, *CELL)
    assert again.wait() == [0, 0], again.output
    assert rig.events(launched.out, "resumed")[0]["step"] == saved
    rig.assert_same(launched.out, undisturbed(*CELL))
    record("disk full before a save", injected=1, survived=1, worst_redone=rig.redone(launched.out))


@pytest.mark.parametrize("where", ["save.shard:1", "save.sync:1", "save.sync:0", "save.manifest:0", "save.shard:*"])
def test_a_disk_that_fills_up_in_mid_save_stops_all_ranks_with_the_old_checkpoint(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], where: str, record: Callable[..., None]
) -> None:
    launched = launch(f"enospc-{where.replace('*', 'all')}", *CELL, HALFSTEP_FAULT=f"{where}:20:enospc")
    assert launched.wait(timeout=40) == [3, 3], launched.output
    assert "the checkpoint of step 20 could not be written (rank " in launched.output
    assert "No space left on device); the last good one is of step 10" in launched.output
    assert rig.exit_of(launched.out)["kind"] == "disk-full"
    assert rig.steps_saved(launched.out) == [10]
    assert not list((launched.out / "checkpoints").glob(".*")), "what was half-written is gone"
    with rig.nothing_left(launched.out):
        assert launch(launched.out, *CELL).wait() == [0, 0]
    rig.assert_same(launched.out, undisturbed(*CELL))
    record(f"disk full at {where}", injected=1, survived=1, worst_redone=rig.redone(launched.out))


def test_with_the_policy_continue_it_trains_on_and_saves_again(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], record: Callable[..., None]
) -> None:
    arguments = (*CELL, "checkpoint.on_failure=continue")
    launched = launch("enospc-continue", *arguments, HALFSTEP_FAULT="save.shard:1:20:enospc")
    assert launched.wait() == [0, 0], launched.output
    (failed,) = rig.events(launched.out, "save_failed")
    assert failed["step"] == 20
    assert rig.steps_saved(launched.out) == [10, 30, 40]
    rig.assert_same(launched.out, undisturbed(*CELL))
    record("disk full, checkpoint.on_failure=continue", injected=1, survived=1, worst_redone=0)


def test_a_slow_disk_and_a_kill_while_it_is_slow(
    launch: Callable[..., Launch], undisturbed: Callable[..., Path], record: Callable[..., None]
) -> None:
    launched = launch("slow", *CELL, HALFSTEP_FAULT="save.sync:1:20:sleep=20")
    launched.until(lambda: list((launched.out / "checkpoints").glob(".writing-step-00000020*")))
    launched.until_step(20)
    assert rig.steps_saved(launched.out) == [10], "nothing appears before every rank's part is on the disk"
    launched.kill()
    launched.wait(timeout=30)
    assert rig.steps_saved(launched.out) == [10]
    with rig.nothing_left(launched.out):
        assert launch(launched.out, *CELL).wait() == [0, 0]
    rig.assert_same(launched.out, undisturbed(*CELL))
    record("one shard 20 s late, then kill -9", injected=1, survived=1, worst_redone=rig.redone(launched.out))


def test_a_file_system_that_vanishes_ends_the_run_with_a_sentence(
    launch: Callable[..., Launch], small_disk: Path, record: Callable[..., None]
) -> None:
    launched = launch(small_disk / "run", *CELL, "steps=2000")
    launched.until(lambda: 10 in rig.steps_saved(launched.out))
    subprocess.run(["umount", "--lazy", small_disk], check=True)
    assert launched.wait(timeout=60) == [3, 3], launched.output
    assert "cannot be written: No such file or directory; the last good one is of step" in launched.output
    assert launched.output.count("error:") == 1
    assert "Traceback" not in launched.output
    record("the file system vanishes (lazy umount)", injected=1, survived=1)


def test_a_folder_that_cannot_be_written_is_said_at_the_start(launch: Callable[..., Launch], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    launched = launch(small_disk / "run", *CELL)
    # The rig's own log lies beside the run.
    assert launched.wait(timeout=60) == [2, 2], launched.output
    assert "cannot be written: Read-only file system" in launched.output
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


def test_the_summary_of_a_run_says_where_its_time_went(undisturbed: Callable[..., Path]) -> None:
    summary = json.loads((undisturbed(*CELL) / "summary.json").read_text())
    assert set(summary["lost_seconds"]) == {
        "start", "load", "evaluate", "save", "skipped", "redone", "down", "other",
    }  # fmt: skip
    total = summary["productive_seconds"] + sum(summary["lost_seconds"].values())
    assert total == pytest.approx(summary["wall_seconds"], rel=1e-9)
