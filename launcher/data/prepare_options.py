"""Refuse the options of a preparation that cannot be, before anything is read."""

import os

from halfstep.launcher.data import chat, formats
from halfstep.launcher.errors import RequestError

_LARGEST_FRACTION = 0.3


def check(vocab_size: int | None, tokenizer: str | None, validation: float, workers: int | None) -> int:
    """Refuse impossible options; return the number of processes."""
    if vocab_size is None and tokenizer is None:
        raise RequestError(
            "nothing says how to tokenise", where="no --vocab-size, no --tokenizer", fix="--vocab-size 4096"
        )
    if vocab_size is not None and vocab_size < 1:
        raise RequestError(
            f"a vocabulary of {vocab_size} tokens holds nothing", where="--vocab-size", fix="--vocab-size 4096"
        )
    if not 0 < validation <= _LARGEST_FRACTION:
        raise RequestError(
            f"{validation} of the tokens cannot be held back for validation",
            where="--validation-fraction",
            fix=f"a share above 0 and at most {_LARGEST_FRACTION}, such as 0.01",
        )
    if workers is not None and workers < 1:
        raise RequestError(f"{workers} processes do no work", where="--workers", fix="--workers 1")
    return workers or len(os.sched_getaffinity(0))


def check_layout(
    format: str, template: str | None, targets: str | None, vocab_size: int | None = None, field: str = "text"
) -> None:
    """Refuse what only examples have, where the source holds others, and what they have not."""
    if format == formats.SFT and field != "text":
        raise RequestError(
            "examples are read by the fields messages, or prompt and completion",
            where=f"--field {field}",
            fix="leave it out, and name the fields so",
        )
    if template == chat.TOKENIZER and vocab_size is not None:
        raise chat.no_template()
    for option, value, choices in (
        ("--template", template, chat.CHOICES),
        ("--targets", targets, (chat.ALL, chat.LAST)),
    ):
        if value is not None and format != formats.SFT:
            raise RequestError(
                f"{option} is about conversations, and these are read as text",
                where=f"{option} {value}",
                fix=f"--format {formats.SFT}, or leave it out",
            )
        if value is not None and value not in choices:
            raise RequestError(
                f"there is no {option.strip('-')} {value!r}",
                where=f"{option} {value}",
                fix=f"one of {', '.join(choices)}",
            )
