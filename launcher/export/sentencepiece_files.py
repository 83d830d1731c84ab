"""Write a SentencePiece model as a tokenizer of the `tokenizers` library, which transformers loads without protobuf.

The same pieces, chosen in the same way, the same bytes where a character has no piece, and the same normalisation.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from halfstep.launcher.corpus.pieces import BPE, META_SPACE, UNIGRAM, Pieces
from halfstep.launcher.errors import RequestError

_NEVER = -1000.0
"""A Unigram score that no way through a text prefers: marks and bytes that a text spells out stay text."""


def from_sentencepiece(model: bytes) -> tuple[Tokenizer, str]:
    """Return a SentencePiece model as a tokenizer of the `tokenizers` library, and its end-of-text token.

    A model that keeps text as it is, as all that Halfstep trains, has pieces here that spell a space as itself, not as
    SentencePiece's block: the block, where a text has one, then has no piece and becomes its bytes, as
    `data.tokenizer.SentencePiece` does it. No token of such a model reaches over a line break, so lines are words: the
    library keeps words it has seen. Raises RequestError for the kinds that the library does not have.
    """
    pieces = Pieces(model)
    own = pieces.processor
    if pieces.kind not in (BPE, UNIGRAM):
        raise RequestError(
            "its SentencePiece model is neither BPE nor Unigram, and transformers has no other",
            where="the corpus's tokenizer.model",
            fix="read the text with sentencepiece itself",
        )
    tokenizer = Tokenizer(_unigram(pieces) if pieces.kind == UNIGRAM else _bpe(pieces))
    if pieces.keeps_text:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.normalizer = _normalizer(pieces)
        tokenizer.decoder = _decoder(pieces)
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces.symbols()])
    return tokenizer, own.id_to_piece(own.eos_id())


def _bpe(pieces: Pieces) -> models.BPE:
    """Merges are all the ways to put a piece together, in the order of the pieces' scores."""
    own, table = pieces.processor, pieces.table()
    assert isinstance(table, dict), "a model of another kind has no such table"
    scores = {piece: own.get_score(token) for piece, token in table.items() if pieces.is_normal(token)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    unknown = {} if pieces.keeps_text else {"unk_token": own.id_to_piece(own.unk_id()), "fuse_unk": True}
    return models.BPE(vocab=table, merges=merges, byte_fallback=_has_bytes(pieces), **unknown)


def _unigram(pieces: Pieces) -> models.Unigram:
    own = pieces.processor
    table = [
        (pieces.spelled(token), own.get_score(token) if pieces.is_normal(token) else _NEVER)
        for token in range(own.get_piece_size())
    ]
    return models.Unigram(table, own.unk_id(), _has_bytes(pieces))


def _has_bytes(pieces: Pieces) -> bool:
    own = pieces.processor
    return own.is_byte(own.piece_to_id("<0x00>"))


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.removes_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", META_SPACE))
    if pieces.dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"\A(?=[\s\S])"), META_SPACE))
    return normalizers.Sequence(steps)


def _decoder(pieces: Pieces) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
