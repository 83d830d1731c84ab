"""A corpus folder: right in every byte it promises, there whole or not at all, and explained when it cannot be made."""

import contextlib
import inspect as python_inspect
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.data import encode, progress_bar, readers, tokenizer
from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.data.show import inspect, render
from halfstep.launcher.data.tokens import TokenFile
from halfstep.launcher.errors import RequestError

TEXTS = [python_inspect.getsource(module) for module in (json.decoder, random, textwrap, python_inspect)]
TEXT_FILE = Path(json.decoder.__file__)
OPTIONS: dict[str, Any] = {"vocab_size": 512, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "new" / "corpus"
    prepare(str(source), out, **OPTIONS)
    return out


def refusal(source: str | Path, out: Path, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        prepare(str(source), out, **{**OPTIONS, **options})
    assert "\n" not in refused.value.what + refused.value.where + refused.value.fix
    return refused.value


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_is_true_in_every_number(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert sorted(contents(made)) == [
        "manifest.json", "tokenizer/tokenizer.model", "train.bin", "train.idx", "validation.bin", "validation.idx",
    ]  # fmt: skip
    assert (manifest["format"], manifest["kind"], manifest["token_dtype"]) == (1, "halfstep-data", "uint16")
    assert manifest["source"]["files"] == manifest["source"]["documents"] == 4
    assert manifest["source"]["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert (manifest["tokenizer"]["vocabulary"], manifest["tokenizer"]["kind"]) == (512, "sentencepiece")
    largest = 0
    for name, split in manifest["splits"].items():
        file = TokenFile(made / name, vocabulary=512)
        assert (file.tokens, file.documents) == (split["tokens"], split["documents"])
        assert split["bytes"] == {end: (made / f"{name}.{end}").stat().st_size for end in ("bin", "idx")}
        largest = max(largest, *file.slice(0, file.tokens))
    assert manifest["max_token_id"] == largest
    facts = read_data(str(made))
    assert (facts.train_tokens, facts.vocabulary) == (manifest["splits"]["train"]["tokens"], 512)


def test_the_tokens_are_the_text_with_an_end_after_each_document(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    loaded = tokenizer.load(made / "tokenizer", "sentencepiece")
    whole = {name: TokenFile(made / name).slice(0, split["tokens"]) for name, split in manifest["splits"].items()}
    parts = {name: _documents(ids, loaded.end_of_text) for name, ids in whole.items()}
    # Every document is there, whole in the training split or with its tail in the other.
    heads = [loaded.decode(ids) for ids in parts["train"]]
    tails = [loaded.decode(ids) for ids in parts["validation"]]
    for text, head in zip(TEXTS, heads, strict=True):
        assert text == head or any(text == head + tail for tail in tails)
    held, total = len(whole["validation"]), len(whole["train"]) + len(whole["validation"])
    assert held == round(0.01 * sum(len(loaded.encode(text)) + 1 for text in TEXTS))
    assert total == sum(len(loaded.encode(text)) + 1 for text in TEXTS) + len(tails)


def _documents(ids: list[int], end_of_text: int) -> list[list[int]]:
    assert ids[-1] == end_of_text
    cuts = [-1, *np.flatnonzero(np.array(ids) == end_of_text).tolist()]
    return [ids[start + 1 : stop] for start, stop in itertools.pairwise(cuts)]


def test_any_number_of_workers_and_any_size_of_pieces_makes_the_same_folder(
    made: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 2000)
    prepare(str(source), tmp_path / "corpus", **{**OPTIONS, "workers": 3})
    assert contents(tmp_path / "corpus") == contents(made)


def test_the_same_request_again_does_nothing(made: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    manifest = prepare(str(source), made, **{**OPTIONS, "progress": True})
    assert manifest == json.loads((made / "manifest.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert capsys.readouterr().err == f"{made} holds this corpus already: nothing to do\n"


def test_a_folder_that_holds_something_else_is_left_alone(made: Path, source: Path, tmp_path: Path) -> None:
    error = refusal(source, made, vocab_size=600, seed=1)
    assert error.what == f"{made} holds another corpus; different: vocab size 512, asked 600; seed 0, asked 1"
    assert refusal(TEXT_FILE, made).what.endswith("different: the files of the source")
    (tmp_path / "mine").write_text("precious")
    assert refusal(source, tmp_path).what == f"{tmp_path} exists and is not a corpus that Halfstep made"
    assert (tmp_path / "mine").read_text() == "precious"


def test_one_file_is_enough_for_both_splits(tmp_path: Path) -> None:
    manifest = prepare(str(TEXT_FILE), tmp_path / "corpus", **OPTIONS)
    splits = manifest["splits"]
    total = splits["train"]["tokens"] + splits["validation"]["tokens"] - 1
    assert splits["validation"]["tokens"] == round(0.01 * total)


def test_a_hugging_face_tokenizer_is_used_as_it_is(source: Path, tmp_path: Path) -> None:
    from test_data_tokenizer import make_huggingface

    name = str(make_huggingface(tmp_path / "tokenizer", "<|eot|>"))
    out = tmp_path / "corpus"
    manifest = prepare(str(source), out, tokenizer=name, workers=2, progress=False)
    assert (manifest["tokenizer"]["kind"], manifest["tokenizer"]["vocabulary"]) == ("huggingface", 300)
    assert manifest["tokenizer"]["name"] == name
    assert inspect(out)["samples"]["train"]
    error = refusal(source, tmp_path / "other", tokenizer=name, vocab_size=512)
    assert error.what == "the tokenizer has a vocabulary of 300, not 512"


def test_a_large_vocabulary_is_stored_in_four_bytes(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("halfstep.launcher.data.prepare._UINT16_VOCABULARY", 511)
    manifest = prepare(str(source), tmp_path / "corpus", **OPTIONS)
    assert manifest["token_dtype"] == "int32"
    assert manifest["splits"]["train"]["bytes"]["bin"] == 4 * manifest["splits"]["train"]["tokens"]
    assert TokenFile(tmp_path / "corpus" / "train").dtype is np.int32


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"vocab_size": None}, "nothing says how to tokenise"),
        ({"vocab_size": 0}, "a vocabulary of 0 tokens holds nothing"),
        ({"validation": 0.0}, "0.0 of the tokens cannot be held back for validation"),
        ({"validation": 0.5}, "0.5 of the tokens cannot be held back for validation"),
        ({"workers": 0}, "0 processes do no work"),
        ({"vocab_size": 10**6}, "this text has too little in it for 1000000 tokens"),
    ],
)
def test_an_impossible_request_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    assert refusal(source, tmp_path / "corpus", **options).what.startswith(what)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_and_a_source_without_text_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" \n")
    assert refusal(tmp_path / "a.txt", tmp_path / "corpus").what == "a.txt is empty"
    assert refusal(tmp_path / "*.txt", tmp_path / "corpus").what == "there is no text in any of its files"


def test_a_bad_line_deep_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS * 3]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{}", *lines]))
    assert refusal(tmp_path / "a.jsonl", tmp_path / "corpus", workers=2).where == f"{tmp_path / 'a.jsonl'}, line 13"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "corpus", **{**OPTIONS, "progress": interrupt})
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])

    def grow(stage: str, done: int, total: int | None) -> None:
        if stage == "training the tokenizer":
            (tmp_path / "a.txt").write_text(TEXTS[1])

    assert refusal(tmp_path / "a.txt", tmp_path / "corpus", progress=grow).what == (
        "the source changed while it was read"
    )


