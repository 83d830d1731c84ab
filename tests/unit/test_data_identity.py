"""A run continues from its own export, and what does not belong together is refused with a way out that leads out."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_data_fidelity import ENGLISH, FOREIGN, byte_level
from test_export import Trained
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from halfstep.launcher.config.load import load
from halfstep.launcher.corpus import vocabulary
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.errors import RequestError
from halfstep.launcher.export import evaluate, write_export
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology

TEXT = ENGLISH + FOREIGN * 20
OPTIONS: dict[str, Any] = {"validation": 0.1, "workers": 1, "progress": False}


def planned(model: str | Path, data: Path, *pairs: str) -> Plan:
    name = f"hf:{model}" if isinstance(model, Path) else model
    request = load([f"model={name}", f"data={data}", "sequence=32", *pairs])
    world = Topology(world_size=1, ranks_per_node=1, accelerator="cpu")
    return resolve(request, world, facts.read(request.spec))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a corpus of it, and the export of a run on that."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "a.txt").write_text(TEXT)
    prepare(str(folder / "a.txt"), folder / "corpus", vocab_size=300, **OPTIONS)
    trained = Trained(folder, folder / "corpus", ["model=gpt2-nano"], 1)
    write_export.export(trained.run, folder / "export")
    return folder


def test_a_run_continues_from_its_own_export_on_the_same_corpus(home: Path) -> None:
    plan = planned(home / "export", home / "corpus")
    assert plan.model.weights == str(home / "export")
    assert plan.data.digest == read_data(str(home / "corpus")).digest


@pytest.mark.parametrize("lost", ["halfstep.json", "tokenizer.json"])
def test_it_does_so_where_the_note_or_the_tokenizer_has_gone(home: Path, tmp_path: Path, lost: str) -> None:
    export = Path(shutil.copytree(home / "export", tmp_path / "export"))
    (export / lost).unlink()
    assert planned(export, home / "corpus").model.weights == str(export)


def test_a_corpus_made_with_the_exports_tokenizer_belongs_to_it(home: Path, tmp_path: Path) -> None:
    for number, name in enumerate([home / "export", home / "corpus" / "tokenizer", home / "corpus"]):
        out = tmp_path / str(number)
        prepare(str(home / "a.txt"), out, tokenizer=str(name), **OPTIONS)
        assert planned(home / "export", out).data.train_tokens == read_data(str(home / "corpus")).train_tokens
        assert evaluate.evaluate(home / "export", str(out), sequence=16).tokenizer == "same"


def test_another_corpus_is_refused_and_the_advice_leads_out(home: Path, tmp_path: Path) -> None:
    prepare(str(home / "a.txt"), tmp_path / "other", vocab_size=299, **OPTIONS)
    with pytest.raises(RequestError, match="another tokenizer than the model's own") as refused:
        planned(home / "export", tmp_path / "other")
    with pytest.raises(RequestError, match="another tokenizer") as measured:
        evaluate.evaluate(home / "export", str(tmp_path / "other"))
    for error in (refused.value, measured.value):
        name = error.fix.split("--tokenizer ")[1]
        out = tmp_path / f"again-{len(error.fix)}"
        prepare(str(home / "a.txt"), out, tokenizer=name, **OPTIONS)
        assert planned(home / "export", out)
        assert evaluate.evaluate(home / "export", str(out), sequence=16).tokenizer == "same"


def test_a_sentencepiece_model_beside_weights_is_known_too(home: Path, tmp_path: Path) -> None:
    """As the first Llamas came: a config, weights, and tokenizer.model alone."""
    export = Path(shutil.copytree(home / "export", tmp_path / "export"))
    for name in ("halfstep.json", "tokenizer.json", "tokenizer_config.json"):
        (export / name).unlink()
    shutil.copy(home / "corpus" / "tokenizer" / "tokenizer.model", export)
    assert vocabulary.of_folder(export).vocabulary_digest is not None
    assert planned(export, home / "corpus")
    prepare(str(home / "a.txt"), tmp_path / "other", vocab_size=299, **OPTIONS)
    with pytest.raises(RequestError, match="another tokenizer than the model's own"):
        planned(export, tmp_path / "other")


def test_tokenizers_are_the_same_by_either_name_and_unknown_without_any() -> None:
    known = vocabulary.TokenizerFacts(sha256="a", vocabulary_digest="b")
    for other, same in [
        (("a", None), True), ((None, "b"), True), (("a", "c"), True), (("c", "b"), True), (("c", "d"), False),
        ((None, "d"), False), (("c", None), False), ((None, None), None),
    ]:  # fmt: skip
        theirs = vocabulary.TokenizerFacts(sha256=other[0], vocabulary_digest=other[1])
        assert known.same(theirs) is theirs.same(known) is same


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"model": {"vocab": 3}}'),
        ("tokenizer.json", "[" * 100_000),
        ("halfstep.json", "{"),
        ("halfstep.json", "3"),
    ],
)
def test_a_damaged_tokenizer_or_note_is_refused_by_name(home: Path, tmp_path: Path, name: str, content: str) -> None:
    export = Path(shutil.copytree(home / "export", tmp_path / "export"))
    (export / name).write_text(content)
    with pytest.raises(RequestError, match=rf"{name} is damaged") as refused:
        planned(export, home / "corpus")
    assert refused.value.where == str(export / name)


@pytest.mark.parametrize("content", ["null", "3", "[]", '{"sha256": 3}', "{}"])
def test_a_note_that_says_nothing_of_its_tokenizer_is_no_crash(home: Path, tmp_path: Path, content: str) -> None:
    export = Path(shutil.copytree(home / "export", tmp_path / "export"))
    note = json.loads((export / "halfstep.json").read_text())
    note["tokenizer"] = note["data"] = json.loads(content)
    (export / "halfstep.json").write_text(json.dumps(note))
    assert evaluate.evaluate(export, str(home / "corpus"), sequence=16).tokenizer == "same"


# --- rows for tokens


def weights(folder: Path, rows: int, tokenizer: Path) -> Path:
    config = GPT2Config(vocab_size=rows, n_layer=1, n_embd=8, n_head=1, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def with_added_token(folder: Path) -> Path:
    """Return a byte-level tokenizer of 300 tokens and a 301st that stands for a word."""
    tokenizer = AutoTokenizer.from_pretrained(byte_level(folder))
    tokenizer.add_tokens(["jumpsuit"])
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 301
    return folder


def test_a_token_that_no_text_uses_needs_no_row(tmp_path: Path) -> None:
    tokenizer = with_added_token(tmp_path / "tokenizer")
    model = weights(tmp_path / "model", 300, tokenizer)
    (tmp_path / "a.txt").write_text(ENGLISH)
    made = prepare(str(tmp_path / "a.txt"), tmp_path / "corpus", tokenizer=str(tokenizer), **OPTIONS)
    assert (made["tokenizer"]["vocabulary"], made["max_token_id"] < 300) == (301, True)
    assert planned(model, tmp_path / "corpus").model.vocabulary == 300
    assert planned("gpt2-nano", tmp_path / "corpus", "model.vocabulary=300").model.vocabulary == 300


def test_a_token_that_is_used_needs_one_and_the_advice_leads_out(tmp_path: Path) -> None:
    tokenizer = with_added_token(tmp_path / "tokenizer")
    model = weights(tmp_path / "model", 300, tokenizer)
    (tmp_path / "a.txt").write_text(ENGLISH + "a jumpsuit")
    prepare(str(tmp_path / "a.txt"), tmp_path / "corpus", tokenizer=str(tokenizer), **OPTIONS)
    with pytest.raises(RequestError) as refused:
        planned(model, tmp_path / "corpus")
    assert refused.value.what == "the data holds token id 300, and the model's embedding has only 300 rows"
    rows = int(re.findall(r"resize_token_embeddings\((\d+)\)", refused.value.fix)[0])
    resized = GPT2LMHeadModel.from_pretrained(model)
    resized.resize_token_embeddings(rows)
    resized.save_pretrained(model)
    assert planned(model, tmp_path / "corpus").model.vocabulary == 301
    # Fresh weights only need a larger vocabulary.
    with pytest.raises(RequestError) as refused:
        planned("gpt2-nano", tmp_path / "corpus", "model.vocabulary=300")
    advice = re.findall(r"give (model\.vocabulary=\d+)", refused.value.fix)[0]
    assert planned("gpt2-nano", tmp_path / "corpus", advice).model.vocabulary == 301


def test_weights_with_too_few_rows_for_another_tokenizer_are_not_told_to_grow(home: Path, tmp_path: Path) -> None:
    model = weights(tmp_path / "model", 280, with_added_token(tmp_path / "tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(RequestError, match="has only 280 rows") as refused:
        planned(model, home / "corpus")
    assert "prepare the data again with the model's own tokenizer" in refused.value.fix
    assert "model.vocabulary" not in refused.value.fix
