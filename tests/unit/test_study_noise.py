"""Noise between seeds, by numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.study.noise import between_seeds, t95


def test_cells_that_scatter_alike_are_pooled() -> None:
    noise = between_seeds({"a": [0.0, 2.0], "b": [0.0, 4.0], "c": [1.0, 1.0]})  # variances 2, 8 and 0
    assert [spread.deviation for spread in noise.values()] == pytest.approx([math.sqrt(10 / 3)] * 3)
    assert {(spread.freedom, spread.own) for spread in noise.values()} == {(3, False)}
    assert noise["a"].interval(2) == pytest.approx(3.182 * math.sqrt(10 / 3 / 2))


def test_one_noisy_cell_hides_nothing_in_the_others() -> None:
    quiet = {name: [0.0, 0.01] for name in "abcd"}
    noise = between_seeds({**quiet, "noisy": [0.0, 3.0]})
    assert noise["noisy"].own
    assert noise["noisy"].freedom == 1
    assert noise["a"] == between_seeds(quiet)["a"]


def test_one_seed_has_no_noise() -> None:
    assert between_seeds({"a": [1.0], "b": []}) == {}


@given(st.integers(1, 200))
def test_quantiles_of_t_fall_with_the_degrees_of_freedom(freedom: int) -> None:
    assert t95(freedom) >= t95(freedom + 1) >= 1.96