def run_apart(body: str) -> subprocess.Popen[str]:
    """Start a Python process of its own group that has `prepare` at hand."""
    script = "import os, resource, signal, sys\nfrom halfstep.launcher.data.prepare import prepare\n" + textwrap.dedent(
        body
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


def living(group: int) -> list[int]:
    """Return the processes of a group that still run; a zombie does not."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            pids.append(int(stat.parent.name))
    return pids


def test_a_killed_preparation_leaves_no_folder_no_process_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 30))
    process = run_apart(
        f"""
        def report(stage, done, total):
            if stage == "tokenising" and done > 2_500_000:
                os.kill(os.getpid(), signal.SIGKILL)
        prepare({str(tmp_path / "a.jsonl")!r}, {str(tmp_path / "corpus")!r}, vocab_size=512, workers=2, progress=report)
        """
    )
    try:
        assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while living(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert living(process.pid) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "corpus").exists()
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].endswith(f"-{process.pid}")
    with pytest.raises(RequestError, match="was never finished"):
        inspect(tmp_path / "corpus")

    (tmp_path / "corpus.partial-another.host-1").mkdir()
    prepare(str(TEXT_FILE), tmp_path / "corpus", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "corpus", "corpus.partial-another.host-1"}


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    # A limit on the size of a file meets the same code as a disk without room, and needs no disk of its own.
    process = run_apart(
        f"""
        from halfstep.launcher.errors import RequestError
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            prepare({str(source)!r}, {str(tmp_path / "corpus")!r}, vocab_size=512, workers=1, progress=False)
        except RequestError as error:
            print(error)
        """
    )
    said, errors = process.communicate()
    assert said.splitlines()[0] == "error: there is no room for it: File too large"
    assert said.splitlines()[1] == f" from: --out {tmp_path / 'corpus'}"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(source: Path) -> None:
    assert refusal(source, Path("/proc/halfstep/corpus")).what.startswith("/proc/halfstep/corpus cannot be written")


def test_inspect_shows_counts_and_a_decoded_sample(made: Path) -> None:
    counts = inspect(made)
    lines = render(counts)
    assert counts["samples"]["train"] in "".join(TEXTS)
    assert lines[0].startswith("source      ")
    assert any(line.startswith("bytes/token ") for line in lines)
    tokens = counts["splits"]["train"]["tokens"]
    assert f"train       {tokens:,} tokens, 4 documents" in "\n".join(lines)
    assert "--- from the middle of validation" in lines


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: (p / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda p: (p / "train.bin").write_bytes(b""), "train.bin has 0 bytes, the manifest says"),
        (lambda p: (p / "validation.idx").unlink(), "validation.idx is missing"),
        (lambda p: (p / "tokenizer" / "tokenizer.model").write_bytes(b"x"), "made with another tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_by_inspect_and_not_taken_for_done(
    made: Path, source: Path, tmp_path: Path, damage: Any, what: str
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(made, copy)
    damage(copy)
    with pytest.raises(RequestError, match=what):
        inspect(copy)
    with pytest.raises(RequestError):
        prepare(str(source), copy, **OPTIONS)


def test_progress_in_a_file_is_plain_lines(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bar, "_LINE_EVERY_SECONDS", 0.0)
    prepare(str(source), tmp_path / "corpus", **{**OPTIONS, "progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0] for line in lines} == {"reading", "training the tokenizer", "tokenising"}
    assert all(line.isprintable() for line in lines)


def test_a_preparation_that_is_soon_over_says_nothing_on_the_way(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bar, "_LINE_EVERY_SECONDS", 3600.0)
    prepare(str(source), tmp_path / "corpus", **{**OPTIONS, "progress": True})
    assert capsys.readouterr().err == ""
