"""Examples on disk: tokens and targets of what was written, whole and in their split, and what is refused of rows."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fakes.examples import drawn, write_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.test_chat import CHATML, INSTRUCTION, TEXT, made, unmarked

from halfstep.launcher.cli.main import main
from halfstep.launcher.corpus import hub, megatron
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.data import chat, tokenizer, train_tokenizer
from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.data.show import inspect, render
from halfstep.launcher.data.split import validation_documents
from halfstep.launcher.data.tokens import TokenFile
from halfstep.launcher.errors import RequestError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"How much is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(30)
] + [{"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)},
                   {"role": "user", "content": "again"}, {"role": "assistant", "content": f"{n} {n}"}]}
     for n in range(10)]  # fmt: skip
OPTIONS: dict[str, Any] = {"format": "sft", "workers": 1, "progress": False, "validation": 0.1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.train([TEXT], 512).save(folder)
    return folder


def lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def documents(out: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """Return the ids and marks of each document on disk."""
    file, mask = TokenFile(out / split), TokenFile(out / f"{split}.mask")
    ends = np.cumsum(megatron.document_lengths(out / split)).tolist()
    assert megatron.document_lengths(out / f"{split}.mask").tolist() == megatron.document_lengths(out / split).tolist()
    return [(file.slice(begin, end), mask.slice(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("template", ["chatml", "alpaca", "plain"])
def test_every_row_is_one_document_and_its_targets_are_the_assistants(
    tmp_path: Path, trained: Path, template: str, targets: str
) -> None:
    source = lines(tmp_path / "rows.jsonl", ROWS)
    manifest = prepare(
        str(source), tmp_path / "out", tokenizer=str(trained), template=template, targets=targets, **OPTIONS
    )
    layout = chat.named(template, tokenizer.named(str(trained)))
    expected = []
    for row in ROWS:
        ids, marks = layout.encode(messages_of(row), targets)
        expected.append((ids, [0, *marks[1:]]))
    both = {name: documents(tmp_path / "out", name) for name in ("train", "validation")}
    assert sorted(both["train"] + both["validation"]) == sorted(expected)
    assert [pair for pair in expected if pair in both["train"]] == both["train"], "in the order of the source"
    assert manifest["examples"] == {
        "template": template, "targets": targets, "without_targets": 0, "longest": max(len(ids) for ids, _ in expected),
    }  # fmt: skip
    for name, pairs in both.items():
        split = manifest["splits"][name]
        assert split["targets"] == sum(sum(marks) for _, marks in pairs)
        assert (split["tokens"], split["documents"]) == (sum(len(ids) for ids, _ in pairs), len(pairs))
    assert 0 < manifest["splits"]["validation"]["tokens"] <= 0.1 * sum(len(ids) for ids, _ in expected)
    facts = read_data(str(tmp_path / "out"))
    assert facts.train_lengths is not None
    assert sum(count for _, count in facts.train_lengths) == len(both["train"])
    assert sum(length * count for length, count in facts.train_lengths) == facts.train_tokens


def test_all_that_can_hold_rows_gives_the_same_corpus(tmp_path: Path, trained: Path) -> None:
    rows = [{"messages": messages_of(row)} for row in ROWS]
    lines(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    outs = []
    for source in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        out = tmp_path / f"out-{source[0]}"
        options = {**OPTIONS, "workers": 2} if source == "a.jsonl" else OPTIONS
        prepare(str(tmp_path / source), out, tokenizer=str(trained), template="chatml", **options)
        outs.append({file.name: file.read_bytes() for file in out.iterdir() if file.suffix in (".bin", ".idx")})
    assert len(outs[0]) == 8
    assert outs[0] == outs[1] == outs[2]


def test_the_tokenizers_own_template_is_the_default_where_it_has_one(tmp_path: Path, trained: Path) -> None:
    library = made(unmarked(CHATML)).library
    library.save_pretrained(tmp_path / "own")
    source = lines(tmp_path / "rows.jsonl", ROWS)
    manifest = prepare(str(source), tmp_path / "out", tokenizer=str(tmp_path / "own"), **OPTIONS)
    assert manifest["examples"]["template"] == "tokenizer"
    ids = [ids for ids, _ in documents(tmp_path / "out", "train") + documents(tmp_path / "out", "validation")]
    assert sorted(ids) == sorted(
        library.apply_chat_template(messages_of(row), tokenize=True)["input_ids"] for row in ROWS
    )
    assert (
        prepare(str(source), tmp_path / "other", tokenizer=str(trained), **OPTIONS)["examples"]["template"] == "plain"
    )


def test_without_a_tokenizer_one_is_trained_on_what_the_template_writes(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", ROWS)
    manifest = prepare(str(source), tmp_path / "out", vocab_size=340, template="chatml", **OPTIONS)
    loaded = tokenizer.load(tmp_path / "out" / "tokenizer", "sentencepiece")
    assert (manifest["tokenizer"]["vocabulary"], loaded.vocabulary) == (340, 340)
    assert len(loaded.encode("<|im_start|>assistant")) < len("<|im_start|>assistant") // 2


def test_inspect_shows_an_example_with_its_targets_and_reads_every_byte_of_the_mask(
    tmp_path: Path, trained: Path
) -> None:
    out = tmp_path / "out"
    prepare(str(lines(tmp_path / "rows.jsonl", ROWS)), out, tokenizer=str(trained), template="chatml", **OPTIONS)
    shown = render(inspect(out))
    assert "examples    template chatml, targets are all turns of the assistant; the longest has " in "\n".join(shown)
    assert "--- from the middle of train, targets in [[]]" in shown
    place = shown.index("--- from the middle of train, targets in [[]]")
    assert shown[place + 1] == "<|im_start|>user"
    assert any(line.startswith("[[It is ") and line.endswith(".<|im_end|><end of text>]]") for line in shown[place:])
    content = bytearray((out / "train.mask.bin").read_bytes())
    content[7] ^= 1
    (out / "train.mask.bin").write_bytes(content)
    with pytest.raises(RequestError, match=r"train\.mask\.bin does not hold what was prepared"):
        read_data(str(out))


def test_examples_and_documents_that_repeat_are_counted_and_kept(tmp_path: Path, trained: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", [*ROWS, ROWS[0], ROWS[-1], ROWS[0]])
    manifest = prepare(str(source), tmp_path / "out", tokenizer=str(trained), **OPTIONS)
    assert (manifest["source"]["duplicates"], manifest["source"]["documents"]) == (3, 43)
    assert "duplicates  3 that repeat an earlier document; all are kept" in render(manifest)
    for name, text in (("a", "the same\n" * 50), ("b", "the same\n" * 50), ("c", "another\n" * 50)):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = prepare(str(tmp_path / "[abc].txt"), tmp_path / "text", tokenizer=str(trained), workers=1, progress=False)
    assert (texts["source"]["duplicates"], texts["source"]["documents"]) == (1, 3)
    assert "examples" not in texts


# --- what is refused -------------------------------------------------------------------------------------------------

USER, EMPTY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": " "}
BAD = {
    "the completion of line 2 is empty": {"prompt": "a", "completion": ""},
    "message 2 of line 2, a completion, is empty": {"messages": [USER, EMPTY]},
    "line 2 has neither messages nor prompt and completion, but 'text', 'id'": {"text": "a", "id": 3},
    "line 2 has neither messages nor prompt and completion, but 'prompt'": {"prompt": "a"},
    "line 2 has both messages and prompt or completion": {"messages": [USER], "prompt": "a"},
    "message 1 of line 2 has the role 'human'; roles are system, user, assistant, tool": {
        "messages": [{"role": "human", "content": "hello"}]
    },
    "the content of message 1 of line 2 is list, not text": {"messages": [{"role": "user", "content": ["a"]}]},
    "the messages of line 2 are no list of messages": {"messages": "hello"},
    "message 1 of line 2 is no object with role and content": {"messages": ["hello"]},
    "prompt and completion of line 2 are not both text": {"prompt": 3, "completion": "a"},
    "line 2 has tools, which no template is given": {"messages": [USER], "tools": [{"name": "search"}]},
    "line 2: message 2 has tool_calls, which the template plain does not write": {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    },
    "line 2: message 3 has tool_calls, which the template plain does not write": {
        "messages": [
            USER,
            {"role": "assistant", "content": "hi"},
            {"role": "assistant", "content": "let me", "tool_calls": [{"function": {"name": "f"}}]},
        ]
    },
    "message 2 of line 2 has the weight 0, and every target counts alike": {
        "messages": [USER, {"role": "assistant", "content": "hi", "weight": 0}]
    },
    "line 2: the template plain has no place for the role 'system' here: it knows user and assistant": {
        "messages": [{"role": "system", "content": "be nice"}, USER, {"role": "assistant", "content": "hi"}]
    },
}


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_is_no_example_is_refused_by_name_or_counted(tmp_path: Path, trained: Path, what: str) -> None:
    source = lines(tmp_path / "rows.jsonl", [ROWS[0], BAD[what], *ROWS[1:]])
    options = {**OPTIONS, "tokenizer": str(trained), "template": "plain"}
    with pytest.raises(RequestError) as refused:
        prepare(str(source), tmp_path / "out", **options)
    assert refused.value.what == what
    assert refused.value.where.startswith(f"{source}, line 2")
    assert "--skip-bad" in refused.value.fix
    manifest = prepare(str(source), tmp_path / "out", skip_bad=True, **options)
    assert manifest["source"]["bad_rows"]["count"] == 1
    assert what in manifest["source"]["bad_rows"]["examples"][0]
    assert manifest["source"]["documents"] == 40


def test_a_role_that_the_tokenizers_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    made(unmarked(INSTRUCTION)).library.save_pretrained(tmp_path / "own")
    row = {"messages": [{"role": "system", "content": "be nice"}, USER, {"role": "assistant", "content": "hi"}]}
    source = lines(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(RequestError) as refused:
        prepare(str(source), tmp_path / "out", tokenizer=str(tmp_path / "own"), **OPTIONS)
    assert refused.value.what == "line 2: the template refuses it: System role not supported"
    with pytest.raises(RequestError, match="all 1 rows were left out as bad, the first: "):
        prepare(
            str(lines(tmp_path / "bad.jsonl", [row])),
            tmp_path / "out",
            tokenizer=str(tmp_path / "own"),
            skip_bad=True,
            **OPTIONS,
        )


def test_a_corpus_in_which_nobody_answers_is_refused(tmp_path: Path, trained: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", [{"messages": [USER]}] * 3)
    with pytest.raises(RequestError) as refused:
        prepare(str(source), tmp_path / "out", tokenizer=str(trained), **OPTIONS)
    assert refused.value.what == "none of the 3 examples has a target: the assistant says nothing in them"
    both = lines(tmp_path / "rows.jsonl", [{"messages": [USER]}, *ROWS])
    assert prepare(str(both), tmp_path / "out", tokenizer=str(trained), **OPTIONS)["examples"]["without_targets"] == 1


def test_options_that_cannot_be_are_refused_in_three_lines(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.txt").write_text("no examples")
    base = ["data", "prepare", "--out", str(tmp_path / "out"), "--tokenizer", str(trained)]
    for options, what in (
        (["--source", str(source), "--format", "sft", "--template", "tokenizer"], "has no chat template of its own"),
        (["--source", str(source), "--template", "plain"], "--template is about conversations, and these are read as"),
        (["--source", str(source), "--targets", "last"], "--targets is about conversations, and these are read as"),
        (["--source", str(tmp_path / "rows.txt"), "--format", "sft"], "rows.txt holds no examples by its name"),
        (["--source", str(source), "--format", "sft", "--field", "prompt"], "examples are read by the fields messages"),
        (["--source", "stdlib", "--format", "sft"], "the standard library is text, and no examples of what to answer"),
    ):
        assert main([*base, *options]) == 2
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 3
        assert what in shown[0]
    trains = ["data", "prepare", "--out", str(tmp_path / "out"), "--vocab-size", "300", "--format", "sft"]
    assert main([*trains, "--source", str(source), "--template", "tokenizer"]) == 2
    assert "has no chat template of its own" in capsys.readouterr().err.splitlines()[0]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    data=st.data(),
    fraction=st.floats(0.001, 0.3),
    seed=st.integers(0, 2**32),
)
def test_whole_examples_are_held_back(lengths: list[int], data: st.DataObject, fraction: float, seed: int) -> None:
    candidates = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    held = validation_documents(np.array(lengths), candidates, fraction, seed)
    assert all(each in (0, length) for each, length in zip(held.tolist(), lengths, strict=True))
    assert not held[~candidates].any()
    if candidates.sum() >= 2:
        assert 0 < np.count_nonzero(held) < candidates.sum()
        count = np.count_nonzero(held)
        assert count == 1 or held.sum() <= max(1, round(fraction * sum(lengths)))
    else:
        assert not held.any()


def test_rows_of_a_hub_are_examples_too(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        return ROWS

    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare("hub:owner/name:test", tmp_path / "hub", tokenizer=str(trained), **OPTIONS)
    prepare(str(lines(tmp_path / "rows.jsonl", ROWS)), tmp_path / "file", tokenizer=str(trained), **OPTIONS)
    assert set(asked) == {("owner/name", None, "test", True)}
    for split in ("train", "validation"):
        assert documents(tmp_path / "hub", split) == documents(tmp_path / "file", split)


def test_damage_to_any_file_of_examples_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    folder = write_examples(tmp_path / "a", drawn([5, 9, 3, 12, 30], 1), drawn([5, 4], 2))
    good, draw = read_data(str(folder)), random.Random(1)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".idx"))
    assert len(files) == 8
    refused = 0
    for number in range(400):
        file = files[number % 8]
        content = bytearray(before := file.read_bytes())
        if number % 3:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        file.write_bytes(bytes(content))
        with pytest.raises(RequestError):
            read_data(str(folder))
        refused += 1
        file.write_bytes(before)
    assert refused == 400
    assert read_data(str(folder)) == good


def test_a_manifest_whose_mask_contradicts_it_is_refused(tmp_path: Path) -> None:
    folder = write_examples(tmp_path / "a", drawn([5, 9, 3], 1), drawn([5], 2))
    content = json.loads((folder / "manifest.json").read_text())
    train = content["splits"]["train"]
    for changed, what in (
        ({key: value for key, value in train.items() if key != "mask"}, "train has no mask of targets"),
        ({**train, "targets": 18}, "train claims 18 targets among 17 tokens"),
        ({**train, "mask": {**train["mask"], "prefix": "validation.mask"}}, "the mask of train is validation.mask"),
    ):
        (folder / "manifest.json").write_text(
            json.dumps({**content, "splits": {**content["splits"], "train": changed}})
        )
        with pytest.raises(RequestError, match=what):
            read_data(str(folder))
    del content["examples"]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match="train has a mask of targets, as only examples have one"):
        read_data(str(folder))
