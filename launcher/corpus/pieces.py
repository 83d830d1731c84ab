"""Read what a SentencePiece model says of itself: its kind, its table of pieces, and whether it keeps text as it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

META_SPACE = "\u2581"
"""SentencePiece writes a space as this character and cannot tell it from the character itself."""
UNIGRAM, BPE = 1, 2
# What changes on its way through a model that normalises, begins with a space of its own, or drops some.
_PROBE = " a\t\n  b\u00a0\ufb01\uff21 A\u0301\u200b\r\n "
# Field numbers of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_TYPE, _USER_DEFINED = 1, 3, 4
_MODEL_TYPE = 3
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES = 2, 3, 4


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece model; `processor` is SentencePiece's own."""

    model: bytes

    @cached_property
    def processor(self) -> Any:
        """Load the model; raises RuntimeError where it is none."""
        import sentencepiece  # planning does without, unless a corpus was made with it

        if not self.model:
            raise RuntimeError("it is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @cached_property
    def kind(self) -> int:
        """Return UNIGRAM, BPE, or another number of TrainerSpec.ModelType."""
        return int(self._section(_TRAINER).get(_MODEL_TYPE, UNIGRAM))

    @cached_property
    def charsmap(self) -> bytes:
        """Return the compiled table of a normalisation; empty for none."""
        return self._section(_NORMALIZER).get(_CHARSMAP, b"")

    @cached_property
    def dummy_prefix(self) -> bool:
        """Tell whether every text gets a space in front."""
        return bool(self._section(_NORMALIZER).get(_DUMMY_PREFIX, 1))

    @cached_property
    def removes_spaces(self) -> bool:
        """Tell whether spaces at the ends and repeated ones are dropped."""
        return bool(self._section(_NORMALIZER).get(_REMOVE_SPACES, 1))

    @cached_property
    def keeps_text(self) -> bool:
        """Tell whether every text comes back, and lines may be encoded apart.

        So it is where nothing is normalised, every byte has a piece, and no piece reaches over a line break: as
        Halfstep trains its own.
        """
        own = self.processor
        spelled = own.normalize(_PROBE) == _PROBE.replace(" ", META_SPACE)
        pieces = [own.id_to_piece(token) for token in range(own.get_piece_size())]
        return (
            spelled
            and all(own.is_byte(own.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256))
            and not any("\n" in piece for piece in pieces)
        )

    def is_normal(self, token: int) -> bool:
        """Tell whether a token stands for text, and is no byte, mark or unknown."""
        own = self.processor
        return not (own.is_byte(token) or own.is_control(token) or own.is_unknown(token))

    def table(self) -> dict[str, int] | list[str] | None:
        """Return the token table as a tokenizer.json has it: piece -> id (BPE), or the pieces in order (Unigram)."""
        pieces = [self.spelled(token) for token in range(self.processor.get_piece_size())]
        if self.kind == UNIGRAM:
            return pieces
        return {piece: token for token, piece in enumerate(pieces)} if self.kind == BPE else None

    def spelled(self, token: int) -> str:
        """Return a token's piece as an export has it.

        Where text is kept as it is, a space is spelled as itself: see `halfstep.launcher.export.sentencepiece_files`.
        """
        piece = self.processor.id_to_piece(token)
        return piece.replace(META_SPACE, " ") if self.keeps_text and self.is_normal(token) else piece

    def symbols(self) -> list[str]:
        """Return the pieces that whoever trained the model wanted whole, wherever a text has them."""
        parts = (dict(_fields(value)) for field, value in _fields(self.model) if field == _PIECE)
        return [part[_PIECE_TEXT].decode() for part in parts if part.get(_PIECE_TYPE) == _USER_DEFINED]

    def _section(self, number: int) -> dict[int, Any]:
        """Return the last value of each field of one of the model's parts."""
        return dict(_fields(self._sections.get(number, b"")))

    @cached_property
    def _sections(self) -> dict[int, bytes]:
        return {field: value for field, value in _fields(self.model) if isinstance(value, bytes)}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a Protocol Buffers message: the format itself, for the package that reads it may be missing.

    Raises ValueError where the bytes are no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(message):
            raise ValueError("it is cut short")
        yield field, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("it is cut short")
