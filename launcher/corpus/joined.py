"""Read the corpora of a request, one or several mixed by weight, and check that a model can be trained on them all."""

import os
from collections.abc import Sequence

from halfstep.launcher.config import mixture
from halfstep.launcher.config.digest import digest
from halfstep.launcher.corpus.description import DataFacts, Part, read_data
from halfstep.launcher.errors import RequestError


def read_corpora(text: str) -> DataFacts:
    """Return what `data` says of itself: of a mixture all parts together, and each.

    Raises RequestError for what `read_data` refuses, and for parts that do not belong together.
    """
    named = mixture.parts(text)
    if not named:
        return read_data(text)
    parts = tuple(Part(corpus=read_data(part.path), weight=part.weight) for part in named)
    corpora = [part.corpus for part in parts]
    _require_different([part.path for part in corpora])
    for corpus in corpora:
        _require_validation(corpus)
        _require_same_tokenizer(corpora[0], corpus)
    first = corpora[0]
    largest = [corpus.max_token_id for corpus in corpora]
    return DataFacts(
        path=text,
        train_prefix="",
        validation_prefix=None,
        train_tokens=sum(corpus.train_tokens for corpus in corpora),
        validation_tokens=sum(corpus.validation_tokens for corpus in corpora),
        vocabulary=first.vocabulary,
        max_token_id=None if None in largest else max(token for token in largest if token is not None),
        tokenizer=first.tokenizer,
        has_tokenizer=True,
        digest=digest([[part.corpus.digest, part.weight] for part in parts]),
        tokens_digest=digest([corpus.tokens_digest for corpus in corpora]),
        parts=parts,
    )


def _require_different(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        first = seen.setdefault(os.path.realpath(path), path)
        if first is not path:
            raise RequestError(
                f"{path} is twice in the mixture" if path == first else f"{path} and {first} are the same corpus",
                where="data, a mixture",
                fix="name it once, with the sum of the two weights",
            )


def _require_validation(corpus: DataFacts) -> None:
    if corpus.validation_prefix is None:
        raise RequestError(
            f"{corpus.path} has no validation split, and a mixture is evaluated part by part",
            where=f"data, its part {corpus.path}",
            fix="prepare it with a larger --validation-fraction or with more text, or leave it out"
            + ("" if corpus.has_tokenizer else "; a bare Megatron pair has none"),
        )


def _require_same_tokenizer(first: DataFacts, other: DataFacts) -> None:
    if first.tokenizer.same(other.tokenizer) is not True or first.vocabulary != other.vocabulary:
        raise RequestError(
            f"{first.path} and {other.path} were made with different tokenizers ({first.vocabulary} tokens, "
            f"{first.tokenizer.short}, and {other.vocabulary} tokens, {other.tokenizer.short})",
            where="data, a mixture",
            fix=f"prepare {other.path} again with --tokenizer {first.path}",
        )
