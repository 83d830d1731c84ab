"""What a plan believes of a corpus: its tokens are hashed, its counts checked, and no file of it can hang or crash."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.pairs import write_pair
from test_data_formats import damaged

from halfstep.launcher import topology
from halfstep.launcher.cli import main
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.corpus import corpus_manifest, file_hash, megatron
from halfstep.launcher.corpus.description import DataFacts, read_data
from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.data.show import inspect, render
from halfstep.launcher.data.tokens import TokenFile
from halfstep.launcher.engine.ranks import reports
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.topology import Rank

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text(Path(json.decoder.__file__).read_text() * 3)
    prepare(str(folder / "a.txt"), folder / "corpus", vocab_size=400, validation=0.1, workers=1, progress=False)
    return folder / "corpus"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def as_before(corpus: Path) -> Path:
    """Take from a manifest what earlier versions did not write."""
    content = json.loads((corpus / MANIFEST).read_text())
    for split in content["splits"].values():
        del split["xxh3"], split["xxh3_sampled"]
    for key in ("checksum", "fidelity"):
        del content[key]
    (corpus / MANIFEST).write_text(json.dumps(content))
    return corpus


def reverse(file: Path, dtype: type = np.uint16) -> None:
    np.fromfile(file, dtype=dtype)[::-1].tofile(file)


def planned(data: Path, **more: str) -> tuple[Request, Plan]:
    request = load(["model=gpt2-nano", f"data={data}", *(f"{key.replace('__', '.')}={v}" for key, v in more.items())])
    plan = resolve(request, topology.describe(2, 2), facts.read(request.spec))
    return request, plan


# --- tokens


def test_reversed_tokens_are_noticed_by_every_start(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, plan = planned(copy)
    run_directory.write_plan(tmp_path / "out", request, plan)
    reverse(copy / "train.bin")
    for verb in (["run", f"out={tmp_path / 'out'}"], ["plan"], ["run", "--dry-run"]):
        assert main.main([*verb, "model=gpt2-nano", f"data={copy}"]) == 2
        assert "train.bin does not hold what was prepared" in capsys.readouterr().err
    assert main.main(["data", "inspect", str(copy)]) == 2


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "validation.idx"])
def test_one_flipped_bit_of_a_small_corpus_is_noticed(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    for at in (0, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[at] ^= 1
        (copy / name).write_bytes(flipped)
        with pytest.raises(RequestError):
            read_data(str(copy))
    (copy / name).write_bytes(content)
    assert read_data(str(copy)).train_tokens


def test_a_corpus_says_the_hash_of_every_byte_and_inspect_reads_them(made: Path) -> None:
    content = json.loads((made / MANIFEST).read_text())
    for name, split in content["splits"].items():
        for ending in ("bin", "idx"):
            assert split["xxh3"][ending] == file_hash.whole(made / f"{name}.{ending}")
            assert split["xxh3"][ending] == split["xxh3_sampled"][ending]  # of a small file all is read
    assert "verified    every byte is what was prepared" in render(inspect(made))


def test_of_a_large_corpus_a_start_reads_a_sample_and_inspect_all(
    copy: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hash, "WHOLE_BYTES", 2**10)
    monkeypatch.setattr(file_hash, "BLOCK_BYTES", 16)
    prepare(str(made.parent / "a.txt"), tmp_path / "large", vocab_size=400, validation=0.1, workers=1, progress=False)
    file = tmp_path / "large" / "train.bin"
    size = file.stat().st_size
    read = {at for start in file_hash._starts(size) for at in range(start, start + 16)}
    assert max(read) == size - 1
    unread = next(at for at in range(size) if at not in read)
    content = bytearray(file.read_bytes())
    content[unread] ^= 1
    file.write_bytes(content)
    assert read_data(str(tmp_path / "large")).train_tokens  # what the page on reliability says: a sample
    with pytest.raises(RequestError, match=r"train\.bin does not hold what was prepared"):
        inspect(tmp_path / "large")
    content[unread] ^= 1
    file.write_bytes(content)
    reverse(file)
    with pytest.raises(RequestError, match=r"train\.bin does not hold what was prepared"):
        read_data(str(tmp_path / "large"))


def test_a_sample_meets_the_ends_and_every_stretch_of_a_hundred_and_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (64 * 2**20 + 1, 10**9 + 7, 10**12 + 1):
        starts = list(file_hash._starts(size))
        assert len(starts) == 256
        assert (starts[0], starts[-1]) == (0, size - file_hash.BLOCK_BYTES)
        assert starts == sorted(starts)
        assert max(b - a for a, b in itertools.pairwise(starts)) < size / 120
        assert all(0 <= start <= size - file_hash.BLOCK_BYTES for start in starts)
        assert starts == list(file_hash._starts(size))
    # They stand in manifests: other places would make every large corpus look like another.
    assert list(file_hash._starts(10**9))[1:4] == GOLDEN_STARTS


GOLDEN_STARTS = [3411257, 6058965, 10028079]


# --- corpora and runs of earlier versions


def test_a_corpus_of_an_earlier_version_keeps_its_digest(corpus: Path, tmp_path: Path) -> None:
    assert read_data(str(corpus)).digest == "d09d3fb0bfada4e0"
    write_pair(tmp_path / "pair", 1000)
    assert read_data(str(tmp_path / "pair")).digest == "ac85ba49c31ad558"


def test_hashes_make_a_corpus_another_one_only_where_they_are(copy: Path, made: Path) -> None:
    assert read_data(str(as_before(copy))).digest != read_data(str(made)).digest
    assert "an earlier version of Halfstep wrote no hashes" in "\n".join(render(inspect(copy)))


@pytest.mark.parametrize("kind", ["pair", "folder"])
def test_a_run_on_tokens_without_hashes_notices_that_they_changed(
    kind: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = as_before(copy) if kind == "folder" else copy / "train"
    more = {} if kind == "folder" else {"model__vocabulary": "400"}
    out = tmp_path / "out"
    run_directory.write_plan(out, *planned(data, **more))
    run_directory.write_plan(out, *planned(data, **more))  # the same once more
    before = planned(data, **more)[1]
    reverse(copy / "train.bin")
    after = planned(data, **more)[1]
    assert (after.run_id, after.data.digest) == (before.run_id, before.data.digest)
    with pytest.raises(RequestError, match=r"are not those that the run in .* was planned for"):
        run_directory.write_plan(out, *planned(data, **more))
    arguments = ["run", "model=gpt2-nano", f"data={data}", f"out={out}", *(["model.vocabulary=400"] if more else [])]
    assert main.main(arguments) == 2
    assert "are not those that the run" in capsys.readouterr().err
    # And where the directory alone is named, at the roll call.
    rank = Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, source="by hand")
    assert "holds another corpus" in (reports.report(rank, before, ("127.0.0.1", 1), None).problem or "")
    assert reports.report(rank, after, ("127.0.0.1", 1), None).problem is None


def test_a_run_of_an_earlier_version_resumes(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request, plan = planned(as_before(copy))
    run_directory.write_plan(out, request, plan)
    tree = json.loads((out / "plan.json").read_text())
    del tree["data"]["tokens_digest"]
    (out / "plan.json").write_text(json.dumps(tree))
    assert Run(out).plan.data.tokens_digest is None
    run_directory.write_plan(out, *planned(copy))
    assert Run(out).plan.data.tokens_digest == plan.data.tokens_digest


def test_what_was_passed_over_makes_no_other_corpus(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text(Path(json.decoder.__file__).read_text())
    digests = set()
    for out in ("one", "two"):
        prepare(str(source), tmp_path / out, vocab_size=400, workers=1, progress=False)
        digests.add(read_data(str(tmp_path / out)).digest)
        (source / ".hidden").write_text("since then")
    assert len(digests) == 1


# --- counts that cannot be


def rewrite(corpus: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> None:
    content = json.loads((corpus / MANIFEST).read_text())
    change(content)
    if sealed and "checksum" in content:
        content["checksum"] = corpus_manifest.checksum(content)
    (corpus / MANIFEST).write_text(json.dumps(content))


def change(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (
            change("splits", "train", "tokens", value=10**9),
            "train claims 1000000000 tokens, which take 2000000000 bytes",
        ),
        (change("splits", "train", "tokens", value=10), "train claims 10 tokens, which take 20 bytes as uint16"),
        (change("splits", "train", "tokens", value=-1), "splits.train.tokens: Input should be greater than or equal"),
        (change("splits", "train", "tokens", value=1e3), "splits.train.tokens: Input should be a valid integer"),
        (change("splits", "train", "tokens", value=True), "splits.train.tokens: Input should be a valid integer"),
        (change("splits", "train", "documents", value=7), "the manifest of"),
        (change("splits", "train", "prefix", value="../train"), "splits.train.prefix: String should match pattern"),
        (change("splits", "train", "prefix", value="/etc/passwd"), "splits.train.prefix: String should match pattern"),
        (change("splits", "train", "prefix", value="validation"), "validation.bin has"),
        (change("tokenizer", "path", value=".."), "tokenizer.path: String should match pattern"),
        (change("tokenizer", "vocabulary", value=5), "max_token_id"),
        (change("tokenizer", "end_of_text", value=400), "end_of_text 400 is outside the vocabulary of 400"),
        (change("token_dtype", value="int32"), "train claims"),
        (change("token_dtype", value="float32"), "token_dtype: Input should be 'uint16' or 'int32'"),
        (change("splits", value=[]), "splits: Input should be"),
        (change("format", value=2), "the manifest is of kind 'halfstep-data' and format 2"),
    ],
)
@pytest.mark.parametrize("version", ["now", "before"])
def test_a_manifest_that_claims_what_is_not_there_is_refused_by_the_plan(
    copy: Path, changed: Callable[[dict[str, Any]], None], what: str, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if version == "before":
        as_before(copy)
    rewrite(copy, changed)
    assert main.main(["plan", "model=gpt2-nano", f"data={copy}"]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert len(said.splitlines()) == 3


def test_a_manifest_that_was_edited_is_refused(copy: Path) -> None:
    rewrite(copy, change("tokenizer", "vocabulary", value=4000), sealed=False)
    with pytest.raises(RequestError, match="the manifest is damaged: it was changed after it was written"):
        read_data(str(copy))


def pair(prefix: Path, lengths: list[int], *, starts: list[int] | None = None, ends: list[int] | None = None) -> Path:
    """Write a Megatron pair of uint16 sequences, as its index says or otherwise."""
    np.arange(sum(lengths), dtype=np.uint16).tofile(f"{prefix}.bin")
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2 if lengths else []
    ends = [0, *range(1, len(lengths) + 1)] if ends is None else ends
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(ends))
    index += np.array(lengths, dtype=np.int32).tobytes()
    index += np.array(offsets if starts is None else starts, dtype=np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(index + np.array(ends, dtype=np.int64).tobytes())
    return prefix


def test_an_empty_sequence_anywhere_is_no_harm(tmp_path: Path) -> None:
    for number, lengths in enumerate([[5, 0], [0, 5], [2, 0, 0, 3], [5, 0, 0]]):
        prefix = pair(tmp_path / f"p{number}", lengths)
        assert read_data(str(prefix)).train_tokens == TokenFile(prefix).tokens == 5


def test_an_index_of_many_sequences_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_CHUNK", 3)
    lengths = [4, 0, 3, 1, 5, 2, 0, 7]
    assert megatron.read_pair(pair(tmp_path / "p", lengths)).tokens == sum(lengths)
    starts = [0, 8, 8, 14, 16, 26, 30, 32]
    with pytest.raises(
        RequestError, match=r"puts sequence 7 at byte 32 of the \.bin, and the one before it ends at byte 30"
    ):
        megatron.read_pair(pair(tmp_path / "p", lengths, starts=starts))


@pytest.mark.parametrize(
    ("lengths", "more", "what"),
    [
        # The last lies in the middle: read from its offset, every token would be twice as wide.
        (
            [4, 4, 4],
            {"starts": [0, 16, 8]},
            "puts sequence 1 at byte 16 of the .bin, and the one before it ends at byte 8",
        ),
        ([4, 4], {"starts": [8, 0]}, "puts sequence 0 at byte 8 of the .bin"),
        ([4, 4], {"starts": [0, 0]}, "puts sequence 1 at byte 0"),
        ([4, 4], {"ends": [0, 2, 1]}, "document boundaries that are not in order"),
        ([4, 4], {"ends": [0, 3]}, "document boundaries that are not in order"),
        ([0, 0], {}, "there are no tokens in it"),
        ([], {}, "there are no tokens in it"),
    ],
)
def test_an_index_that_does_not_account_for_every_token_is_refused(
    tmp_path: Path, lengths: list[int], more: dict[str, Any], what: str
) -> None:
    prefix = pair(tmp_path / "p", lengths, **more)
    for read in (lambda: read_data(str(prefix)), lambda: TokenFile(prefix)):
        with pytest.raises(RequestError, match=what):
            read()


def test_an_index_with_a_negative_length_or_bytes_too_many_is_refused(tmp_path: Path) -> None:
    index = pair(tmp_path / "p", [4, 4]).with_suffix(".idx")
    good = index.read_bytes()
    index.write_bytes(good[:34] + struct.pack("<i", -4) + good[38:])
    with pytest.raises(RequestError, match="gives sequence 0 a length of -4 tokens"):
        read_data(str(tmp_path / "p"))
    index.write_bytes(good + bytes(5))
    with pytest.raises(RequestError, match="its counts are wrong"):
        read_data(str(tmp_path / "p"))
    index.write_bytes(good + bytes(2))  # Megatron's modes of multimodal sequences
    assert read_data(str(tmp_path / "p")).train_tokens == 8
    index.write_bytes(good[:18] + struct.pack("<QQ", 2**62, 3) + good[34:])
    with pytest.raises(RequestError, match="it is half-written"):
        read_data(str(tmp_path / "p"))


# --- files that are no files


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something takes too long: it hangs."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def sparse(file: Path) -> None:
    with file.open("r+b") as content:
        content.truncate(2**40)


def deep(file: Path) -> None:
    file.write_text('{"kind": ' + "[" * 100_000)


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def huge_number(file: Path) -> None:
    file.write_text('{"format": ' + "9" * 5000 + "}")


@pytest.mark.parametrize("name", [MANIFEST, "train.bin", "train.idx", "validation.bin", "tokenizer/tokenizer.model"])
@pytest.mark.parametrize("damage", [fifo, endless, sparse, deep, loop, folder, huge_number])
def test_no_file_of_a_corpus_can_hang_or_crash_a_plan(
    copy: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / name)
    with within(20):
        for data in (copy, copy / "train"):
            if data == copy or name.startswith("train"):
                assert main.main(["plan", "model=gpt2-nano", "model.vocabulary=400", f"data={data}"]) == 2
                assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "**", "[", "a\0b"])
def test_a_path_that_no_system_takes_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        read_data(str(tmp_path / name))


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_half_of_a_pair_and_a_pair_by_its_files_name_are_told(tmp_path: Path, ending: str) -> None:
    prefix = pair(tmp_path / "p", [4])
    with pytest.raises(RequestError, match=f"p.{ending} is one file of a Megatron pair") as refused:
        read_data(f"{prefix}.{ending}")
    assert read_data(refused.value.fix.split("data=")[1]).train_tokens == 4
    prefix.with_suffix(f".{ending}").unlink()
    with pytest.raises(RequestError, match="of a Megatron pair only p"):
        read_data(str(prefix))


# --- mutations

NASTY: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", "/dev/zero",
    "a" * 5000, "\ud800", "\x00", "1", [], [1], {}, {"x": 1}, [[[[]]]],
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutated(draw: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    tree = json.loads(json.dumps(content))
    path = draw.choice(list(places(tree)))
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    if draw.random() < 0.2:
        del inside[path[-1]]
    else:
        inside[path[-1]] = draw.choice(NASTY)
    return tree


@pytest.mark.parametrize("version", ["now", "before"])
def test_mutated_manifests_are_refused_or_change_nothing(copy: Path, version: str) -> None:
    if version == "before":
        as_before(copy)
    draw, content, good = random.Random(version), json.loads((copy / MANIFEST).read_text()), read_data(str(copy))
    refused = accepted = 0
    with within(120):
        for number in range(1200):
            tree = mutated(draw, content)
            if number % 2 and "checksum" in tree:
                tree["checksum"] = corpus_manifest.checksum(tree) if _canonical(tree) else ""
            (copy / MANIFEST).write_text(json.dumps(tree))
            try:
                after = read_data(str(copy))
                render(inspect(copy)) if number % 40 == 0 else None
            except RequestError as error:
                refused += len(str(error).splitlines()) == 3
                continue
            assert _tokens(after) == _tokens(good)
            accepted += 1
    assert refused + accepted == 1200
    assert refused > 600


def _canonical(tree: dict[str, Any]) -> bool:
    try:
        corpus_manifest.checksum(tree)
    except ValueError:
        return False
    return True


def _tokens(data: DataFacts) -> tuple[Any, ...]:
    return data.train_prefix, data.train_tokens, data.validation_tokens, data.tokens_digest, data.tokenizer


@pytest.mark.parametrize("version", ["now", "before", "pair"])
def test_mutated_bytes_are_refused_or_change_nothing_that_is_said(copy: Path, version: str) -> None:
    data = copy / "train" if version == "pair" else copy
    if version == "before":
        as_before(copy)
    good = read_data(str(data))
    names = ["train.bin", "train.idx"] + ([] if version == "pair" else ["validation.idx", "tokenizer/tokenizer.model"])
    draw = random.Random(version)
    with within(120):
        for _ in range(1500):
            file = copy / draw.choice(names)
            content = file.read_bytes()
            file.write_bytes(damaged(draw, content))
            with contextlib.suppress(RequestError):
                after = read_data(str(data))
                assert version != "now" or after == good
                # Whoever was planned with the old ones hears of it.
                assert after.digest != good.digest or after.tokens_digest != good.tokens_digest or after == good
                TokenFile(data if version == "pair" else copy / "train")
            file.write_bytes(content)
