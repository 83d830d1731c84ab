"""What the manifest of a prepared corpus may say: read with bounds, checked by a schema before anything is believed."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign

NAME = "manifest.json"
KIND = "halfstep-data"
FORMAT = 1
AGAIN = "prepare the data again into a new folder"
MASK = ".mask"
"""What follows in the name of a split's pair that tells which of its tokens are targets."""
_LARGEST_BYTES = 64 * 2**20
_WIDTHS = {"uint16": 2, "int32": 4}

PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
Xxh3 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class PairBytes(_Part):
    """Sizes of the two files of a split."""

    bin: Count
    idx: Count


class PairHashes(_Part):
    """Hashes of the two files of a split."""

    bin: Xxh3
    idx: Xxh3


class Mask(_Part):
    """The pair that tells of each token of a split whether it is a target; a byte each."""

    prefix: PlainName
    bytes: PairBytes
    xxh3: PairHashes
    xxh3_sampled: PairHashes


class Split(_Part):
    """One part of the tokens."""

    tokens: Count
    documents: Count
    prefix: PlainName
    bytes: PairBytes
    xxh3: PairHashes | None = None
    """Of all bytes; None for a corpus that was prepared before they were hashed."""
    xxh3_sampled: PairHashes | None = None
    """Of what `halfstep.launcher.corpus.file_hash` reads."""
    mask: Mask | None = None
    """Of examples; None where every token is a target."""
    targets: Count | None = None
    """How many tokens are, by the mask."""


class Splits(_Part):
    """Both parts; that for validation may be empty."""

    train: Split
    validation: Split


class Tokenizer(_Part):
    """What the tokens were made with."""

    kind: Literal["sentencepiece", "huggingface"]
    name: str
    path: PlainName
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    vocabulary: Annotated[int, Field(ge=1, le=2**31)]
    end_of_text: Count


class Passed(_Part):
    """What was passed over, of one kind."""

    count: Count = 0
    names: list[str] = []


class BadRows(_Part):
    """Rows that held no text."""

    count: Count = 0
    examples: list[str] = []


class Examples(_Part):
    """How conversations became documents."""

    template: Literal["chatml", "alpaca", "plain", "tokenizer"]
    targets: Literal["all", "last"]
    without_targets: Count
    """Examples that nothing is learnt from."""
    longest: Count
    """Tokens."""


class Source(_Part):
    """What was read."""

    asked: str
    files: Count
    text_bytes: Count
    empty_documents: Count
    undecodable_files: list[str]
    bad_rows: BadRows = BadRows()
    duplicates: Count | None = None
    """Documents with the content of an earlier one; None where they were not counted."""
    left_out: dict[str, Passed] = {}


class Fidelity(_Part):
    """What came back of a sample of the text."""

    characters: Count
    lost: float
    changed: float
    whitespace: float
    unknown_tokens: Count
    examples: list[str]


class Account(_Part):
    """What a manifest says of its making, which decides nothing and is shown."""

    source: Source
    request: dict[str, Any]
    fidelity: Fidelity | None = None
    """None for a corpus that was prepared before it was measured."""


class Manifest(_Part):
    """All of a manifest that decides anything."""

    kind: Literal["halfstep-data"]
    format: Literal[1]
    source: dict[str, Any]
    tokenizer: Tokenizer
    token_dtype: Literal["uint16", "int32"]
    max_token_id: Count | None = None
    seed: int | None = None
    splits: Splits
    examples: Examples | None = None
    """None for a corpus of text."""
    checksum: str | None = None
    """Of all the rest, where it was written."""

    @model_validator(mode="after")
    def _agree(self) -> "Manifest":
        """Refuse numbers that contradict each other, before anybody asks the files."""
        for name, split in (("train", self.splits.train), ("validation", self.splits.validation)):
            stored = split.tokens * _WIDTHS[self.token_dtype]
            if split.bytes.bin != stored:
                raise ValueError(
                    f"{name} claims {split.tokens} tokens, which take {stored} bytes as {self.token_dtype}, "
                    f"in a file of {split.bytes.bin}"
                )
            if (split.mask is None) != (self.examples is None):
                raise ValueError(f"{name} has {'a' if split.mask else 'no'} mask of targets, as only examples have one")
            if split.mask is not None and split.mask.prefix != f"{split.prefix}{MASK}":
                raise ValueError(f"the mask of {name} is {split.mask.prefix}, not {split.prefix}{MASK}")
            targets = split.targets or 0
            if split.mask is not None and not targets <= split.tokens == split.mask.bytes.bin:
                raise ValueError(
                    f"{name} claims {targets} targets among {split.tokens} tokens, in a mask of {split.mask.bytes.bin} "
                    "bytes"
                )
        for what, token in (("max_token_id", self.max_token_id), ("end_of_text", self.tokenizer.end_of_text)):
            if token is not None and token >= self.tokenizer.vocabulary:
                raise ValueError(f"{what} {token} is outside the vocabulary of {self.tokenizer.vocabulary}")
        if self.splits.train.tokens == 0:
            raise ValueError("there are no training tokens")
        return self


def checksum(content: dict[str, Any]) -> str:
    """Return what `checksum` has to say for the rest of a manifest."""
    return digest({key: value for key, value in content.items() if key != "checksum"}, length=32)


def read(folder: Path, *, to_show: bool = False) -> tuple[Manifest, dict[str, Any]]:
    """Return a corpus folder's manifest, checked, and all that stands in it; `to_show` also checks what is only shown.

    Raises RequestError for what no preparation writes; OSError where the file cannot be read.
    """
    file = folder / NAME
    try:
        content = foreign.read_json(file, _LARGEST_BYTES, follow=True)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if "kind" in content and "format" in content and (content["kind"], content["format"]) != (KIND, FORMAT):
            raise RequestError(
                f"the manifest is of kind {str(content['kind'])[:40]!r} and format {str(content['format'])[:40]}, "
                f"not {KIND!r} and {FORMAT}",
                where=str(file),
                fix=AGAIN,
            )
        manifest = Manifest.model_validate(content)
        if to_show:
            Account.model_validate(content)
        # Worked out for those without one too: what has no canonical form has no digest either.
        actual = checksum(content)
        if manifest.checksum not in (None, actual):
            raise ValueError("it was changed after it was written")
    except ValidationError as error:
        raise _damaged(file, _first(error)) from None
    except ValueError as error:
        raise _damaged(file, " ".join(str(error).split())[:200]) from None
    return manifest, content


def _damaged(file: Path, why: str) -> RequestError:
    return RequestError(f"the manifest is damaged: {why}", where=str(file), fix=AGAIN)


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg']}" if place else detail["msg"].removeprefix("Value error, ")
