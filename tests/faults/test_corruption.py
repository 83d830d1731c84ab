"""What lies on the disk is wrong: flipped bits, cut, missing and foreign files; it is found before it is used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import rig
from faults.rig import Launch

pytestmark = pytest.mark.faults
CELL = ("zero=2", "precision=fp16")


@pytest.fixture(scope="module")
def interrupted(launch: Callable[..., Launch]) -> Path:
    """Return a run with checkpoints of steps 10, 20 and 30, killed in step 31."""
    launched = launch("interrupted", *CELL, HALFSTEP_FAULT="step:*:32:kill9")
    assert launched.wait() == [-9, -9]
    assert rig.steps_saved(launched.out) == [10, 20, 30]
    return launched.out


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to be hurt."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def _flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[min(len(content) - 1, int(share * len(content)))] ^= 0x10
    file.write_bytes(content)


HURTS: dict[str, Callable[[Path], object]] = {
    "bit flipped at the start of the tensors": lambda at: _flip(at / "rank-00000.safetensors", 0.0),
    "bit flipped in the middle of the tensors": lambda at: _flip(at / "rank-00001.safetensors", 0.5),
    "bit flipped at the end of the tensors": lambda at: _flip(at / "rank-00001.safetensors", 1.0),
    "bit flipped in a sidecar": lambda at: _flip(at / "rank-00001.json", 0.4),
    "bit flipped in the manifest": lambda at: _flip(at / "manifest.json", 0.3),
    "tensors cut by a byte": lambda at: _cut(at / "rank-00001.safetensors", -1),
    "tensors cut in half": lambda at: _cut(at / "rank-00000.safetensors", 0.5),
    "tensors cut to nothing": lambda at: _cut(at / "rank-00000.safetensors", 0.0),
    "manifest cut in half": lambda at: _cut(at / "manifest.json", 0.5),
    "manifest empty": lambda at: _cut(at / "manifest.json", 0.0),
    "manifest missing": lambda at: (at / "manifest.json").unlink(),
    "a shard missing": lambda at: (at / "rank-00001.safetensors").unlink(),
    "a sidecar missing": lambda at: (at / "rank-00000.json").unlink(),
    "a shard of another step": lambda at: shutil.copy(
        at.with_name("step-00000020") / "rank-00000.safetensors", at / "rank-00000.safetensors"
    ),
    "an empty folder in its place": lambda at: (shutil.rmtree(at), at.mkdir()),
}


def _cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] if share < 0 else content[: int(share * len(content))])


@pytest.mark.parametrize("hurt", HURTS)
def test_a_damaged_checkpoint_is_passed_over_and_kept(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    run: Path,
    hurt: str,
    record: Callable[..., None],
) -> None:
    HURTS[hurt](run / "checkpoints/step-00000030")
    with rig.nothing_left(run):
        again = launch(run, *CELL)
        assert again.wait() == [0, 0], again.output
    (damaged,) = rig.events(run, "checkpoint_damaged")
    assert damaged["folder"] == "step-00000030"
    assert damaged["reason"]
    assert [event["step"] for event in rig.events(run, "resumed")] == [20]
    assert (run / "checkpoints/step-00000030.bad-0002").is_dir()
    rig.assert_same(run, undisturbed(*CELL))
    record(hurt, injected=1, survived=1, worst_redone=rig.redone(run), selected=0)


def test_when_none_is_good_it_stops_instead_of_starting_over(
    launch: Callable[..., Launch], run: Path, record: Callable[..., None]
) -> None:
    for step in (10, 20, 30):
        _flip(run / f"checkpoints/step-{step:08d}/rank-00000.safetensors", 0.3)
    # The lease in it is of the launch that was killed.
    before = sorted(file for file in run.rglob("*") if file.is_file() and file.name != "lease")
    rows = rig.series(run)
    again = launch(run, *CELL)
    assert again.wait() == [2, 2], again.output
    assert "error: none of the 3 checkpoint(s) is good: step-00000030: rank-00000.safetensors" in again.output
    assert again.output.count("error:") == 1, "said once"
    assert rig.series(run) == rows
    assert set(before) <= {file for file in run.rglob("*") if file.is_file()}, "nothing deleted"
    fresh = launch(run, *CELL, "checkpoint.resume=never")
    assert fresh.wait() == [0, 0], fresh.output
    assert rig.last_step(run) == 40
    assert len(list(run.glob("attempts/*/checkpoints/step-*"))) == 3, "what was there is put aside"
    record("every checkpoint damaged", injected=1, survived=1, selected=0)


def test_what_does_not_belong_is_refused_in_one_sentence(
    launch: Callable[..., Launch], run: Path, tmp_path: Path
) -> None:
    newest = run / "checkpoints/step-00000030"
    must = launch(tmp_path / "empty", *CELL, "checkpoint.resume=must")
    assert must.wait() == [2, 2]
    assert "error: there is no checkpoint to resume from" in must.output

    _rewrite(newest, lambda tree: tree["identity"].update({"seed": 7}))
    other = launch(run, *CELL)
    assert other.wait() == [2, 2]
    assert "step-00000030 is a checkpoint of a different run: seed was 7 and is now 0" in other.output

    _rewrite(newest, lambda tree: tree["identity"].update({"seed": 0, "data": "another tokenizer"}))
    other = launch(run, *CELL)
    assert other.wait() == [2, 2]
    assert "is a checkpoint of a different run: data was 'another tokenizer'" in other.output

    _rewrite(newest, lambda tree: tree.update({"format": 99}))
    newer = launch(run, *CELL)
    assert newer.wait() == [2, 2]
    assert "the checkpoint has format 99; this Halfstep reads up to" in newer.output

    shorter = launch(run, *CELL, "steps=20")
    _rewrite(newest, lambda tree: tree.update({"format": 1}))
    assert shorter.wait() == [2, 2]
    assert len(list((run / "checkpoints").iterdir())) == 3, "nothing was deleted or renamed"


def test_other_versions_are_told(launch: Callable[..., Launch], run: Path, undisturbed: Callable[..., Path]) -> None:
    def age(tree: dict) -> None:
        tree["identity"] = json.loads((run / "plan.json").read_text())["identity"]
        tree["versions"]["deepspeed"] = "0.18.0"

    _rewrite(run / "checkpoints/step-00000030", age)
    again = launch(run, *CELL)
    assert again.wait() == [0, 0], again.output
    assert "WARNING: saved with other versions, so the numbers may part: deepspeed 0.18.0 -> " in again.output
    rig.assert_same(run, undisturbed(*CELL))


def _rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest as its writer would: its own digest fits."""
    from halfstep.launcher.config.digest import digest

    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    change(tree)
    file.write_text(json.dumps({**tree, "digest": digest(tree, 32)}))
