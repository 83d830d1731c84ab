"""What DeepSpeed is given: the optimizer's groups, and which modules stage 3 gathers at once."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.launcher.config import optimizers
from halfstep.launcher.engine import build
from halfstep.launcher.engine.build import parameter_groups
from halfstep.launcher.engine.readings import Readings

PLAN: Any = SimpleNamespace(deepspeed={"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}})


def groups(model: nn.Module) -> list[tuple[float, list[tuple[int, ...]]]]:
    made = parameter_groups(model, PLAN)
    return [(group["weight_decay"], [tuple(parameter.shape) for parameter in group["params"]]) for group in made]


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    assert groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))) == [(0.1, [(3, 2)]), (0.0, [(3,), (3,), (3,)])]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_group_in_which_everything_is_frozen_is_left_out(frozen: str) -> None:
    model = nn.Linear(2, 3)
    getattr(model, frozen).requires_grad_(False)
    assert groups(model) == ([(0.0, [(3,)])] if frozen == "weight" else [(0.1, [(3, 2)])])


def test_a_partitioned_parameter_counts_by_its_real_shape() -> None:
    model = nn.Linear(2, 3)
    model.weight.data, model.weight.ds_shape = torch.empty(0), torch.Size((3, 2))
    assert [group["weight_decay"] for group in parameter_groups(model, PLAN)] == [0.1, 0.0]


def test_every_group_keeps_its_own_share_of_the_learning_rate() -> None:
    """The groups of DeepSpeed's Muon, say, whose matrices and vectors are built with rates of their own."""
    groups = [{"lr": 1e-3, "params": []}, {"lr": 4e-4, "params": []}]
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    for _ in range(2):  # what was written is not taken for what was built
        readings = Readings(engine, SimpleNamespace(schedule=SimpleNamespace(peak=1e-3)))  # type: ignore[arg-type]
        for rate in (5e-4, 1e-3, 0.0):
            readings.set_learning_rate(rate)
            assert groups[0]["lr"] == rate, "to the bit"
            assert groups[1]["lr"] == pytest.approx(0.4 * rate)


@pytest.mark.parametrize("kind", sorted(optimizers.BY_KIND))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_table_names_what_torch_keeps_of_a_parameter(kind: str, momentum: float) -> None:
    row, weight = optimizers.BY_KIND[kind], nn.Parameter(torch.ones(3, 2))
    assert row.reference is not None
    given = {"momentum": momentum} if "momentum" in row.parameters else {}
    optimizer = getattr(torch.optim, row.reference)([weight], lr=0.1, **given)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    kept = optimizer.state.get(weight, {})
    tensors = {name: value for name, value in kept.items() if torch.is_tensor(value) and value.shape == weight.shape}
    states = [state for state in row.states if state.only_with is None or given.get(state.only_with, 0) > 0]
    assert set(tensors) == {state.name for state in states}
    assert sum(value.element_size() for value in tensors.values()) == optimizers.state_bytes(row.type, given)
    assert ("step" in kept) == row.counts_steps


class Experts(nn.Module):
    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3, 2))
        self.children_ = nn.Sequential(*children)


def leaves(experts: nn.Module) -> list[str]:
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = experts
    build._gather_experts_at_once(model)  # type: ignore[arg-type]
    return [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]


def test_experts_are_gathered_at_once_whichever_of_them_run() -> None:
    assert leaves(Experts(nn.SiLU(), nn.Identity())) == ["mlp.experts"]
    assert leaves(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])) == ["mlp"]
    assert leaves(Experts(nn.Linear(2, 2))) == [], "its parts may be called one by one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_at_stage_0_is_taken_in_fp32_whatever_the_gradients_are_in(dtype: torch.dtype) -> None:
    model, random = nn.Linear(300, 200, dtype=dtype), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = (400 * torch.randn(parameter.shape, generator=random)).to(dtype)
    each = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) for parameter in model.parameters()]
    engine: Any = SimpleNamespace(module=model)
    norm = Readings(engine, SimpleNamespace(zero=0)).before_step(4.0)  # type: ignore[arg-type]
    assert norm == float(torch.stack(each).norm()) / 4, "to the bit, and beyond what fp16 holds"
    assert norm * 4 > torch.finfo(torch.float16).max
    assert Readings(engine, SimpleNamespace(zero=1)).before_step(4.0) is None  # type: ignore[arg-type]


class Tagged(nn.Module):
    """A network whose embedding has no `embed` in its name, as GPT-2's `wte` has not."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_muon_orthogonalizes_no_embedding_and_no_head_whatever_their_names() -> None:
    import deepspeed

    model, own = Tagged(), deepspeed.set_optimizer_flags
    config: Any = SimpleNamespace(optimizer_name="muon", optimizer_params={})
    with build._embeddings_left_to_adam(model):  # type: ignore[arg-type]
        deepspeed.set_optimizer_flags(config, model)
    tags = {name: weight.use_muon for name, weight in model.named_parameters()}
    assert tags == {"wte.weight": False, "hidden.weight": True, "hidden.bias": False, "head.weight": False}
    assert deepspeed.set_optimizer_flags is own
    own(config, model)
    assert model.wte.weight.use_muon, "else there is nothing to repair any more"
