"""The page docs/mixed-precision.md is true: its sessions print its numbers, and its programs do what it says of them.

The programs are taken from the page itself, so that what is asserted here is what a reader sees.
"""

import doctest
import itertools
import math
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mixed-precision.md"


@pytest.fixture(scope="module")
def page() -> tuple[doctest.TestResults, dict[str, Any]]:
    """Return what came of the page's sessions, and every name that they made."""
    parsed = doctest.DocTestParser().get_doctest(PAGE.read_text(encoding="utf-8"), {}, PAGE.name, str(PAGE), 0)
    with torch.random.fork_rng():
        result = doctest.DocTestRunner().run(parsed, clear_globs=False)
    return result, parsed.globs


def test_every_number_of_the_page_is_what_its_session_prints(page: tuple[doctest.TestResults, dict]) -> None:
    assert "doctest: +" not in PAGE.read_text(encoding="utf-8")  # an option that skips or loosens a line
    assert page[0].failed == 0, "each difference is in the captured output"
    assert page[0].attempted > 130


def test_the_list_of_the_whole_step_quotes_the_reference() -> None:
    source = (ROOT / "launcher" / "parity" / "reference.py").read_text(encoding="utf-8")
    (steps,) = re.findall(r"^1\. Once.*?^9\. .*?$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"`([^`]+)`", steps)
    assert len(quoted) == 19
    assert [line for line in quoted if line not in source] == []


def fp16(value: Fraction | float) -> Fraction:
    """Round to fp16 without torch."""
    return Fraction(struct.unpack("<e", struct.pack("<e", float(value)))[0])


def layer_by_hand(rounded: Callable[[Fraction], Fraction], scale: int) -> dict[str, list]:
    """Return the page's 10 -> 5 layer in exact fractions, rounded where a format would round."""
    x = [Fraction((3 * feature) % 11 - 5, 8) for feature in range(10)]
    y = [Fraction(unit, 5) for unit in range(5)]
    exact = [[Fraction((7 * unit + 5 * feature) % 9 - 4, 10) for feature in range(10)] for unit in range(5)]
    weights = [[rounded(weight) for weight in row] for row in exact]
    products = [[weight * value for weight, value in zip(row, x, strict=True)] for row in weights]
    sums = [rounded(sum(row)) for row in products]
    outputs = [rounded(total + rounded(Fraction(unit - 2, 10))) for unit, total in enumerate(sums)]
    error = [output - target for output, target in zip(outputs, y, strict=True)]
    slope = [rounded(2 * scale * part / 5) for part in error]
    gradient = [[rounded(part * value) for value in x] for part in slope]
    masters = [
        [weight - Fraction(1, 5) * part / scale for weight, part in zip(row, parts, strict=True)]
        for row, parts in zip(exact, gradient, strict=True)
    ]
    return {
        "W": weights, "products": products, "sum": sums, "y_hat": outputs, "error": error, "dy_hat": slope,
        "dW": gradient, "db": slope, "dW unscaled": [[part / scale for part in row] for row in gradient],
        "loss": [sum(part**2 for part in error) / 5], "W master": masters,
        "b master": [Fraction(unit - 2, 10) - part / scale / 5 for unit, part in enumerate(slope)],
        "W copy": [[rounded(value) for value in row] for row in masters],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "scale"), [("in_fp32", 1), ("in_fp16", 1024)])
def test_the_layer_of_ten_inputs_agrees_with_fractions_in_every_number(
    page: tuple[doctest.TestResults, dict], name: str, scale: int
) -> None:
    exact = layer_by_hand(fp16 if name == "in_fp16" else Fraction, scale)
    for what, numbers in exact.items():
        expected = torch.tensor([[float(v) for v in row] if isinstance(row, list) else float(row) for row in numbers])
        seen = page[1][name][what].float().reshape(expected.shape)
        # Only what fp32 itself rounds is left: a wrong rounding to fp16 would be 2^-12 of a number.
        assert torch.allclose(seen, expected, rtol=2e-6, atol=1e-7), what


@pytest.fixture(scope="module")
def losses(page: tuple[doctest.TestResults, dict]) -> Callable[..., list[float]]:
    """Return the losses that the page's SimpleModel prints, by the name of the way and the options of `train`."""
    ways, train = page[1]["ways"], page[1]["train"]
    return lambda way, **options: list(train(**ways[way], **options).values())


def test_the_small_model_learns_the_same_in_every_way_and_its_loss_falls_as_it_prints(losses: Callable) -> None:
    reference = losses("fp32")
    assert reference[-1] < reference[0] / 5
    for way in ("fp32", "bf16", "fp16", "fp16, scaler"):
        seen = losses(way)
        assert all(later < earlier for earlier, later in itertools.pairwise(seen)), way
        assert seen == pytest.approx(reference, rel=0.02), way


def test_fp16_without_a_scaler_stands_still_where_the_gradients_are_too_small(losses: Callable) -> None:
    reference, small = losses("fp32"), 2.0**-24
    assert losses("fp32", factor=small) == reference, "a power of two changes no bit of fp32"
    assert losses("bf16", factor=small) == pytest.approx(reference, rel=0.02)
    assert losses("fp16, scaler", factor=small) == pytest.approx(reference, rel=0.02)
    stuck = losses("fp16", factor=small)
    assert stuck == [stuck[0]] * len(stuck)


def test_clipping_before_unscaling_takes_the_step_away(losses: Callable) -> None:
    right = losses("fp16, scaler", clip=0.5)
    wrong = losses("fp16, scaler", clip=0.5, clip_first=True)
    assert losses("fp32", clip=0.5) == pytest.approx(right, rel=0.02)
    assert right[-1] < wrong[-1] / 5
    assert wrong[-1] == pytest.approx(wrong[0], rel=1e-3)
    assert math.isfinite(wrong[-1])
