"""Checkpoints on disk: they appear whole, damage is found wherever it is, pieces come back however they were cut."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from fakes import saved
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import FORMAT, Damaged, Manifest, read
from halfstep.launcher.checkpoint.shards import Piece, Shards
from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import RefusedError, RequestError

SIZES = {"first": (3, 4), "second": (7,), "third": (2, 3, 2)}
PARAMETERS = {
    name: np.random.default_rng(len(name) + len(shape)).standard_normal(shape).astype(np.float32)
    for name, shape in SIZES.items()
}
TOTAL = sum(values.size for values in PARAMETERS.values())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "a run"


def _steps(run: Path) -> list[tuple[int, bool]]:
    return [(candidate.step, candidate.manifest is not None) for candidate in store.candidates(run)]


def _damage(folder: Path) -> str | None:
    return shards.damaged(folder, read(folder), lambda: None)


# --- pieces


@settings(max_examples=60)
@given(data=st.data(), bounds=st.lists(st.integers(0, TOTAL), max_size=4))
def test_pieces_cut_anywhere_are_read_in_any_slice(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, bounds: list[int]
) -> None:
    folder = saved.save(tmp_path_factory.mktemp("run"), PARAMETERS, bounds=sorted(bounds))
    files = Shards(folder, read(folder))
    assert list(files.parameters()) == list(PARAMETERS)
    for name, values in PARAMETERS.items():
        for state, whole in saved.states_of(name, values).items():
            start = data.draw(st.integers(0, whole.size))
            length = data.draw(st.integers(0, whole.size - start))
            read_back = files.read(name, state, start, length)
            assert read_back is not None
            np.testing.assert_array_equal(read_back, whole.reshape(-1)[start : start + length])
            entire = files.read(name, state)
            assert entire is not None
            np.testing.assert_array_equal(entire.reshape(files.shape(name)), whole)


def test_a_state_that_was_never_stepped_is_none_and_a_missing_master_is_damage(run: Path) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[TOTAL // 2])
    files = Shards(folder, read(folder))
    assert files.read("first", "momentum") is None
    manifest = read(folder)
    more = {**manifest.model, "parameters": {**manifest.model["parameters"], "fourth": [2]}}
    with pytest.raises(Damaged, match="fourth/master is there up to element 0 of 2"):
        Shards(folder, dataclasses.replace(manifest, model=more)).read("fourth", "master")


def test_a_part_of_a_state_is_damage(run: Path) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[6])
    files = Shards(folder, dataclasses.replace(read(folder), world_size=1))
    first = files.read("first", "exp_avg", 0, 6)
    assert first is not None
    with pytest.raises(Damaged, match="first/exp_avg is there up to element 6 of 12"):
        files.read("first", "exp_avg")


def test_the_probe_comes_back_in_its_shape(run: Path) -> None:
    logits = np.arange(16 * 5, dtype=np.float32).reshape(16, 5)
    folder = saved.save(run, PARAMETERS, logits=logits, sequence=32)
    probe = Shards(folder, read(folder)).probe()
    assert probe is not None
    np.testing.assert_array_equal(probe, logits)
    bare = saved.save(run, PARAMETERS, step=11)
    assert Shards(bare, read(bare)).probe() is None


def test_what_is_written_is_plain_safetensors(run: Path) -> None:
    from safetensors.numpy import load_file

    folder = saved.save(run, PARAMETERS)
    tensors = load_file(folder / "rank-00000.safetensors")
    np.testing.assert_array_equal(tensors["second/master"], PARAMETERS["second"])
    assert set(tensors) == {f"{name}/{state}" for name in SIZES for state in ("master", *saved.STATES)}


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    import xxhash

    pieces = [Piece(key="a", length=5, array=lambda: np.arange(5, dtype=np.float64))]  # written as fp32 all the same
    beats: list[int] = []
    entry = shards.write(tmp_path / "f.safetensors", pieces, lambda: beats.append(1))
    content = (tmp_path / "f.safetensors").read_bytes()
    assert (entry.bytes, entry.xxh3) == (len(content), xxhash.xxh3_128(content).hexdigest())
    assert beats == [1]


# --- damage


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors", "rank-00001.json"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_bit_in_any_file_is_found(run: Path, file: str, place: int) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[9])
    assert _damage(folder) is None
    saved.flip(folder / file, place)
    assert _damage(folder) == f"{file} is not what was written: its hash differs"


def test_ranks_share_the_reading_and_one_of_them_finds_it(run: Path) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[9, 20])
    saved.flip(folder / "rank-00002.safetensors")
    damages = [shards.damaged(folder, read(folder), lambda: None, part, 4) for part in range(4)]
    assert [reason is not None for reason in damages].count(True) == 1


def test_a_file_that_is_cut_short_or_gone_is_seen_without_reading(run: Path) -> None:
    folder = saved.save(run, PARAMETERS)
    file = folder / "rank-00000.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(Damaged, match=f"rank-00000.safetensors has {size - 4} bytes, {size} were written"):
        read(folder)
    file.unlink()
    with pytest.raises(Damaged, match=r"rank-00000.safetensors: No such file"):
        read(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_no_changed_bit_of_a_manifest_is_believed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = saved.save(tmp_path_factory.mktemp("run"), PARAMETERS) / "manifest.json"
    before = read(file.parent)
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        after = read(file.parent)
    except Damaged:
        return
    assert after == before  # only what lies between the words changed


def test_a_manifest_survives_its_own_text(run: Path) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[5])
    manifest = read(folder)
    assert isinstance(manifest, Manifest)
    assert (manifest.world_size, manifest.step, len(manifest.files)) == (2, 10, 4)
    assert manifest.bytes == sum((folder / file.name).stat().st_size for file in manifest.files)


def test_a_newer_halfsteps_checkpoint_is_refused_and_not_called_damaged(run: Path) -> None:
    file = saved.save(run, PARAMETERS) / "manifest.json"
    tree = json.loads(file.read_text())
    tree.pop("digest")
    tree = {**tree, "format": FORMAT + 1, "something": "new"}
    file.write_text(json.dumps({**tree, "digest": digest(tree, 32)}))
    with pytest.raises(RequestError, match=f"has format {FORMAT + 1}; this Halfstep reads up to {FORMAT}"):
        list(store.candidates(run))


# --- the folder


def test_candidates_are_newest_first_and_say_what_is_wrong(run: Path) -> None:
    for step in (100, 5, 20):
        saved.save(run, PARAMETERS, step=step)
    (store.home(run) / "step-00000020" / "manifest.json").write_text("{}")
    (store.home(run) / "step-00000005").rename(store.home(run) / "step-00000006")
    candidates = list(store.candidates(run))
    assert [candidate.step for candidate in candidates] == [100, 20, 6]
    assert [candidate.reason for candidate in candidates] == [
        None,
        "manifest.json is damaged: it does not say its format",
        "its manifest is of step 5",
    ]


def test_a_run_without_checkpoints_has_no_candidates(run: Path) -> None:
    assert _steps(run) == []
    assert store.sweep(run) == []


def test_until_the_commit_there_is_no_checkpoint(run: Path) -> None:
    run.mkdir()
    folder = store.prepare(run, 7, "0001", 0)
    assert folder is not None
    assert folder.name == ".writing-step-00000007-0001"
    files = shards.write(folder / "rank-00000.safetensors", [], lambda: None)
    entry = shards.write_json(folder / "rank-00000.json", {"pieces": {}})
    assert _steps(run) == []
    model = {"name": "by hand", "config": {}, "parameters": {}}
    final = store.commit(folder, saved.manifest(7, model, 1, (files, entry), None))
    assert final.name == "step-00000007"
    assert not folder.exists()
    assert _steps(run) == [(7, True)]


def test_preparing_over_a_good_checkpoint_says_so_and_a_damaged_one_is_set_aside(run: Path) -> None:
    folder = saved.save(run, PARAMETERS)
    assert store.prepare(run, 10, "0002", 0) is None
    (folder / "rank-00000.json").unlink()
    assert store.prepare(run, 10, "0002", 0) is not None
    aside = [folder.name for folder in store.home(run).iterdir() if ".bad" in folder.name]
    assert aside == ["step-00000010.bad-0002"]
    assert (store.home(run) / aside[0] / "rank-00000.safetensors").is_file()
    assert _steps(run) == []


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(run: Path) -> None:
    for _ in range(3):
        saved.save(run, PARAMETERS)
        assert store.prepare(run, 10, "0004", 0, distrusted=True) is not None
    names = sorted(folder.name for folder in store.home(run).iterdir() if not folder.name.startswith("."))
    assert names == ["step-00000010.bad-0004", "step-00000010.bad-0004-2", "step-00000010.bad-0004-3"]


def test_too_little_space_is_refused_before_anything_is_written(run: Path) -> None:
    run.mkdir()
    with pytest.raises(RefusedError, match=r"the checkpoint of step 3 needs 1024.0 TiB, and .* are free"):
        store.prepare(run, 3, "0001", 1 << 50)
    assert list(store.home(run).iterdir()) == []


def test_sweeping_removes_what_a_dead_start_left_and_nothing_else(run: Path) -> None:
    saved.save(run, PARAMETERS)
    saved.save(run, PARAMETERS, step=11)
    store.prepare(run, 11, "0001", 0, distrusted=True)
    store.prepare(run, 12, "0001", 0)
    (store.home(run) / ".pruned-step-00000001").mkdir()
    assert sorted(store.sweep(run)) == [
        ".pruned-step-00000001",
        ".writing-step-00000011-0001",
        ".writing-step-00000012-0001",
    ]
    assert sorted(folder.name for folder in store.home(run).iterdir()) == ["step-00000010", "step-00000011.bad-0001"]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(2, 0, [50, 60]), (3, 0, [40, 50, 60]), (2, 20, [20, 40, 50, 60]), (1, 0, [50, 60]), (9, 0, [10, 20, 40, 50, 60])],
)
def test_pruning_keeps_the_newest_and_the_multiples(run: Path, keep: int, keep_every: int, left: list[int]) -> None:
    for step in (10, 20, 40, 50, 60):
        saved.save(run, PARAMETERS, step=step)
    gone = store.prune(run, keep, keep_every)
    assert sorted(candidate.step for candidate in store.candidates(run)) == left
    assert sorted([*gone, *left]) == [10, 20, 40, 50, 60]


def test_pruning_neither_counts_nor_deletes_what_is_distrusted(run: Path) -> None:
    for step in (10, 20, 30, 40):
        saved.save(run, PARAMETERS, step=step)
    assert store.prune(run, 2, 0, distrusted=frozenset({10, 40})) == []
    assert store.prune(run, 2, 0, distrusted=frozenset({40})) == [10]


def test_damaged_checkpoints_neither_count_nor_go(run: Path) -> None:
    for step in (10, 20, 30, 40):
        saved.save(run, PARAMETERS, step=step)
    for step in (10, 40):
        (store.home(run) / store.folder_name(step) / "manifest.json").unlink()
    assert store.prune(run, 2, 0) == []
    assert sorted(_steps(run)) == [(10, False), (20, True), (30, True), (40, False)]
