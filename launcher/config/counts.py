"""The numbers that run keys take: how people write them, and how large they may be."""

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

LAYERS = 10_000
"""Transformer blocks; a forecast of memory lists every tensor."""
WIDTH = 2**20
"""Hidden size, and heads."""
ROWS = 2**31 - 1
"""Of the embedding or of positions: what a token id of four bytes can count."""
RANKS = 2**20
"""Processes; a forecast of memory looks at the share of every one."""

_MOST_DIGITS = 30


def _integral(value: Any) -> Any:
    """Let `2e9` and `1_000` stand for whole numbers, which is how people write token counts; every digit counts."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    if isinstance(value, str):
        try:
            number = Decimal(value.replace("_", ""))
        except InvalidOperation:
            return value
        if not number.is_finite():
            raise ValueError("input should be a finite number")
        if number.adjusted() > _MOST_DIGITS:
            raise ValueError(f"no number of a run has more than {_MOST_DIGITS} digits")
        return int(number) if number == number.to_integral_value() else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Bounds of what can be planned and run; the largest published models and clusters lie far below them.
Count = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=10**12)]
CountOrZero = Annotated[int, BeforeValidator(_integral), Field(ge=0, le=10**12)]
Tokens = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=10**18)]
Sequences = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=10**9)]
Layers = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=LAYERS)]
Checkpoints = Annotated[int, BeforeValidator(_integral), Field(ge=2, le=10**12)]
Width = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=WIDTH)]
Rows = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=ROWS)]
Seed = Annotated[int, BeforeValidator(_integral), Field(ge=0, le=10**18)]
Hosts = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=RANKS)]
Seconds = Annotated[float, Field(gt=0, le=10**8)]
SecondsOrZero = Annotated[float, Field(ge=0, le=10**8)]
