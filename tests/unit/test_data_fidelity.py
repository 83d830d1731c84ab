"""Tokenizers that lose text: measured on a sample, told in figures, refused above a limit."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from test_data_corpus import mutated
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfstep.launcher.data import encode, fidelity, readers, train_tokenizer
from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.data.show import inspect, render
from halfstep.launcher.data.tokenizer import HuggingFace, SentencePiece, named
from halfstep.launcher.errors import RequestError

ENGLISH = "The quick brown fox jumps over the lazy dog. It said: well, well!\n" * 40
FOREIGN = "Ünïcødé 😀 中文\n"


def save(folder: Path, raw: Tokenizer, **special: str) -> str:
    PreTrainedTokenizerFast(tokenizer_object=raw, **{"eos_token": "</s>", **special}).save_pretrained(folder)
    return str(folder)


def four_words(folder: Path) -> str:
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "the": 2, "fox": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return save(folder, raw, unk_token="[UNK]")


def ascii_bpe(folder: Path) -> str:
    """A BPE without bytes: what has no token disappears."""
    raw = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>"], show_progress=False)
    raw.train_from_iterator([ENGLISH], trainer)
    raw.decoder = decoders.Fuse()
    return save(folder, raw)


def uncased(folder: Path) -> str:
    """As BERT's: words in lower case, in pieces, their spaces put in again by rule."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "</s>"], show_progress=False)
    raw.train_from_iterator([ENGLISH], trainer)
    return save(folder, raw, unk_token="[UNK]")


def byte_level(folder: Path) -> str:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([ENGLISH], trainer)
    return save(folder, raw, unk_token="</s>")


def run(tmp_path: Path, text: str, tokenizer: str, **options: Any) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text(text)
    return prepare(
        str(tmp_path / "a.txt"),
        tmp_path / "corpus",
        tokenizer=tokenizer,
        **{"workers": 1, "progress": False, "validation": 0.1, **options},
    )


def refusal(tmp_path: Path, text: str, tokenizer: str, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        run(tmp_path, text, tokenizer, **options)
    assert not (tmp_path / "corpus").exists()
    return refused.value


def test_a_tokenizer_that_knows_four_words_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, ENGLISH, four_words(tmp_path / "tokenizer"))
    # 40 x "fox" and "the" come back of 40 lines of 53 letters and signs.
    assert error.what.startswith(f"the tokenizer loses {100 * 47 / 53:.1f} % of the text: of 2,640 characters")
    assert "--allow-lossy" in error.fix
    made = run(tmp_path, ENGLISH, four_words(tmp_path / "tokenizer"), allow_lossy=True)
    assert made["fidelity"]["lost"] == pytest.approx(47 / 53)
    # fox and the (The has a capital) are two of 17 words and signs a line.
    assert made["fidelity"]["unknown_tokens"] == 40 * 15
    assert made["request"]["allow_lossy"] is True
    lines = "\n".join(render(inspect(tmp_path / "corpus")))
    assert "loses       89 % of the characters do not come back (such as" in lines
    assert 'loses       600 tokens of the corpus mean "unknown"' in lines


def test_a_bpe_that_drops_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, ENGLISH + FOREIGN * 20, ascii_bpe(tmp_path / "tokenizer"))
    assert "do not come back" in error.what
    assert "😀" in error.what
    assert "中" in error.what
    # One emoji in some thousand letters is said and taken.
    made = run(tmp_path, ENGLISH + "😀", ascii_bpe(tmp_path / "tokenizer"))
    assert 0 < made["fidelity"]["lost"] < 0.001
    assert made["fidelity"]["examples"] == ["😀"]
    assert "loses       0.047 % of the characters do not come back (such as 😀)" in render(made)


def test_what_a_tokenizer_does_on_purpose_is_told_and_not_refused(tmp_path: Path) -> None:
    made = run(tmp_path, ENGLISH, uncased(tmp_path / "tokenizer"))
    assert made["fidelity"]["lost"] == 0
    assert made["fidelity"]["changed"] == pytest.approx(2 / 53)  # T and I
    assert made["fidelity"]["whitespace"] > 0  # line breaks became spaces
    assert "loses       3.8 % come back in another case or form" in render(made)
    # Accents are letters' own: a tokenizer that strips them takes something away.
    assert "do not come back" in refusal(tmp_path / "..", "é à ç ô " * 100, str(tmp_path / "tokenizer")).what


