"""The order of the data: a permutation an epoch, the same for ever, for any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.launcher.data.order import permute, windows_of_step

seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), seed=seeds, epoch=st.integers(0, 10**6))
def test_the_permutation_sends_a_range_onto_itself(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(num_windows=st.integers(1, 300), global_batch=st.integers(1, 64), seed=seeds)
def test_every_window_comes_once_an_epoch_across_the_borders_of_steps(
    num_windows: int, global_batch: int, seed: int
) -> None:
    steps = -(-3 * num_windows // global_batch)
    stream = np.concatenate([windows_of_step(seed, step, global_batch, num_windows) for step in range(1, steps + 1)])
    for epoch in range(3):
        order = stream[epoch * num_windows : (epoch + 1) * num_windows]
        assert np.array_equal(np.sort(order), np.arange(num_windows))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, step=st.integers(1, 10**9), num_windows=st.integers(1, 10**12))
def test_a_sequence_does_not_depend_on_how_the_run_is_cut_into_steps(seed: int, step: int, num_windows: int) -> None:
    whole = windows_of_step(seed, step, 16, num_windows)
    halves = [windows_of_step(seed, 2 * step - 1, 8, num_windows), windows_of_step(seed, 2 * step, 8, num_windows)]
    assert np.array_equal(whole, np.concatenate(halves))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_shares_of_the_ranks_make_the_same_batch_for_any_world_size(ranks: int) -> None:
    shares = [windows_of_step(5, 9, 12, 1000).reshape(ranks, -1)[rank] for rank in range(ranks)]
    assert np.array_equal(np.concatenate(shares), windows_of_step(5, 9, 12, 1000))


@pytest.mark.parametrize(
    ("seed", "step", "global_batch", "num_windows", "expected"),
    [
        (1234, 1, 8, 1000, [225, 863, 293, 69, 358, 526, 51, 940]),
        (1234, 126, 8, 1003, [857, 971, 624, 516, 182, 283, 549, 787]),
        (0, 10**9, 4, 10**12, [120774171179, 957350168621, 56732383999, 104474492718]),
        (7, 3, 6, 4, [3, 1, 0, 2, 3, 2]),
    ],
)
def test_the_order_is_the_one_it_has_always_been(
    seed: int, step: int, global_batch: int, num_windows: int, expected: list[int]
) -> None:
    assert windows_of_step(seed, step, global_batch, num_windows).tolist() == expected


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0), (2, 1), (0, 1)]]
    for first in range(len(orders)):
        for other in range(first):
            # Two random orders of 1000 agree in one place on average, in ten once in ten million.
            assert (orders[first] == orders[other]).sum() < 10


@pytest.mark.parametrize("size", [10_000, 2**17, 2**17 + 1])
def test_the_order_is_not_correlated_with_the_corpus_or_its_neighbours(size: int) -> None:
    order, later = permute(np.arange(size), size, 7, 3), permute(np.arange(size), size, 7, 4)
    pairs = [(order, np.arange(size)), (order[1:], order[:-1]), (order[2:], order[:-2]), (order, later)]
    for first, other in pairs:
        # The coefficient of independent orders has a standard deviation of 1 / sqrt(size).
        assert abs(np.corrcoef(first, other)[0, 1]) * np.sqrt(size) < 4


def test_steps_count_from_one() -> None:
    with pytest.raises(AssertionError, match="steps count from 1"):
        windows_of_step(0, 0, 8, 100)
