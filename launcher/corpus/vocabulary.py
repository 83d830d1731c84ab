"""Tell whether two tokenizers are the same: the one of a corpus, and the one beside a model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config.digest import digest
from halfstep.launcher.corpus.pieces import Pieces
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign

MODEL_FILE = "tokenizer.model"
EXPORT_NOTE = "halfstep.json"
"""What `checkpoint export` writes about an export, its tokenizer among it."""
LARGEST_BYTES = 2**30
"""Of a file of a tokenizer."""
_LARGEST_NOTE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What identifies a tokenizer; None where nothing does."""

    sha256: str | None = None
    """Of the tokenizer's folder in the corpus that it comes from."""
    vocabulary_digest: str | None = None
    """Of its token table."""

    @property
    def short(self) -> str:
        """What a message calls it."""
        return (self.sha256 or self.vocabulary_digest or "of no name")[:12]

    def same(self, other: "TokenizerFacts") -> bool | None:
        """Tell whether two are the same; None where one of them does not say."""
        mine, theirs = (self.sha256, self.vocabulary_digest), (other.sha256, other.vocabulary_digest)
        if any(a is not None and a == b for a, b in zip(mine, theirs, strict=True)):
            return True
        return None if mine == (None, None) or theirs == (None, None) else False


def of_folder(folder: Path) -> TokenizerFacts:
    """Return what identifies the tokenizer beside a model: in an export's own note, or in the tokenizer's files.

    Raises RequestError where these are damaged.
    """
    return TokenizerFacts(sha256=_exported(folder / EXPORT_NOTE), vocabulary_digest=table_digest(folder))


def table_digest(folder: Path) -> str | None:
    """Return what identifies the token table of a tokenizer's folder; None where there is none that can be read."""
    if (folder / "tokenizer.json").is_file():
        return vocabulary_digest(folder / "tokenizer.json")
    file = folder / MODEL_FILE
    if not file.is_file():
        return None
    try:
        table = Pieces(foreign.read_bytes(file, LARGEST_BYTES, follow=True)).table()
    except (OSError, RuntimeError, ValueError):  # it is another format's tokenizer.model: tiktoken's, say
        return None
    return None if table is None else digest(table)


def vocabulary_digest(tokenizer_json: Path) -> str | None:
    """Hash the token table alone: a tokenizer.json that was saved again differs in layout, not in tokens.

    None where there is no file. Raises RequestError for a file that no tokenizer wrote.
    """
    if not tokenizer_json.is_file():
        return None
    content = _json(tokenizer_json, LARGEST_BYTES, "copy the tokenizer again")
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise _damaged(tokenizer_json, "it has no table of tokens", "copy the tokenizer again")
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        # Unigram: (piece, score) in the order of the ids. Who saves a score again may round it.
        vocabulary = [entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary]
    return digest(vocabulary)


def tokenizer_sha256(folder: Path) -> str:
    """Return one hash over a tokenizer's files: their names and contents, in the order of the names.

    Raises RequestError for a file larger than a tokenizer's, OSError for one that cannot be read.
    """
    hasher = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(foreign.read_bytes(file, LARGEST_BYTES, follow=True)).hexdigest()
        hasher.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return hasher.hexdigest()


def _exported(note: Path) -> str | None:
    if not note.is_file():
        return None
    tokenizer = _json(note, _LARGEST_NOTE_BYTES, "export it again").get("tokenizer")
    sha256 = tokenizer.get("sha256") if isinstance(tokenizer, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _json(file: Path, most_bytes: int, fix: str) -> dict[str, Any]:
    try:
        content = foreign.read_json(file, most_bytes, follow=True)
    except OSError as error:
        raise RequestError(
            f"{file.name} cannot be read: {error.strerror}", where=str(file), fix="check permissions"
        ) from None
    except ValueError as error:
        raise _damaged(file, " ".join(str(error).split())[:200], fix) from None
    if not isinstance(content, dict):
        raise _damaged(file, "it is no JSON object", fix)
    return content


def _damaged(file: Path, why: str, fix: str) -> RequestError:
    return RequestError(f"{file.name} is damaged: {why}", where=str(file), fix=fix)
