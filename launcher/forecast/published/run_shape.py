"""The shape of a published row: what it says, and where it says only how many parameters, what such models have."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from halfstep.models import shapes
from halfstep.models.shapes import Shape


def shape_of(text: Mapping[str, str], sequence: int) -> tuple[Shape | None, int]:
    """Return the shape and the parameters; where the row gives only these, a shape as wide as such models are."""
    billions = number(text.get("model_params_B", ""))
    layers, width, heads, ffn = (whole(text.get(name, "")) for name in ("layers", "hidden", "heads", "ffn"))
    vocabulary = whole(text.get("vocab", "")) or 50257
    if width is None:
        if billions is None:
            return None, 0
        # The published families keep about 128 of width a layer: N = 12 L h^2 = 12 h^3 / 128.
        width = max(128, round((billions * 1e9 * 128 / 12) ** (1 / 3) / 128) * 128)
        layers = layers or max(1, round(billions * 1e9 / (12 * width**2)))
    if layers is None:
        layers = max(1, round((billions or 0) * 1e9 / (12 * width**2))) if billions else max(1, width // 128)
    if heads is None or width % heads:
        heads = max(1, width // 128)
    best: Shape | None = None
    for shape in _candidates(layers, width, heads, ffn, vocabulary, sequence):
        if best is None or (billions and _off(shape, billions) < _off(best, billions)):
            best = shape
    assert best is not None, "there is always a GPT-2 shape"
    return best, round(billions * 1e9) if billions else shapes.parameters(best)


def _candidates(
    layers: int, width: int, heads: int, ffn: int | None, vocabulary: int, sequence: int
) -> Iterator[Shape]:
    common: dict[str, Any] = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "head_dim": width // heads,
        "vocabulary": vocabulary,
    }
    common |= {"positions": sequence}
    yield Shape(family="gpt2", kv_heads=heads, ffn=ffn or 4 * width, tied=True, **common)
    if ffn and ffn != 4 * width:
        for share in (1, 2, 4, 8, 16):
            if heads % share == 0:
                yield Shape(family="llama", kv_heads=heads // share, ffn=ffn, tied=False, **common)


def _off(shape: Shape, billions: float) -> float:
    return abs(math.log(shapes.parameters(shape) / (billions * 1e9)))


def number(text: str) -> float | None:
    """Return the first number of a text, with its k, M or B; None where there is none that makes sense."""
    matched = re.match(r"\s*~?(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kKMB]?)(?![A-Za-z])", text)
    if not matched:
        return None
    number = float(matched[1].replace(",", "")) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}[matched[2]]
    return number if 0 < number < 1e18 else None


def whole(text: str) -> int | None:
    """Return the first number of a text, rounded; None where there is none."""
    value = number(text)
    return max(1, round(value)) if value else None
