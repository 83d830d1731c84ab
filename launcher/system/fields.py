"""What a value in a record may be, and whether a record is one: what a file says is believed only as far as that."""

import functools
import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

LARGEST = 2**53
"""Whole numbers up to here are the same in every program that reads JSON."""


def not_tiny(number: float) -> float:
    """Return a number by which others can be divided, or zero; raises ValueError for one in between."""
    if 0 < number < 1e-40:
        raise ValueError("is too small to be measured")
    return number


Whole = Annotated[int, Field(strict=True, ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e40, le=1e40)]
"""As large as fp32 has it: sums and squares of such numbers are finite."""
Measured = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1e40), AfterValidator(not_tiny)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]

_Kind = TypeVar("_Kind")


def plain_name(text: str) -> str:
    """Return the name of a file in a folder; raises ValueError where it leads anywhere else."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}", text):
        raise ValueError("is no plain name of a file")
    return text


Name = Annotated[Text, AfterValidator(plain_name)]


def checked(kind: type[_Kind], tree: Any) -> _Kind:
    """Return what a JSON value says as a dataclass, or whatever `kind` is; keys that it does not know are left out.

    Raises ValueError with the first thing that is wrong, the key before it.
    """
    try:
        return _adapter(kind).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "missing":
            raise ValueError(f"it has no {place}") from None
        shown = "" if isinstance(first["input"], dict | list) else f" = {_shown(first['input'])}"
        raise ValueError(f"{place or 'it'}{shown} {said}") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."
