"""Which layers have adapters, what a plan knows of them, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import communication, states
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.plan import estimate, present
from halfstep.launcher.plan.plan import Plan
from halfstep.models import adapters, lora, network, shapes
from halfstep.models.lora import Linear, Lora
from halfstep.models.presets import PRESETS

Make = Callable[..., Plan]
SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": shapes.hf_config(shapes.shape_of(PRESETS["gpt2-nano"], vocabulary=64, width=32)),
    "llama": shapes.hf_config(shapes.shape_of(PRESETS["llama-nano"], vocabulary=64, width=32)),
    **{
        family: {"model_type": family, **SMALL, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16,
                 "max_position_embeddings": 64}
        for family in ("mistral", "qwen2", "qwen3")
    },
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_the_linear_layers_of_a_family_are_those_that_transformers_builds(family: str) -> None:
    shape = shapes.from_hf_config(CONFIGS[family])
    assert shape is not None
    assert lora.linear_layers(shape) == adapters.linear_layers(network.skeleton(CONFIGS[family]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_what_was_planned_and_change_no_logit_before_the_first_step(plan: Make, family: str) -> None:
    made = plan(f"model={family}-nano", "model.width=32", "train=lora", "lora.rank=4", "model.vocabulary=4096")
    assert made.lora is not None
    plain = network.build(made.model.config, seed=5)
    model = network.build(made.model.config, seed=5, lora=made.lora)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for weight in trained.values()) == made.lora.parameters == made.trained_parameters
    assert network.count_parameters(model) == made.model.parameters + made.lora.parameters
    assert all(map(adapters.is_adapter, trained))
    tokens = torch.arange(16)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    again = network.build(made.model.config, seed=5, lora=made.lora, dtype=torch.bfloat16)
    for name, weight in again.named_parameters():
        if name in trained:
            assert torch.equal(weight, trained[name].to(torch.bfloat16)), "the same draw, rounded"


def test_a_plan_says_what_is_trained(plan: Make) -> None:
    made = plan("model=gpt2-nano", "train=lora", "lora.rank=8", "lora.dropout=0.05")
    share = made.model.parameters + 32_768
    assert f"gpt2-nano: 32,768 trained of {share:,} parameters" in present.headline(made)[0]
    assert any(
        line.startswith("adapters     rank 8, alpha 32, dropout 0.05, in 8 layers") for line in present.lines(made)
    )
    assert Plan.from_dict(made.to_dict()) == made


def test_frozen_weights_have_no_states_and_no_gradients_on_the_wire(plan: Make) -> None:
    made = plan("model=gpt2-nano", "train=lora", "zero=0", "precision=bf16")
    workload = estimate.workload_of(made)
    held = states.states(workload)
    trained = made.trained_parameters
    assert held.weights == 2 * (made.model.parameters + trained)
    assert (held.masters, held.moments) == (4 * trained, 8 * trained)
    assert held.reduced_gradients == 4 * trained
    assert communication.volume(workload, Layout()).total_bytes == 2 * 4 * trained


def test_a_token_costs_no_gradient_of_a_frozen_matrix(plan: Make) -> None:
    full, frozen = plan("model=gpt2-nano"), plan("model=gpt2-nano", "train=lora")
    assert full.model.flops_per_token is not None
    assert frozen.model.flops_per_token == full.model.flops_per_token - 2 * full.model.parameters + 6 * 65_536


def test_a_run_without_adapters_is_the_run_that_it_was(plan: Make) -> None:
    made = plan("model=gpt2-nano")
    assert not {"train", "lora.rank"} & set(made.identity)
    assert made.run_id == plan("model=gpt2-nano", "train=full").run_id
    assert plan("model=gpt2-nano", "train=lora").changed_from(made.identity)[:1] == ["lora.alpha"]
    assert plan("model=gpt2-nano", "train=lora", "lora.targets=c_fc").identity["lora.targets"] == ["c_fc"]


@pytest.mark.parametrize(
    ("keys", "what", "fix"),
    [
        (
            ["lora.targets=q_proj"],
            "no linear layer of gpt2-nano is called 'q_proj'",
            "take some of c_attn, c_proj, c_fc",
        ),
        (["lora.targets=wte"], "no linear layer of gpt2-nano is called 'wte'", "take some of c_attn, c_proj, c_fc"),
        (
            ["lora.targets=lm_head"],
            "the head lm_head can have no adapter: its weights are the input embedding's as well",
            "leave lm_head out of lora.targets",
        ),
        (
            ["model=llama-1b", "lora.targets=c_fc,q_proj"],
            "no linear layer of llama-1b is called 'c_fc'",
            "take some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
        (
            ["model=llama-8b", "lora.targets=lm_head", "fused_head=true"],
            "the head lm_head can have no adapter: its loss is made in it",
            "leave lm_head out of lora.targets, or take fused_head=false",
        ),
    ],
)
def test_a_target_that_can_have_no_adapter_is_refused(plan: Make, keys: list[str], what: str, fix: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan("model=gpt2-nano", "train=lora", *keys)
    assert (caught.value.what, caught.value.fix) == (what, fix)


@given(st.integers(1, 4), st.sampled_from(["attn.q", "attn.k", "mlp.0", "mlp.2", "dense"]))
def test_the_shortest_names_mean_the_layers_and_nothing_else(count: int, odd: str) -> None:
    layers = [Linear(f"h.{number}.{name}", 4, 4) for number in range(count) for name in ("attn.q", "mlp.0", "dense")]
    others = [name for number in range(count) if (name := f"h.{number}.{odd}") not in {layer.name for layer in layers}]
    others += ["dense_2", "h", "h.0", "head.attn"]
    short = lora.shortest_names(layers, others)
    assert all(lora.is_named(layer.name, short) for layer in layers)
    assert not any(lora.is_named(other, short) for other in others)
    assert len(short) <= 3


def test_a_target_that_also_names_another_kind_of_module_is_refused() -> None:
    about = Lora(rank=2, alpha=4.0, dropout=0.0, targets=("transformer",), layers=8, parameters=0)
    with pytest.raises(ValueError, match="transformer is no linear layer"):
        network.build(CONFIGS["gpt2"], seed=0, lora=about)


def test_the_gate_is_asked_for_a_runs_own_adapters(plan: Make, tmp_path: Path) -> None:
    from halfstep.launcher.parity.cell import question_of

    question = question_of(plan("model=gpt2-nano", "train=lora", "zero=3", "precision=bf16", "lora.rank=4"))
    assert question.unknown == ()
    assert {case.lora for case in question.cases} == {
        ("lora.rank=4", "lora.alpha=32", 'lora.targets=["c_attn","c_proj","c_fc"]')
    }


def test_a_plan_without_an_average_is_the_run_that_it_was(plan: Make) -> None:
    plain, kept = plan("model=gpt2-nano"), plan("model=gpt2-nano", "ema.decay=0.999")
    assert states.states(estimate.workload_of(plain)).average == 0
    assert "weight_average" not in states.states(estimate.workload_of(plain)).totals()
    assert "ema.decay" not in plain.identity
    assert kept.changed_from(plain.identity) == ["ema.decay"]
    held = states.states(estimate.workload_of(kept))
    assert held.average == held.masters
