"""The loss-scale rule: the one DeepSpeed documents, by hand and against DeepSpeed's own scaler on any sequence."""

import math
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher import fault_injection
from halfstep.launcher.engine.numerics.loss_scale import LossScale
from halfstep.launcher.engine.numerics.repair import is_unscaled
from halfstep.launcher.errors import RefusedError, RequestError


def series(scale: LossScale, overflows: list[bool]) -> list[float]:
    values = []
    for overflow in overflows:
        values.append(scale.value)
        scale.update(overflow)
    return values


def test_a_sequence_by_hand() -> None:
    scale = LossScale(value=1024, dynamic=True, window=2, hysteresis=2, minimum=256)
    # The first overflow is forgiven, the second halves; two clean steps, and the third one doubles.
    assert series(scale, [True, True, False, False, False, False]) == [1024, 1024, 512, 512, 512, 1024]
    # Growing has restored the hysteresis: once more the first is forgiven.
    assert series(scale, [True, True, True, True, True]) == [1024, 1024, 512, 256, 256]


def test_an_overflow_at_the_smallest_scale_cannot_be_cured() -> None:
    scale = LossScale(value=4, dynamic=True, hysteresis=1, minimum=1)
    assert [scale.update(True) for _ in range(4)] == [True, True, False, False]
    assert scale.value == 1


def test_a_fixed_scale_never_moves_and_cures_nothing() -> None:
    scale = LossScale.of({"loss_scale": 128, "initial_scale_power": 16})
    assert [scale.update(overflow) for overflow in (False, True, False)] == [True, False, True]
    assert scale.value == 128


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 12),
    st.integers(0, 12),
    st.booleans(),
)
def test_any_sequence_moves_the_scale_as_deepspeeds_own_scaler_does(
    overflows: list[bool], window: int, hysteresis: int, power: int, minimum: int, consecutive: bool
) -> None:
    from deepspeed.runtime.fp16 import loss_scaler

    smallest = 2.0 ** min(power, minimum)
    ours = LossScale(
        value=2.0**power,
        dynamic=True,
        window=window,
        hysteresis=hysteresis,
        minimum=smallest,
        consecutive_hysteresis=consecutive,
    )
    theirs = loss_scaler.DynamicLossScaler(2.0**power, window, smallest, hysteresis, consecutive)
    for overflow in overflows:
        assert ours.value == theirs.cur_scale
        stopped = overflow and theirs.cur_hysteresis == 1 and theirs.cur_scale == smallest
        with mock.patch.object(loss_scaler.dist, "get_rank", return_value=1):  # it asks whether to log
            if stopped:
                with pytest.raises(Exception, match="already at minimum"):
                    theirs.update_scale(overflow)
            else:
                theirs.update_scale(overflow)
        assert ours.update(overflow) is not stopped
        if stopped:
            return


@pytest.mark.parametrize(
    ("seen", "reference", "scale", "unscaled"),
    [(0.5, 0.5, 256, True), (0.98, 1.0, 65536, True), (512, 2.0, 256, False), (65000, 1.0, 65536, False),
     (math.inf, 1.0, 2**24, False), (math.nan, 1.0, 2**24, False)],
)  # fmt: skip
def test_the_canary_tells_a_scaled_gradient_from_an_unscaled_one(
    seen: float, reference: float, scale: float, unscaled: bool
) -> None:
    assert is_unscaled(seen, reference, scale) is unscaled


@pytest.mark.parametrize(("seen", "reference"), [(0.5, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_the_canary_refuses_what_it_does_not_know(seen: float, reference: float) -> None:
    with pytest.raises(RefusedError, match="times those of the loss, which is neither 1 nor the scale"):
        is_unscaled(seen, reference, 256)


def test_faults_are_inert_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    assert fault_injection.armed("fwd", rank=0, step=1) is None
    monkeypatch.setenv(fault_injection.VARIABLE, "fwd:1:7:nan, bwd:*:3-4:inf,fwd:0:20-:nan")

    def hit(point: str, rank: int, step: int) -> str | None:
        return fault_injection.armed(point, rank=rank, step=step)

    assert [hit("fwd", 1, step) for step in (6, 7, 8)] == [None, "nan", None]
    assert [hit("bwd", 5, step) for step in (2, 3, 4, 5)] == [None, "inf", "inf", None]
    assert [hit("fwd", 0, step) for step in (7, 19, 20, 1000)] == [None, None, "nan", "nan"]


@pytest.mark.parametrize("said", ["fwd:1:7", "fwd:1:7:explode", "nowhere:0:1:nan", "fwd:x:1:nan", "fwd:0:a:nan"])
def test_a_fault_that_nobody_can_set_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(fault_injection.VARIABLE, said)
    with pytest.raises(RequestError) as caught:
        fault_injection.armed("fwd", rank=0, step=1)
    assert caught.value.where == "HALFSTEP_FAULT"
    assert "POINT:RANK:STEPS:ACTION" in caught.value.fix