def test_a_byte_level_tokenizer_loses_nothing_and_says_so(tmp_path: Path) -> None:
    made = run(tmp_path, ENGLISH + FOREIGN * 20, byte_level(tmp_path / "tokenizer"))
    assert {key: made["fidelity"][key] for key in ("lost", "changed", "whitespace", "unknown_tokens", "examples")} == {
        "lost": 0.0, "changed": 0.0, "whitespace": 0.0, "unknown_tokens": 0, "examples": [],
    }  # fmt: skip
    assert made["fidelity"]["characters"] == len(ENGLISH + FOREIGN * 20)
    assert any(line.startswith("loses       nothing: ") for line in render(made))


def test_a_tokenizer_that_loses_too_much_is_refused_before_the_hours_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 2**14)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 2**14)
    seen = []
    refusal(
        tmp_path,
        FOREIGN * 20_000,
        ascii_bpe(tmp_path / "tokenizer"),
        progress=lambda stage, done, total: seen.append(done),
    )
    assert max(seen) < 20_000 * len(FOREIGN.encode()) / 3


def test_what_comes_late_is_seen_at_the_end(tmp_path: Path) -> None:
    assert "do not come back" in refusal(tmp_path, ENGLISH * 40 + FOREIGN * 2000, ascii_bpe(tmp_path / "t")).what


def test_the_sample_is_bounded_and_from_everywhere() -> None:
    watch = fidelity.Watch(train_tokenizer.train([ENGLISH], 300), seed=0, name="", allowed=False)
    pieces = [readers.Piece(f"{number:06d} {'x' * 992}\n", True) for number in range(2000)]
    assert list(watch.over(pieces)) == pieces
    assert 2**18 < watch.result().characters <= 2**19
    numbers = [int(block[:6]) for block in watch._sample.blocks]
    assert min(numbers) < 20
    assert max(numbers) > 1980


# --- special tokens spelled out in a text


def unigram(folder: Path, **special: str) -> str:
    """As T5's: the special tokens stand in the table among the words."""
    pieces = ["<unk>", "</s>", "<pad>", *"<>/spadehltunko. ", "he", "the"]
    raw = Tokenizer(models.Unigram([(piece, -2.0 if len(piece) == 1 else 0.0) for piece in pieces], 0))
    raw.decoder = decoders.Fuse()
    return save(folder, raw, **{"unk_token": "<unk>", "pad_token": "<pad>", **special})


def test_a_literal_end_of_text_stays_text(tmp_path: Path) -> None:
    text = "the </s> sheep </s><pad></s> ate </S>. <pad> end</s>"
    loaded = HuggingFace.load(unigram(tmp_path / "tokenizer"))
    # What transformers itself does with it.
    assert 1 in loaded._encode(text)
    assert not {1, 2} & set(loaded.encode(text))
    assert loaded.decode(loaded.encode(text.replace("S", "s"))) == text.replace("S", "s")
    made = run(tmp_path, f"{text.replace('S', 's')}\n" * 50, str(tmp_path / "tokenizer"), allow_lossy=True)
    split = made["splits"]
    assert split["train"]["documents"] + split["validation"]["documents"] == 2  # one, divided


