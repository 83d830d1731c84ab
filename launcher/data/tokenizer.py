"""Turn text into token ids and back: SentencePiece trained here or elsewhere, or any Hugging Face tokenizer."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from halfstep.launcher.corpus import hub
from halfstep.launcher.corpus.pieces import META_SPACE, Pieces
from halfstep.launcher.corpus.vocabulary import LARGEST_BYTES, MODEL_FILE
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import reason

SENTENCEPIECE, HUGGINGFACE = "sentencepiece", "huggingface"
_POINTER = b"version https://git-lfs.github.com/spec/"


class Tokenizer(Protocol):
    """What the rest of Halfstep asks of a tokenizer."""

    kind: str
    vocabulary: int
    """Every token id is below this."""
    end_of_text: int
    """The id that ends each document."""
    unknown: int | None
    """The id that stands for what has no token of its own; None where nothing is unknown."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added; special tokens spelled out in it stay plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    def control(self, text: str) -> int | None:
        """Return the id of the control token of a name, which no text is encoded as; None where there is none."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        ...


def load(folder: Path, kind: str) -> Tokenizer:
    """Load what `Tokenizer.save` wrote; `kind` is what the manifest says. Raises RequestError for damaged files."""
    if kind == SENTENCEPIECE:
        try:
            return SentencePiece(foreign.read_bytes(folder / MODEL_FILE, LARGEST_BYTES, follow=True))
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
            raise RequestError(
                f"the tokenizer cannot be loaded: {why}",
                where=str(folder / MODEL_FILE),
                fix="prepare the data again into a new folder",
            ) from None
    return HuggingFace.load(str(folder))


def named(name: str) -> Tokenizer:
    """Load what `--tokenizer` names: a SentencePiece model, alone in its folder, or a tokenizer of transformers.

    A prepared corpus stands for its own tokenizer. Raises RequestError where there is none, or no end of text.
    """
    path = Path(name).expanduser()
    if (path / "manifest.json").is_file() and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    model = path / MODEL_FILE
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path, name)
    # Where there is a tokenizer.json too, it may say more than the model: tokens that were added, another end of text.
    if model.is_file() and not (path / "tokenizer.json").is_file():
        return _load_sentencepiece(model, name)
    return HuggingFace.load(str(path) if path.exists() else name, name)


def _load_sentencepiece(file: Path, name: str) -> Tokenizer:
    where = f"--tokenizer {name}"
    try:
        content = foreign.read_bytes(file, LARGEST_BYTES, follow=True)
        if content.startswith(_POINTER):
            raise RequestError(
                f"{file.name} is a git-LFS pointer: the file itself was not fetched",
                where=str(file),
                fix="run `git lfs pull` in its repository",
            )
        loaded = SentencePiece(content)
    except (OSError, RuntimeError, UnicodeDecodeError):
        raise RequestError(
            f"{file} is no SentencePiece model (tiktoken's files have the same name)",
            where=where,
            fix="name a folder with a tokenizer.json, as transformers saves it",
        ) from None
    if loaded.end_of_text < 0:
        raise RequestError(
            "the SentencePiece model has no end-of-text token, which must stand between documents",
            where=where,
            fix="train it with an eos_id (spm_train's default has one), or train one here with --vocab-size",
        )
    return loaded


class SentencePiece:
    """A SentencePiece model.

    Where it keeps text as it is, decode(encode(text)) is text, whatever the text, as in all that are trained here: no
    token reaches over a line break (see `vocabulary.py`), so lines are encoded apart: same tokens, half the time.
    """

    kind = SENTENCEPIECE

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = Pieces(model)
        self._processor = self.pieces.processor
        self.vocabulary = self._processor.get_piece_size()
        self.end_of_text = self._processor.eos_id()
        self.unknown = self._processor.unk_id()
        self._exact = self.pieces.keeps_text
        self._meta_space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added."""
        if not self._exact:
            return self._processor.encode(text)
        if META_SPACE in text:
            first, *rest = text.split(META_SPACE)
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

    def control(self, text: str) -> int | None:
        """Return the id of the control token of a name; None where there is none."""
        token = self._processor.piece_to_id(text)
        return token if self._processor.is_control(token) else None

    def save(self, folder: Path) -> None:
        """Write the model into a folder."""
        (folder / MODEL_FILE).write_bytes(self.model)


