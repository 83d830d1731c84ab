"""Train SentencePiece on a bounded sample of a corpus: the same model every time, on any machine."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from halfstep.launcher.data.sample import Sample
from halfstep.launcher.data.tokenizer import SentencePiece
from halfstep.launcher.errors import RequestError

SAMPLE_CHARACTERS = 16 * 2**20
END_OF_TEXT = "<|endoftext|>"
_BLOCK_CHARACTERS = 16 * 2**10
# SentencePiece drops longer sentences without a word (4192 bytes unless told otherwise).
_LINE_CHARACTERS = 4096
_LINE_BYTES = 4 * _LINE_CHARACTERS + 1
# The 256 bytes, unknown and end of text: asked for fewer, SentencePiece does not say how many it takes.
_CERTAIN_TOKENS = 258


def sample_blocks(texts: Iterable[str], seed: int, limit: int = SAMPLE_CHARACTERS) -> list[str]:
    """Return blocks of text from all over a stream, together at most `limit` characters (all of a small stream)."""
    sample = Sample(seed, limit, _BLOCK_CHARACTERS)
    for text in texts:
        sample.add(text)
    return sample.blocks


def train(blocks: list[str], vocab_size: int) -> SentencePiece:
    """Train a SentencePiece model of exactly `vocab_size` tokens.

    BPE, not unigram: it only counts, so the result does not depend on the order of floating-point sums or on the number
    of threads, and it trains in seconds where unigram takes more than a minute. Nothing is unknown (byte fallback) and
    nothing is changed (identity normalisation, no dummy prefix, all whitespace kept). Line breaks and tabs are kept out
    of the training, where SentencePiece has no use for them: each is the token of its byte, and no token reaches over
    a line break, so that a text may be cut there. Raises RequestError when the corpus does not
    give that many tokens, or needs more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(blocks),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(vocab_size, _CERTAIN_TOKENS),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=_LINE_BYTES,
            num_threads=1,  # It is written into the model, whose hash must not tell machines apart.
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from None
    return SentencePiece(model.getvalue())


def _sentences(blocks: list[str]) -> Iterator[str]:
    for block in blocks:
        for line in re.split("[\n\t]", block):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def _explain(message: str, vocab_size: int) -> RequestError:
    """Say in our words what SentencePiece (0.2, trainer_interface.cc) says in its own."""
    where = f"--vocab-size {vocab_size}"
    if most := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return RequestError(
            f"this text has too little in it for {vocab_size} tokens: SentencePiece finds {most[1]}",
            where=where,
            fix=f"--vocab-size {most[1]} or less, or more text",
        )
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return RequestError(
            f"{vocab_size} tokens are too few: the single bytes and the characters of this text take {least[1]}",
            where=where,
            fix=f"--vocab-size {least[1]} or more",
        )
    if "sentences_.empty()" in message:
        return RequestError(
            "there is nothing in this text that SentencePiece can learn from",
            where=where,
            fix="name a source that holds text, or bring a tokenizer: --tokenizer PATH_OR_ID",
        )
    return RequestError(
        f"SentencePiece cannot train: {' '.join(message.split())}", where=where, fix="try another --vocab-size"
    )