def test_words_that_are_taken_whole_from_the_table_stay_text_too(tmp_path: Path) -> None:
    """As Llama 3's: a word that is in the table is a token, merges or not."""
    alphabet = [*"</s>athe"]
    vocab = {"</s>": 0, "<pad>": 1} | {letter: 2 + at for at, letter in enumerate(dict.fromkeys([*alphabet, "p", "d"]))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = HuggingFace.load(save(tmp_path / "t", raw, pad_token="<pad>"))
    assert loaded._encode("the </s>")[-1] == 0
    assert not {0, 1} & set(loaded.encode("the </s> <pad>"))


def test_an_unknown_token_that_ends_documents_is_refused(tmp_path: Path) -> None:
    raw = Tokenizer(models.WordLevel({"</s>": 0, "the": 1}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    error = refusal(tmp_path, "the end of the text", save(tmp_path / "t", raw, unk_token="</s>"), allow_lossy=True)
    assert error.what == "the tokenizer gives its special token '</s>' for plain text"


# --- SentencePiece models that others trained


def trained_elsewhere(folder: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*ENGLISH.splitlines(), *["<a/>"] * 40]),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 40, **options},
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def test_a_folder_with_only_a_sentencepiece_model_is_loaded(tmp_path: Path) -> None:
    folder = trained_elsewhere(tmp_path / "tokenizer")
    made = run(tmp_path, ENGLISH, str(folder))
    about = made["tokenizer"]
    assert (about["kind"], about["end_of_text"], about["vocabulary"]) == ("sentencepiece", 2, 40)
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    loaded = SentencePiece((folder / "tokenizer.model").read_bytes())
    for text in (ENGLISH, "  two  spaces\n\nand \u2581 lines", "\u2581", ""):
        assert loaded.encode(text) == own.encode(text)
    assert made["fidelity"]["lost"] == 0
    assert made["fidelity"]["whitespace"] > 0  # line breaks are spaces to it
    # By the file's own name too, and through a corpus that was made with it.
    for name in (folder / "tokenizer.model", tmp_path / "corpus", tmp_path / "corpus" / "tokenizer"):
        out = tmp_path / name.name / ".." / f"again-{name.name}"
        again = prepare(str(tmp_path / "a.txt"), out, tokenizer=str(name), workers=1, progress=False, validation=0.1)
        assert again["tokenizer"]["sha256"] == about["sha256"]
        assert again["splits"] == made["splits"]


def test_our_own_tokenizer_folder_is_loaded_and_gives_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(ENGLISH)
    options: dict[str, Any] = {"workers": 1, "progress": False, "validation": 0.1}
    made = prepare(str(tmp_path / "a.txt"), tmp_path / "one", vocab_size=295, **options)
    again = prepare(str(tmp_path / "a.txt"), tmp_path / "two", tokenizer=str(tmp_path / "one" / "tokenizer"), **options)
    assert again["tokenizer"]["sha256"] == made["tokenizer"]["sha256"]
    assert again["splits"] == made["splits"]


@pytest.mark.parametrize(
    ("options", "what"),
    [({"eos_id": -1}, "the SentencePiece model has no end-of-text token"), (None, "is no SentencePiece model")],
)
def test_a_sentencepiece_model_that_cannot_be_used_is_refused(
    tmp_path: Path, options: dict[str, Any] | None, what: str
) -> None:
    folder = tmp_path / "tokenizer"
    if options is None:
        folder.mkdir()
        (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format
    else:
        trained_elsewhere(folder, **options)
    error = refusal(tmp_path, ENGLISH, str(folder))
    assert what in error.what
    assert error.where == f"--tokenizer {folder}"


def test_a_pointer_in_place_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is a git-LFS pointer" in refusal(tmp_path, ENGLISH, str(tmp_path / "t")).what


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("bytes_too", [True, False])
def test_an_export_reads_text_as_a_sentencepiece_model_of_others_does(
    tmp_path: Path, kind: str, bytes_too: bool
) -> None:
    from halfstep.launcher.export.sentencepiece_files import from_sentencepiece

    size = 296 if bytes_too else 40
    folder = trained_elsewhere(tmp_path / "t", model_type=kind, byte_fallback=bytes_too, vocab_size=size)
    model = (folder / "tokenizer.model").read_bytes()
    mine, (theirs, end) = SentencePiece(model), from_sentencepiece(model)
    assert end == "</s>"
    for text in (ENGLISH, "  a  fox \n\n jumps ", "It </s> said <s>", FOREIGN, "ﬁne \uff21", ""):
        assert theirs.encode(text, add_special_tokens=False).ids == mine.encode(text)
    for text in ("The lazy dog", "well, well!"):
        assert theirs.decode(mine.encode(text)) == mine.decode(mine.encode(text)) == text


def test_the_manifest_of_a_lossy_corpus_survives_json(tmp_path: Path) -> None:
    made = run(tmp_path, ENGLISH + FOREIGN * 20, ascii_bpe(tmp_path / "t"), allow_lossy=True)
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text()) == made


def test_mutated_tokenizers_are_refused_or_work(tmp_path: Path) -> None:
    draw = random.Random(0)
    folders = [Path(make(tmp_path / make.__name__)) for make in (four_words, ascii_bpe, uncased, byte_level, unigram)]
    refused = 0
    for _ in range(300):
        file = draw.choice(folders) / draw.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        good = file.read_bytes()
        file.write_text(json.dumps(mutated(draw, json.loads(good))))
        try:
            loaded = named(str(file.parent))
            ids = loaded.encode(ENGLISH)
            loaded.decode(ids)
        except RequestError as error:
            refused += len(str(error).splitlines()) == 3
        else:
            assert max(ids, default=0) < loaded.vocabulary
        file.write_bytes(good)
    assert refused > 150