class HuggingFace:
    """A tokenizer of the transformers library."""

    kind = HUGGINGFACE

    def __init__(self, tokenizer: Any, end_of_text: int, name: str = "") -> None:
        self.library = tokenizer
        """The tokenizer as transformers has it."""
        self._name = name
        self.end_of_text = end_of_text
        unknown = tokenizer.unk_token_id
        # Byte-level tokenizers know no unknown text, and name the end of text for want of anything better.
        self.unknown = unknown if unknown != end_of_text else None
        self._special = frozenset(tokenizer.all_special_ids) - {self.unknown} | {end_of_text}
        # Added tokens may lie above vocab_size, and ids may have gaps.
        self.vocabulary = max(len(tokenizer), *(token + 1 for token in tokenizer.get_vocab().values()))

    @classmethod
    def load(cls, path: str, name: str | None = None) -> "HuggingFace":
        """Load from a folder, the local cache or the hub; `name` is what messages call it.

        Raises RequestError when there is none, or no end-of-text.
        """
        name = path if name is None else name
        try:
            tokenizer = _from_pretrained(path)
            loaded = None if tokenizer.eos_token_id is None else cls(tokenizer, tokenizer.eos_token_id, name)
        except Exception as error:  # damaged files end in any: `tokenizers` raises no class of its own
            raise RequestError(
                f"no tokenizer came from {name!r}: {_one_line(error)}",
                where=f"--tokenizer {name}",
                fix="check the spelling; without network, fetch it elsewhere and name its folder",
            ) from None
        if loaded is None:
            raise RequestError(
                "the tokenizer has no end-of-text token, which must stand between documents",
                where=f"--tokenizer {name}",
                fix='name one in its tokenizer_config.json ("eos_token"), or train SentencePiece with --vocab-size',
            )
        return loaded

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added; special tokens spelled out in it stay plain text."""
        ids = self._encode(text)
        if self._special.isdisjoint(ids):
            return ids
        # Some models have their special tokens among the words they look for (Unigram all, others whole words): what
        # spells one is taken apart after its first character, which no token then reaches over.
        ids = [token for part in self._apart.split(text) for token in self._encode(part)]
        if not self._special.isdisjoint(ids):
            token = self.library.convert_ids_to_tokens(next(token for token in ids if token in self._special))
            raise RequestError(
                f"the tokenizer gives its special token {token!r} for plain text",
                where=f"--tokenizer {self._name}",
                fix="give it an unknown token of its own (unk_token), or train SentencePiece with --vocab-size",
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            # verbose=False: a document may be longer than the model the tokenizer was made for.
            return self.library(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        except Exception as error:  # the library's own class is no other than this
            raise self._cannot("encode", error) from None

    @cached_property
    def _apart(self) -> re.Pattern[str]:
        spelled = [token for token in self.library.all_special_tokens if len(token) > 1]
        places = (f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelled)
        return re.compile("|".join(places) or "(?!)", re.IGNORECASE)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        try:
            return self.library.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)
        except Exception as error:  # as above
            raise self._cannot("decode", error) from None

    def control(self, text: str) -> int | None:
        """Return the id of the control token of a name; None where there is none."""
        token = self.library.convert_tokens_to_ids(text)
        added = self.library.added_tokens_decoder.get(token)
        return token if token in self._special or (added is not None and added.special) else None

    def _cannot(self, what: str, error: Exception) -> RequestError:
        return RequestError(
            f"the tokenizer cannot {what} this text: {_one_line(error)}",
            where=f"--tokenizer {self._name}",
            fix="take another tokenizer, give this one an unknown token, or train SentencePiece with --vocab-size",
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        self.library.save_pretrained(folder)


def _from_pretrained(path: str) -> Any:
    from transformers import AutoTokenizer

    def load_from(*, local_files_only: bool) -> Any:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local_files_only)

    try:
        return load_from(local_files_only=True)
    except (OSError, ValueError):
        if Path(path).exists():
            raise
        if problem := hub.unreachable():
            raise OSError(f"it is no folder, not in the local cache, and {problem}") from None
        return load_from(local_files_only=False)


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
