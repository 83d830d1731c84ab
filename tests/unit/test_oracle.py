"""The reference trainer against textbook cases: AdamW, a scale by hand, a skip, a gradient too small for fp16."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from halfstep.launcher.engine.numerics.loss_scale import LossScale
from halfstep.launcher.parity.reference import MixedPrecisionTrainer, Muon, ParameterGroups, Scale, orthogonalized


def sgd(groups: ParameterGroups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)


def layer(dtype: torch.dtype, weight: list[float]) -> nn.Linear:
    made = nn.Linear(len(weight), 1, bias=False, dtype=dtype)
    made.weight.data.copy_(torch.tensor([weight]))
    return made


def times(model: nn.Module, factor: float) -> Tensor:
    """Return a loss whose gradient is `factor` for every weight."""
    return model(torch.ones(1, model.weight.shape[1], dtype=model.weight.dtype)).float().sum() * factor


def test_in_fp32_it_is_torch_adamw_to_the_bit() -> None:
    torch.manual_seed(3)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    trainer = MixedPrecisionTrainer(ours, lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(5):
        batch = torch.linspace(-1, 1, 20).reshape(4, 5) + step
        trainer.step([batch], lambda model, x: model(x).square().mean(), lr=0.01)
        plain.zero_grad()
        theirs(batch).square().mean().backward()
        plain.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_a_gradient_below_fp16_arrives_through_the_scale_and_not_without() -> None:
    tiny = 2.0**-26
    lost = layer(torch.float16, [1.0, 1.0])
    kept = layer(torch.float16, [1.0, 1.0])
    without = MixedPrecisionTrainer(lost, sgd)
    with_scale = MixedPrecisionTrainer(kept, sgd, scale=Scale(value=1024.0))
    assert without.step([tiny], times, lr=1.0).grad_norm == 0
    assert with_scale.step([tiny], times, lr=1.0).grad_norm == pytest.approx(tiny * math.sqrt(2))
    assert torch.equal(without.masters["weight"], torch.tensor([[1.0, 1.0]]))
    assert torch.equal(with_scale.masters["weight"], torch.tensor([[1.0, 1.0]]) - tiny)


def test_the_mean_is_over_micro_batches_and_clipping_sees_the_unscaled_norm() -> None:
    model = layer(torch.float16, [0.0])
    trainer = MixedPrecisionTrainer(model, sgd, clip=1.0, scale=Scale(value=256.0))
    done = trainer.step([2.0, 4.0], times, lr=0.5)
    assert (done.grad_norm, done.scale, done.skipped) == (3.0, 256.0, False)
    assert model.weight.item() == -0.5, "lr 0.5 times a gradient of 3 clipped to 1"


def test_a_step_with_a_nan_changes_nothing_but_the_scale() -> None:
    model = layer(torch.float16, [1.0])
    trainer = MixedPrecisionTrainer(
        model, lambda groups: torch.optim.AdamW(groups, lr=0.1), scale=Scale(value=8.0, window=2)
    )
    trainer.step([1.0], times, lr=0.1)
    before = {name: master.clone() for name, master in trainer.masters.items()}
    (state,) = trainer.optimizer.state.values()
    moment = state["exp_avg"].clone()
    done = trainer.step([math.nan], times, lr=0.1)
    assert done.skipped
    assert torch.equal(trainer.masters["weight"], before["weight"])
    assert torch.equal(state["exp_avg"], moment)
    assert float(state["step"]) == 1
    assert [trainer.step([1.0], times, lr=0.1).scale for _ in range(4)] == [4.0, 4.0, 4.0, 8.0]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 8))
def test_its_scale_moves_as_the_engines_does_though_the_two_share_no_code(
    overflows: list[bool], window: int, hysteresis: int, power: int
) -> None:
    reference = Scale(value=2.0**power, window=window, hysteresis=hysteresis, minimum=1.0)
    ours = LossScale(value=2.0**power, dynamic=True, window=window, hysteresis=hysteresis, minimum=1.0)
    for overflow in overflows:
        assert reference.value == ours.value
        reference.shrink() if overflow else reference.grow()
        ours.update(overflow)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (8, 3)])
def test_orthogonalizing_changes_singular_values_by_the_polynomial_and_nothing_else(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    near_1 = values / values.norm()
    for _ in range(5):
        near_1 = 3.4445 * near_1 - 4.7750 * near_1**3 + 2.0315 * near_1**5
    assert torch.allclose(orthogonalized(matrix), left @ near_1.diag() @ right, rtol=0, atol=1e-5)
    assert 0.6 < float(near_1.min()) <= float(near_1.max()) < 1.3


def test_muon_steps_matrices_by_its_momentum_and_the_rest_as_adamw_does_each_at_its_own_rate() -> None:
    torch.manual_seed(4)
    ours = nn.Linear(3, 6)
    theirs = nn.Parameter(ours.bias.detach().clone())
    plain = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    matrix, mean = ours.weight.detach().clone(), torch.zeros(6, 3)

    def group_of(weight: Tensor) -> dict[str, object]:
        return {"use_muon": weight.dim() == 2, "rate": 4.0 if weight.dim() == 2 else 0.5, "weight_decay": 0.1}

    trainer = MixedPrecisionTrainer(ours, lambda groups: Muon(groups, lr=1.0, momentum=0.9), group_of=group_of)
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        batch = torch.linspace(-1, 1, 12).reshape(4, 3) + step
        inputs = ours.weight.detach().clone().requires_grad_(), theirs.detach().clone().requires_grad_()
        (batch @ inputs[0].T + inputs[1]).square().mean().backward()
        gradient, theirs.grad = inputs[0].grad, inputs[1].grad
        assert gradient is not None
        mean = 0.9 * mean + 0.1 * gradient
        direction = orthogonalized(0.1 * gradient + 0.9 * mean) * math.sqrt(2)
        matrix = matrix * (1 - 4 * lr * 0.1) - 4 * lr * direction
        plain.param_groups[0]["lr"] = lr / 2
        plain.step()
        trainer.step([batch], lambda model, x: model(x).square().mean(), lr=lr)
        assert torch.allclose(ours.weight, matrix, rtol=0, atol=1e-5)
        assert torch.allclose(ours.bias, theirs, rtol=0, atol=1e-6)
