"""The optimizer's states move between the implementations of Adam: a run goes on as if it had always had the other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import fused_adam
from torch import Tensor, nn

from halfstep.launcher.engine.state import training_state

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BEFORE, AFTER = 3, 2
IMPLEMENTATIONS = ("torch's", "torch's fused", "FusedAdam")


def kernel(_: int, __: Tensor, lists: list[list[Tensor]], *options: Any) -> None:
    """Do what DeepSpeed's CUDA kernel does (csrc/adam/multi_tensor_adam.cu), in torch."""
    rate, beta1, beta2, eps, step, decoupled, corrected, decay = options
    assert (decoupled, corrected) == (1, 1)
    for gradient, weight, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        width = (square / (1 - beta2**step)).sqrt() + eps
        weight.sub_(rate * (mean / (1 - beta1**step) / width + decay * weight))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(multi_tensor_adam=kernel)
    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", lambda: SimpleNamespace(load=lambda: built))


def muon_engine() -> Any:
    """Return a stage-0 engine with DeepSpeed's Muon for the matrix and torch's AdamW for the bias."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "use_muon": True, "lr": 0.02, "momentum": 0.9},
        {"params": [model.bias], "use_muon": False, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8},
    ]
    optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
    return SimpleNamespace(module=model, optimizer=optimizer, zero_optimization=lambda: False)


def engine_of(kind: str, device: str = "cpu") -> Any:
    """Return a stage-0 engine in fp32 as far as its states are looked at: the optimizer over the parameters."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3).to(device)
    if kind == "FusedAdam":
        optimizer: torch.optim.Optimizer = fused_adam.FusedAdam(model.parameters(), **OPTIONS)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=kind == "torch's fused" or None, **OPTIONS)
    return SimpleNamespace(module=model, optimizer=optimizer, zero_optimization=lambda: False)


def train(engine: Any, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        for number, parameter in enumerate(engine.module.parameters()):
            random = torch.Generator().manual_seed(10 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=random)
        engine.optimizer.step()


def move(old: Any, new: Any) -> None:
    """Do what saving and restoring do."""
    pieces = training_state.fragments(old)
    held = {piece.name: training_state.tensors(old, piece) for piece in pieces}
    kinds = sorted({kind for states in held.values() for kind in states} - {training_state.MASTER})
    steps = max(training_state.step_count(old, piece) or 0.0 for piece in pieces)
    assert (kinds, steps, training_state.left_out(old)) == (["exp_avg", "exp_avg_sq"], BEFORE, [])
    training_state.create_optimizer_states(new, kinds, steps)
    for piece in training_state.fragments(new):
        for state, view in training_state.tensors(new, piece).items():
            view.copy_(held[piece.name][state])


@pytest.mark.parametrize("after", IMPLEMENTATIONS)
@pytest.mark.parametrize("before", IMPLEMENTATIONS)
def test_a_run_goes_on_with_another_adam(before: str, after: str) -> None:
    undisturbed, old, new = engine_of("torch's"), engine_of(before), engine_of(after)
    train(undisturbed, 0, BEFORE + AFTER)
    train(old, 0, BEFORE)
    with torch.no_grad():
        for parameter in new.module.parameters():
            parameter.zero_()
    move(old, new)
    train(new, BEFORE, AFTER)
    for parameter, wanted in zip(new.module.parameters(), undisturbed.module.parameters(), strict=True):
        assert torch.allclose(parameter, wanted, rtol=0, atol=1e-7)
    counts = [training_state.step_count(new, piece) for piece in training_state.fragments(new)]
    assert max(count or 0.0 for count in counts) == BEFORE + AFTER


def test_muon_goes_on_with_its_momentum_and_adams_moments_each_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # its update is compiled, which takes long
    undisturbed, old, new = muon_engine(), muon_engine(), muon_engine()
    train(undisturbed, 0, BEFORE + AFTER)
    train(old, 0, BEFORE)
    kinds = ["exp_avg", "exp_avg_sq", "momentum_buffer"]
    training_state.create_optimizer_states(new, kinds, BEFORE)
    for theirs, ours in zip(training_state.fragments(old), training_state.fragments(new), strict=True):
        held = training_state.tensors(new, ours)
        assert held.keys() == training_state.tensors(old, theirs).keys()
        for name, value in training_state.tensors(old, theirs).items():
            held[name].copy_(value)
    train(new, BEFORE, AFTER)
    for parameter, wanted in zip(new.module.parameters(), undisturbed.module.parameters(), strict=True):
        assert torch.equal(parameter, wanted)
    assert training_state.left_out(new) == []


@pytest.mark.parametrize(("kind", "device"), [("torch's fused", "meta"), ("torch's", "cpu")])
def test_torchs_fused_adam_counts_its_steps_on_the_parameters_device(kind: str, device: str) -> None:
    engine = engine_of(kind, "meta")
    training_state.create_optimizer_states(engine, ["exp_avg", "exp_avg_sq"], 3.0)
    for state in engine.optimizer.state.values():
        assert (state["step"].device.type, state["step"].dtype, state["step"].shape) == (device, torch.float32, ())
        assert state["exp_avg"].device.type == "meta"
