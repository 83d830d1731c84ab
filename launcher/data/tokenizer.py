"""Turn text into token ids and back: SentencePiece trained here, or any Hugging Face tokenizer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from launcher.errors import RequestError
from launcher.plan import hub

SENTENCEPIECE, HUGGINGFACE = "sentencepiece", "huggingface"
_MODEL_FILE = "tokenizer.model"
# SentencePiece writes a space as this character and cannot tell it from the character itself.
_META_SPACE = "\u2581"


class Tokenizer(Protocol):
    """What the rest of Halfstep asks of a tokenizer."""

    kind: str
    vocabulary: int
    """Every token id is below this."""
    end_of_text: int
    """The id that ends each document."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added; special tokens spelled out in it stay plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        ...


def load(folder: Path, kind: str) -> Tokenizer:
    """Load what `Tokenizer.save` wrote; `kind` is what the manifest says. Raises RequestError for damaged files."""
    if kind == SENTENCEPIECE:
        try:
            return SentencePiece((folder / _MODEL_FILE).read_bytes())
        except (OSError, RuntimeError) as error:
            raise RequestError(
                f"the tokenizer cannot be loaded: {error}",
                where=str(folder / _MODEL_FILE),
                fix="prepare the data again into a new folder",
            ) from None
    return HuggingFace.load(str(folder))


class SentencePiece:
    """A SentencePiece model whose decode(encode(text)) is text, whatever the text.

    No token reaches over a line break (see `vocabulary.py`), so lines are encoded apart: same tokens, half the time.
    """

    kind = SENTENCEPIECE

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary = self._processor.get_piece_size()
        self.end_of_text = self._processor.eos_id()
        self._meta_space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _META_SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added."""
        if _META_SPACE in text:
            first, *rest = text.split(_META_SPACE)
            ids = self.encode(first)
            for part in rest:
                ids += self._meta_space + self.encode(part)
            return ids
        lines = re.split("(?<=\n)", text)
        # One thread: the processes are what runs in parallel.
        return [token for line in self._processor.encode(lines, num_threads=1) for token in line]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; the end-of-text token stands for nothing."""
        return self._processor.decode([int(token) for token in ids])

    def save(self, folder: Path) -> None:
        """Write the model into a folder."""
        (folder / _MODEL_FILE).write_bytes(self.model)


class HuggingFace:
    """A tokenizer of the transformers library."""

    kind = HUGGINGFACE

    def __init__(self, tokenizer: Any, end_of_text: int) -> None:
        self._tokenizer = tokenizer
        self.end_of_text = end_of_text
        # Added tokens may lie above vocab_size, and ids may have gaps.
        self.vocabulary = max(len(tokenizer), *(token + 1 for token in tokenizer.get_vocab().values()))

    @classmethod
    def load(cls, name: str) -> "HuggingFace":
        """Load from a folder, the local cache or the hub. Raises RequestError when there is none, or no end-of-text."""
        tokenizer = _load_huggingface(name)
        if tokenizer.eos_token_id is None:
            raise RequestError(
                "the tokenizer has no end-of-text token, which must stand between documents",
                where=f"--tokenizer {name}",
                fix='name one in its tokenizer_config.json ("eos_token"), or train SentencePiece with --vocab-size',
            )
        return cls(tokenizer, tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added; special tokens spelled out in it stay plain text."""
        # verbose=False: a document may be longer than the model the tokenizer was made for.
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return encoded["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        self._tokenizer.save_pretrained(folder)


def _load_huggingface(name: str) -> Any:
    from transformers import AutoTokenizer

    def load_from(*, local_files_only: bool) -> Any:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_files_only)

    try:
        try:
            return load_from(local_files_only=True)
        except (OSError, ValueError):
            if Path(name).exists():
                raise
            if problem := hub.unreachable():
                raise OSError(f"it is no folder, not in the local cache, and {problem}") from None
            return load_from(local_files_only=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(
            f"no tokenizer came from {name!r}: {reason}",
            where=f"--tokenizer {name}",
            fix="check the spelling; without network, fetch it elsewhere and name its folder",
        ) from None
