"""Validation is a share of the tokens: whole small documents and tails of large ones, from all over the corpus."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.launcher.data.split import validation_tokens


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 5000) | st.integers(2, 20), min_size=1, max_size=400),
    fraction=st.floats(0.001, 0.3),
    seed=st.integers(0, 2**32),
)
def test_the_share_held_back_is_the_one_asked_for(lengths: list[int], fraction: float, seed: int) -> None:
    held = validation_tokens(np.array(lengths), fraction, seed)
    target = max(1, round(fraction * sum(lengths)))
    assert 15 / 16 * target - 1 <= held.sum() <= target
    assert (held >= 0).all()
    # A document is on one side, or divided with at least half of it left for training.
    assert ((held == lengths) | (held <= np.array(lengths) // 2)).all()


def test_one_document_gives_its_tail() -> None:
    assert validation_tokens(np.array([10_000]), 0.01, 0).tolist() == [100]


def test_small_documents_are_never_divided_and_come_from_everywhere() -> None:
    held = validation_tokens(np.full(10_000, 50), 0.05, 3)
    chosen = np.flatnonzero(held)
    assert held.sum() == 0.05 * 500_000
    assert set(held.tolist()) == {0, 50}
    # 500 documents of 10,000: every tenth of the corpus gives about 50.
    assert min(np.histogram(chosen, bins=10, range=(0, 10_000))[0]) > 25


def test_large_documents_share_the_burden() -> None:
    held = validation_tokens(np.full(100, 10_000), 0.01, 0)
    assert held.sum() == 10_000
    assert sorted(held[held > 0].tolist()) == [625] * 16


def test_a_large_document_among_small_ones_is_held_back_in_proportion() -> None:
    lengths = np.array([1_000_000, *[100] * 1000])
    held = validation_tokens(lengths, 0.01, 0)
    assert held.sum() == 11_000
    assert held[0] == 10_000


def test_another_seed_holds_back_other_documents() -> None:
    lengths = np.full(1000, 50)
    first, again, other = (validation_tokens(lengths, 0.1, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
