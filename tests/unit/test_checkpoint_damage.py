"""Checkpoints that claim too much: hashes that fit and content that does not, links and pipes, runs that prune."""

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from fakes import saved

from halfstep.launcher.checkpoint import manifest as manifests
from halfstep.launcher.checkpoint import shards, store
from halfstep.launcher.checkpoint.manifest import Damaged, Gone, read
from halfstep.launcher.cli.main import main
from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import RequestError
from halfstep.launcher.export import source, survey

PARAMETERS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(7, dtype=np.float32)}
Tree = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def rehash(folder: Path, change: Callable[[Tree], Any] = lambda tree: None) -> None:
    """Change a manifest, and make every hash in it fit what lies there."""
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    for item in tree["files"]:
        if (folder / item["name"]).is_file():
            content = (folder / item["name"]).read_bytes()
            item |= {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    tree = change(tree) or tree
    file.write_text(json.dumps({**tree, "digest": digest(tree, 32)}))


def reason(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, as a start that looks for one would find."""
    try:
        return shards.damaged(folder, read(folder), lambda: None)
    except Damaged as damage:
        return str(damage)


def without(tree: Tree, *keys: str) -> None:
    for key in keys[:-1]:
        tree = tree[key]
    del tree[keys[-1]]


MANIFESTS: list[tuple[Callable[[Tree], Any], str]] = [
    (lambda tree: tree.update(files=[]), "names 0 files of 2 ranks"),
    (lambda tree: tree.update(files=5), "files = 5"),
    (lambda tree: tree["files"].append(tree["files"][0]), "it names a file twice"),
    (lambda tree: tree["files"][0].update(name="../run/x"), "'../run/x' is no plain name of a file"),
    (lambda tree: tree["files"][0].update(name="/etc/passwd"), "'/etc/passwd' is no plain name of a file"),
    (lambda tree: tree["files"][0].update(name="x\x00y"), "is no plain name of a file"),
    (lambda tree: tree["files"][0].update(name=".."), "is no plain name of a file"),
    (lambda tree: tree["files"][0].update(bytes=-1), "files.0.bytes = -1"),
    (lambda tree: tree["files"][0].update(bytes="many"), "files.0.bytes = 'many'"),
    (lambda tree: tree["files"][0].update(xxh3=7), "files.0.xxh3 = 7"),
    (lambda tree: tree["files"][0].update(name="rank-00009.json"), "it names no rank-00000.safetensors"),
    (lambda tree: tree.update(world_size=0), "world_size = 0"),
    (lambda tree: tree.update(world_size=10**9), "world_size = 1000000000"),
    (lambda tree: tree.update(world_size=3), "it names 4 files of 3 ranks"),
    (lambda tree: tree.update(step=True), "step = True"),
    (lambda tree: tree.update(step=10**400), "step = a huge number"),
    (lambda tree: tree.update(zero=7), "zero = 7"),
    (lambda tree: tree.update(precision="fp4"), "precision = 'fp4'"),
    (lambda tree: tree.update(lr="fast"), "lr = 'fast'"),
    (lambda tree: tree.update(time=1e300), "time = 1e+300"),
    (lambda tree: tree.update(model=[]), "model"),
    (lambda tree: without(tree, "model", "config"), "it has no model.config"),
    (lambda tree: tree["model"]["parameters"].update(b=[-7]), "model.parameters.b.0 = -7"),
    (lambda tree: tree["model"]["parameters"].update(b=[10**9, 10**9]), "parameters do not fit into files"),
    (lambda tree: tree["model"]["parameters"].update(b=7), "model.parameters.b = 7"),
    (lambda tree: tree["model"].update(buffers={"m": 5}), "model.buffers.m"),
    (lambda tree: tree["optimizer"].update(states="exp_avg"), "optimizer.states"),
    (lambda tree: tree["optimizer"].update(steps=-1), "optimizer.steps = -1"),
    (lambda tree: tree["guard"].update(skipped_steps=None), "guard.skipped_steps = None"),
    (lambda tree: tree["guard"].update(loss_scale={"value": "big"}), "guard.loss_scale.value = 'big'"),
    (lambda tree: without(tree, "guard", "last_good_step"), "it has no guard.last_good_step"),
    (lambda tree: without(tree, "data", "path"), "it has no data.path"),
    (lambda tree: tree.update(versions=[1]), "versions"),
    (lambda tree: tree.update(attempt="../0001"), "attempt = '../0001'"),
    (lambda tree: without(tree, "identity"), "it has no identity"),
]


@pytest.mark.parametrize(("change", "said"), MANIFESTS, ids=[said for _, said in MANIFESTS])
def test_a_manifest_whose_digest_fits_is_believed_only_as_far_as_its_schema(
    run: Path, change: Callable[[Tree], Any], said: str
) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[9])
    rehash(folder)
    assert reason(folder) is None, "hashing again alone does no harm"
    rehash(folder, change)
    with pytest.raises(Damaged) as caught:
        read(folder)
    assert said in str(caught.value)
    assert main(["checkpoint", "verify", str(run)]) == 2


def test_a_manifest_with_more_in_it_than_is_known_is_read(run: Path) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[9])
    rehash(folder, lambda tree: tree.update(weather="fine"))
    assert reason(folder) is None
    kept = read(folder).model
    rehash(folder, lambda tree: tree["model"].update(colour="blue"))
    assert read(folder).model == {**kept, "colour": "blue"}, "what convert writes again keeps it"


def sidecar(change: Callable[[Tree], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "rank-00001.json"
        tree = json.loads(file.read_text())
        file.write_text(json.dumps(change(tree) or tree))

    return apply


def header(change: Callable[[Tree], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "rank-00001.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack_from("<Q", content)
        table = json.loads(content[8 : 8 + size])
        text = json.dumps(change(table) or table).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return apply


def replaced(content: bytes, name: str = "rank-00001.safetensors") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def rename(table: Tree, old: str, new: str) -> Tree:
    return {new if key == old else key: value for key, value in table.items()}


FILES: list[tuple[Callable[[Path], None], str]] = [
    (replaced(b"{}", "rank-00001.json"), "rank-00001.json: it has no pieces"),
    (replaced(b"[]", "rank-00001.json"), "rank-00001.json: it is no JSON object"),
    (replaced(b"\xff", "rank-00001.json"), "rank-00001.json: it is not UTF-8 at byte 0"),
    (replaced(b"[" * 100_000, "rank-00001.json"), "rank-00001.json: it is nested too deep"),
    (replaced(b'{"pieces": {}, "pieces": {}}', "rank-00001.json"), "rank-00001.json: it has 'pieces' twice"),
    (sidecar(lambda tree: tree.update(rng=[1])), "rank-00001.json: rng is no states of random generators"),
    (sidecar(lambda tree: tree["pieces"].update(c=[0, 3])), "has a piece of c, which the model does not have"),
    (sidecar(lambda tree: tree["pieces"].update(b=[5, 7])), "has 7 elements of b from 5 on"),
    (sidecar(lambda tree: tree["pieces"].update(b=[-1, 7])), "pieces.b.0 = -1"),
    (sidecar(lambda tree: tree["pieces"].update(b=[0, 0])), "has 0 elements of b from 0 on"),
    (sidecar(lambda tree: tree["pieces"].update(b="all")), "pieces.b = 'all'"),
    (sidecar(lambda tree: tree["pieces"].update({"a.weight": [8, 4]})), "a.weight/exp_avg has 3 elements, not 4"),
    (sidecar(lambda tree: tree["pieces"].pop("b") and None), "nothing speaks of b/"),
    (replaced(b""), "rank-00001.safetensors is no file of tensors"),
    (replaced(struct.pack("<Q", 2**60) + b"{}"), "rank-00001.safetensors is no file of tensors"),
    (header(lambda table: table["b/master"].update(dtype="X9")), "rank-00001.safetensors is no file of tensors"),
    (header(lambda table: table["b/master"].update(shape=[6])), "rank-00001.safetensors is no file of tensors"),
    (header(lambda table: table["b/master"].update(shape=[7, 1])), "b/master is not flat"),
    (header(lambda table: table["b/master"].update(dtype="I32")), "b/master is in I32, not in F32"),
    (header(lambda table: rename(table, "b/master", "b/momentum")), "nothing speaks of b/momentum"),
    (header(lambda table: rename(table, "b/master", "b/buffer")), "nothing speaks of b/buffer"),
    (header(lambda table: rename(table, "b/master", "probe/logits")), "probe/logits holds no logits of 16 tokens"),
]


@pytest.mark.parametrize(("change", "said"), FILES, ids=[said for _, said in FILES])
def test_files_whose_hashes_fit_have_to_fit_each_other(run: Path, change: Callable[[Path], None], said: str) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[9])
    change(folder)
    rehash(folder)
    seen = reason(folder)
    assert seen is not None
    assert said in seen
    with pytest.raises(RequestError, match="is damaged"):
        source.choose(run, None, "halfstep checkpoint export")


def test_pieces_that_leave_a_gap_are_no_model_though_every_rank_fits(run: Path) -> None:
    folder = saved.save(run, PARAMETERS, bounds=[9])
    for name in ("rank-00001.json", "rank-00001.safetensors"):
        shutil.copy(folder / name.replace("00001", "00000"), folder / name)
    rehash(folder)
    assert reason(folder) == "a.weight is there up to element 9 of 12"


# --- links, pipes, devices


def link_out(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/passwd")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("plant", [link_out, pipe, device, folder_instead])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.json", "rank-00000.safetensors"])
def test_what_is_no_regular_file_is_damage_and_nobody_waits_for_it(
    run: Path, plant: Callable[[Path], None], name: str
) -> None:
    folder = saved.save(run, PARAMETERS)
    size = (folder / name).stat().st_size
    plant(folder / name)
    seen = reason(folder)
    assert seen is not None
    assert name in seen
    # A reader that is handed the manifest alone comes to the same.
    good = saved.save(run, PARAMETERS, step=11)
    known = read(good)
    if name != "manifest.json":
        plant(good / name)
        if name.endswith(".json") or plant is not folder_instead:
            assert shards.damaged(good, known, lambda: None) is not None
    assert size


def test_a_file_that_grows_while_it_is_read_is_not_read_to_its_end(run: Path) -> None:
    folder = saved.save(run, PARAMETERS)
    known = read(folder)
    with (folder / "rank-00000.json").open("ab") as file:
        file.write(b" " * 10_000)
    assert shards.damaged(folder, known, lambda: None) == "rank-00000.json is longer than what was written"


def test_a_checkpoint_that_is_a_link_loses_only_its_name_when_it_is_pruned(run: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        saved.save(run, PARAMETERS, step=step)
    elsewhere = tmp_path / "elsewhere"
    oldest = store.home(run) / store.folder_name(10)
    oldest.rename(elsewhere)
    oldest.symlink_to(elsewhere)
    assert store.prune(run, 2, 0) == [10]
    assert not os.path.lexists(oldest)
    assert read(elsewhere).step == 10


# --- a run that prunes while somebody reads


@pytest.fixture
def pruned_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three checkpoints that prunes the oldest as soon as somebody begins to read a content."""
    for step in (10, 20, 30):
        saved.save(run, PARAMETERS, step=step)
    whole = shards.damaged

    def after_pruning(*arguments: Any) -> str | None:
        store.prune(run, 2, 0)
        return whole(*arguments)

    monkeypatch.setattr(shards, "damaged", after_pruning)
    return run


def test_what_the_run_deletes_meanwhile_is_gone_and_not_damaged(
    pruned_meanwhile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(pruned_meanwhile)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "step       10  gone  its run deleted it while it was read"
    assert [line.split()[2] for line in others] == ["OK", "OK"]


def test_a_step_that_is_asked_for_and_goes_meanwhile_is_answered_with_those_that_stand(
    pruned_meanwhile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(pruned_meanwhile), "--step", "10"]) == 2
    assert "there is no checkpoint of step 10" in (said := capsys.readouterr().err)
    assert "take one of 30, 20" in said


def test_an_export_of_what_is_pruned_meanwhile_says_so(pruned_meanwhile: Path) -> None:
    with pytest.raises(RequestError, match="step 10 was deleted while it was read") as caught:
        source.choose(pruned_meanwhile, 10, "halfstep checkpoint export runs/a --to b")
    assert caught.value.fix == "halfstep checkpoint export runs/a --to b, which takes the newest"


def test_a_list_leaves_out_what_goes_between_looking_and_reading(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        saved.save(run, PARAMETERS, step=step)
    whole = manifests.foreign.read_object

    def after_pruning(path: Path) -> dict[str, Any]:
        store_home = store.home(run) / store.folder_name(10)
        if path.parent == store_home:
            shutil.rmtree(store_home)
        return whole(path)

    monkeypatch.setattr(manifests.foreign, "read_object", after_pruning)
    with pytest.raises(Gone):
        read(store.home(run) / store.folder_name(10))
    saved.save(run, PARAMETERS, step=10)
    assert [item.step for item in store.candidates(run)] == [30, 20]
    saved.save(run, PARAMETERS, step=10)
    assert [(row.step, row.state) for row in survey.survey(run)] == [(20, "good"), (30, "good")]


def test_one_that_is_set_aside_and_written_again_meanwhile_is_read_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved.save(run, PARAMETERS)
    (row,) = survey.survey(run)
    whole, calls = shards.damaged, []

    def after_another_start(*arguments: Any) -> str | None:
        calls.append(1)
        if len(calls) == 1:
            folder.rename(folder.with_name("step-00000010.bad-0002"))
            saved.save(run, {**PARAMETERS, "b": np.zeros(7, dtype=np.float32)}, time=2e9)
        return whole(*arguments)

    monkeypatch.setattr(shards, "damaged", after_another_start)
    again = survey.verified(row)
    assert (again.state, again.reason, len(calls)) == ("good", None, 2)
    assert again.manifest is not None
    assert again.manifest.time == 2e9


def test_verifying_beside_a_run_that_saves_and_prunes_finds_nothing_damaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        saved.save(run, PARAMETERS, step=step)
    done = threading.Event()

    def train() -> None:
        for step in range(3, 120):
            saved.save(run, PARAMETERS, step=step)
            store.prune(run, 2, 0)
        done.set()

    thread = threading.Thread(target=train)
    thread.start()
    codes, looks = set(), 0
    while not done.is_set() or looks < 5:
        codes.add(main(["checkpoint", "verify", str(run)]))
        codes.add(main(["checkpoint", "list", str(run)]))
        looks += 1
    thread.join()
    assert codes == {0}
    assert "DAMAGED" not in capsys.readouterr().out
