"""A slow rank is named within 20 steps, a noisy one is not, and only a rank's own work counts."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import set_z3_leaf_module

from halfstep.launcher.engine.ranks.stragglers import Pace, Stragglers


def noise(generator: np.random.Generator, sigma: float, steps: int, world: int) -> np.ndarray:
    """Return every rank's seconds: lognormal, and one step in fifty takes five times as long."""
    seconds = generator.lognormal(-3, sigma, (steps, world))
    return np.where(generator.random((steps, world)) < 0.02, seconds * 5, seconds)


def alarms(seconds: np.ndarray, factor: float = 1.3) -> Iterator[tuple[int, dict[str, Any]]]:
    watch = Stragglers(seconds.shape[1], factor)
    for step, row in enumerate(seconds, start=1):
        if slow := watch.see(step, row.tolist()):
            yield step, slow


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("start", [0, 100])
def test_a_rank_that_takes_half_as_long_again_is_named_within_20_steps(world: int, start: int) -> None:
    generator = np.random.default_rng(world + start)
    for _ in range(20):
        seconds = noise(generator, 0.1, start + 20, world)
        seconds[start:, 1] *= 1.5
        (step, slow), *more = alarms(seconds)
        assert start < step <= start + 20
        assert slow["rank"] == 1
        assert 1.3 <= slow["ratio"] < 1.8
        assert not more, "once an episode"


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_thousand_clean_steps_raise_no_alarm(world: int) -> None:
    generator = np.random.default_rng(world)
    for sigma in (0.05, 0.1, 0.2, 0.5):
        assert not list(alarms(noise(generator, sigma, 1000, world)))


def test_a_rank_that_has_been_fast_again_is_named_a_second_time() -> None:
    seconds = np.full((120, 3), 0.1)
    seconds[20:40, 2] *= 2
    seconds[80:100, 2] *= 2
    first, second = alarms(seconds)
    assert first[1]["rank"] == second[1]["rank"] == 2
    assert second[0] > 80


def test_two_slow_ranks_of_five_are_both_named() -> None:
    seconds = np.full((40, 5), 0.1)
    seconds[:, [1, 3]] *= [1.5, 1.6]
    assert [slow["rank"] for _, slow in alarms(seconds)] == [3, 1]


@pytest.mark.parametrize(("factor", "value"), [(0.0, 0.5), (1.3, 0.0), (1.3, float("nan"))])
def test_nobody_is_named_where_that_is_off_or_unknown(factor: float, value: float) -> None:
    seconds = np.full((60, 2), 0.1)
    seconds[:, 1] = value
    assert not list(alarms(seconds, factor))
    assert not list(alarms(seconds[:, :1]))


def engine(zero: int) -> tuple[Any, Any]:
    """Return an engine of two layers whose weights take 20 ms to fetch, as DeepSpeed's hooks do it, and its plan."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for layer in module if zero == 3 else ():
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        layer.register_forward_hook(lambda *_: time.sleep(0.02))
    return SimpleNamespace(module=module, device=torch.device("cpu")), SimpleNamespace(zero=zero)


@pytest.mark.parametrize("zero", [2, 3])
def test_own_work_counts_and_the_gathering_of_weights_does_not(zero: int) -> None:
    built, plan = engine(zero)
    pace = Pace(built, plan)
    for _ in range(2):
        with pace.forward():
            time.sleep(0.03)
            built.module(torch.ones(1, 4))
    assert 0.06 <= pace.seconds() < 0.1
    built.module(torch.ones(1, 4))  # an evaluation, or a backward pass that computes again
    assert pace.seconds() == 0


def test_a_module_within_one_that_is_fetched_as_a_whole_is_left_alone() -> None:
    built, plan = engine(3)
    set_z3_leaf_module(built.module, True)
    Pace(built, plan)
    assert [len(module._forward_hooks) for module in (built.module, *built.module)] == [2, 1, 1], "1: DeepSpeed's own"
