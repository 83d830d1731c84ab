"""Tokenizers: every text comes back, training repeats itself, a size that cannot be is answered with one that can."""

import hashlib
import inspect
import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfstep.launcher.data import tokenizer, train_tokenizer
from halfstep.launcher.errors import RequestError

TEXT = inspect.getsource(json) + inspect.getsource(random) + inspect.getsource(inspect)


@pytest.fixture(scope="module")
def trained() -> tokenizer.SentencePiece:
    return train_tokenizer.train([TEXT], 512)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=" \t\n\r\u2581ab<|endoftext|>"))
@example("  two  spaces  \n\n\t\tand tabs\t \r\n")
@example("\u2581\u2581 a\u2581\n\u2581")
@example("\x00\ufeff\u2047\u2585\U0001f389")
@example("<unk></s><0x41><|endoftext|>")
def test_every_text_comes_back(trained: tokenizer.SentencePiece, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= token < trained.vocabulary for token in ids)
    # Neither the unknown nor the end-of-text token can be written by a text.
    assert trained.end_of_text not in ids
    assert 0 not in ids


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \n\t\u2581é"), st.text(alphabet="ab \n\t\u2581é"))
def test_a_cut_after_a_line_break_changes_no_token(trained: tokenizer.SentencePiece, before: str, other: str) -> None:
    assert trained.encode(before + "\n") + trained.encode(other) == trained.encode(before + "\n" + other)


def test_the_vocabulary_is_the_size_asked_for_and_saves_text(trained: tokenizer.SentencePiece) -> None:
    assert trained.vocabulary == 512
    assert trained.decode([trained.end_of_text]) == ""
    assert len(trained.encode(TEXT)) < 0.6 * len(TEXT)


def test_training_twice_gives_the_same_model(trained: tokenizer.SentencePiece) -> None:
    again = train_tokenizer.train([TEXT], 512)
    assert hashlib.sha256(again.model).digest() == hashlib.sha256(trained.model).digest()


def test_a_saved_model_is_loaded_again(trained: tokenizer.SentencePiece, tmp_path: Path) -> None:
    trained.save(tmp_path)
    assert tokenizer.load(tmp_path, "sentencepiece").encode(TEXT) == trained.encode(TEXT)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(RequestError, match="the tokenizer cannot be loaded"):
        tokenizer.load(tmp_path, "sentencepiece")


def test_a_vocabulary_too_large_for_the_text_names_the_largest() -> None:
    with pytest.raises(RequestError) as refused:
        train_tokenizer.train(["hello world, hello text\n"], 100_000)
    assert refused.value.where == "--vocab-size 100000"
    largest = int(refused.value.fix.split()[1])
    assert refused.value.what == f"this text has too little in it for 100000 tokens: SentencePiece finds {largest}"
    assert train_tokenizer.train(["hello world, hello text\n"], largest).vocabulary == largest
    with pytest.raises(RequestError):
        train_tokenizer.train(["hello world, hello text\n"], largest + 1)


@pytest.mark.parametrize("size", [1, 2, 100, 260])
def test_a_vocabulary_too_small_for_the_text_names_the_smallest(size: int) -> None:
    with pytest.raises(RequestError) as refused:
        train_tokenizer.train([TEXT], size)
    smallest = int(refused.value.fix.split()[1])
    assert 260 < smallest < 512
    assert train_tokenizer.train([TEXT], smallest).vocabulary == smallest


def test_a_text_that_teaches_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="nothing in this text that SentencePiece can learn from"):
        train_tokenizer.train(["\n\t\n"], 300)


def test_the_sample_is_bounded_repeatable_and_from_all_over() -> None:
    texts = [f"{number:05d} {'x' * 90}\n" * 100 for number in range(400)]
    blocks = train_tokenizer.sample_blocks(texts, seed=1, limit=200_000)
    assert 50_000 < sum(map(len, blocks)) <= 200_000
    assert blocks == train_tokenizer.sample_blocks(texts, seed=1, limit=200_000)
    assert blocks != train_tokenizer.sample_blocks(texts, seed=2, limit=200_000)
    numbers = [int(block[:5]) for block in blocks]
    assert min(numbers) < 100
    assert max(numbers) > 300


@given(st.lists(st.text(alphabet="ab\n", max_size=200), max_size=20))
def test_a_small_stream_is_sampled_whole(texts: list[str]) -> None:
    assert "".join(train_tokenizer.sample_blocks(texts, seed=0)) == "".join(texts)


def make_huggingface(folder: Path, end_of_text: str | None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|eot|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end_of_text).save_pretrained(folder)
    return folder


def test_a_hugging_face_tokenizer_keeps_text_as_it_is(tmp_path: Path) -> None:
    loaded = tokenizer.HuggingFace.load(str(make_huggingface(tmp_path, "<|eot|>")))
    assert (loaded.vocabulary, loaded.end_of_text) == (300, 0)
    text = "a  b <|eot|>\n\t🎉 .\n"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.end_of_text not in loaded.encode(text)
    loaded.save(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again", "huggingface").encode(text) == loaded.encode(text)


def test_a_hugging_face_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no end-of-text token"):
        tokenizer.HuggingFace.load(str(make_huggingface(tmp_path, None)))


def test_a_tokenizer_that_is_nowhere_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("owner/name", str(tmp_path)):
        with pytest.raises(RequestError) as refused:
            tokenizer.HuggingFace.load(name)
        assert refused.value.what.startswith(f"no tokenizer came from '{name}'")
        assert "\n" not in refused.value.what
        assert refused.value.where == f"--tokenizer {name}"
