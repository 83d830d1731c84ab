"""What is planned of a mixture of experts: its routers' auxiliary loss, and the parameters that one token uses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.experts import ROUTED
from fakes.mixtures import MIXTRAL, MIXTURES, QWEN2_MOE
from transformers import CONFIG_MAPPING

from halfstep.launcher.cli.main import main
from halfstep.launcher.config.load import load
from halfstep.launcher.plan import facts, present
from halfstep.launcher.plan.plan import Plan, run_id_of
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology
from halfstep.models import router
from halfstep.models.network import build, skeleton

VOCABULARY = 128
DEEPSEEK = {**ROUTED, "intermediate_size": 32}
GPT_NEOX = {"model_type": "gpt_neox", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
DBRX = {
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.0625},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
}
Planned = Callable[..., Plan]


@pytest.fixture
def planned(corpus: Path, tmp_path: Path) -> Planned:
    """Return a function that plans a config on two CPU ranks."""

    def plan(config: dict[str, Any], *keys: str) -> Plan:
        home = tmp_path / "model"
        home.mkdir(exist_ok=True)
        (home / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, **config}))
        request = load([f"model=hf:{home}", f"data={corpus}", "sequence=32", *keys])
        return resolve(request, Topology(world_size=2, ranks_per_node=2, accelerator="cpu"), facts.read(request.spec))

    return plan


def mixtral_by_hand(experts: int) -> int:
    attention, norms, routing, expert = 2 * 32 * 32 + 2 * 32 * 16, 2 * 32, 4 * 32, 3 * 32 * 48
    return 2 * (attention + norms + routing + experts * expert) + 32 + 2 * VOCABULARY * 32


def qwen2_moe_by_hand(experts: int) -> int:
    attention = 2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16  # queries, keys and values have biases
    norms, routing, expert, shared, dense = 2 * 32, 8 * 32, 3 * 32 * 24, 3 * 32 * 40 + 32, 3 * 32 * 80
    sparse = attention + norms + routing + experts * expert + shared
    return 2 * sparse + attention + norms + dense + 32 + 2 * VOCABULARY * 32


@pytest.mark.parametrize(
    ("config", "by_hand", "experts", "layers"),
    [(MIXTRAL, mixtral_by_hand, 4, 2), (QWEN2_MOE, qwen2_moe_by_hand, 8, 3)],
    ids=MIXTURES,
)
def test_active_parameters_and_flops_are_those_of_hand_arithmetic(
    planned: Planned, config: dict[str, Any], by_hand: Callable[[int], int], experts: int, layers: int
) -> None:
    plan = planned(config)
    active = by_hand(2)
    assert (plan.model.parameters, plan.model.active_parameters) == (by_hand(experts), active)
    embedding, attention = VOCABULARY * 32, layers * 32 * 32
    assert plan.model.flops_per_token == 6 * (active - embedding) + 6 * attention
    assert f"{by_hand(experts):,} parameters, {active:,} of them active per token" in "\n".join(present.lines(plan))
    tied = planned({**config, "tie_word_embeddings": True}).model
    assert tied.active_parameters == active - embedding
    assert tied.flops_per_token == 6 * (active - embedding) + 6 * attention, "multiplied once, as the head"


def test_mixtral_8x7b_has_its_published_sizes() -> None:
    """46.7B parameters, of which a token uses 12.9B (Jiang et al. 2024, Mixtral of Experts)."""
    model = skeleton(CONFIG_MAPPING["mixtral"]().to_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == 46_702_792_704
    attention, expert = 4096 * (2 * 4096 + 2 * 1024), 3 * 4096 * 14336
    by_hand = 32 * (attention + 8 * 4096 + 2 * 4096 + 2 * expert) + 4096 + 2 * 32000 * 4096
    assert router.active_parameters(model) == by_hand == 12_879_925_248


def test_a_dense_model_uses_all_its_parameters(plan: Planned, planned: Planned) -> None:
    for dense in (plan().model, planned(GPT_NEOX).model):
        assert dense.active_parameters == dense.parameters


@pytest.mark.parametrize(("family", "more", "active"), [
    ("jetmoe", {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2}, None),
    ("dbrx", DBRX, 2),
    ("deepseek_v3", DEEPSEEK, 2),
])  # fmt: skip
def test_other_families_say_their_experts_in_their_own_way_or_not_at_all(
    family: str, more: dict[str, Any], active: int | None
) -> None:
    config = CONFIG_MAPPING[family](**{"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, **more}).to_dict()
    model = skeleton(config)
    total, used = sum(parameter.numel() for parameter in model.parameters()), router.active_parameters(model)
    if active is None:
        assert used is None
        return
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    held = sum(parameter.numel() for module in experts for parameter in module.parameters())
    assert used == total - held + held * active // experts[0].num_experts
    assert 0 < held * active // experts[0].num_experts < held


@pytest.mark.parametrize(
    ("config", "coefficient"),
    [
        (MIXTRAL, 0.5),
        ({key: value for key, value in MIXTRAL.items() if key != "router_aux_loss_coef"}, 0.001),
        ({"model_type": "jetmoe", "num_hidden_layers": 1, "hidden_size": 32, "aux_loss_coef": 0.25}, 0.25),
        (
            {
                "model_type": "dbrx",
                "n_layers": 1,
                "ffn_config": {"moe_loss_weight": 0.0625},
                "attn_config": {"rope_theta": 1e4},
            },
            0.0625,
        ),
        ({"model_type": "olmoe", "num_hidden_layers": 1, "hidden_size": 32}, 0.01),
        ({"model_type": "granitemoe", "num_hidden_layers": 1, "hidden_size": 32, "router_aux_loss_coef": None}, 0.0),
        ({**QWEN2_MOE, "mlp_only_layers": [0, 1, 2]}, None),
        (DEEPSEEK, None),
        ({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32}, None),
    ],
)
def test_the_coefficient_is_the_configs_own(config: dict[str, Any], coefficient: float | None) -> None:
    assert router.coefficient(skeleton({"vocab_size": VOCABULARY, **config})) == coefficient


def test_a_run_key_wins_over_the_config_and_makes_another_run(planned: Planned) -> None:
    own, other, none = (planned(MIXTRAL, *keys) for keys in ([], ["model.router_loss=0.25"], ["model.router_loss=0"]))
    assert [plan.router_loss for plan in (own, other, none)] == [0.5, 0.25, 0.0]
    assert len({plan.run_id for plan in (own, other, none)}) == 3
    assert own.changed_from(other.identity) == own.changed_from(none.identity) == ["model.router_loss"]
    assert planned(MIXTRAL, "model.router_loss=0.5").run_id == own.run_id, "the same, said in full"
    assert "routers      their auxiliary loss x 0.25 is added" in present.lines(other)
    assert not any("routers" in line for line in [*present.lines(none), *none.warnings])
    assert Plan.from_dict(json.loads(json.dumps(own.to_dict()))) == own


def older(plan: Plan) -> dict[str, Any]:
    """Return a plan as it was written before there was the loss."""
    tree = json.loads(json.dumps(plan.to_dict()))
    del tree["router_loss"], tree["model"]["active_parameters"]
    tree["model"]["flops_per_token"] = None
    return tree


def test_a_run_that_is_older_than_the_loss_goes_on_without_it(planned: Planned, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    begun = older(planned(MIXTRAL, "model.router_loss=0", f"out={out}"))
    assert Plan.from_dict(begun).router_loss == 0.0
    (out / "plan.json").write_text(json.dumps(begun))
    for plan in (planned(MIXTRAL, f"out={out}"), planned(MIXTRAL, f"out={out}", "model.router_loss=0")):
        assert plan.router_loss == 0.0
        assert plan.run_id == begun["run_id"] == run_id_of(begun)
        assert plan.changed_from(begun["identity"]) == []
    assert any(
        "was begun without its routers' auxiliary loss" in said for said in planned(MIXTRAL, f"out={out}").warnings
    )
    (out / "plan.json").write_text(json.dumps(planned(MIXTRAL, f"out={out}").to_dict()))
    assert planned(MIXTRAL, f"out={out}").router_loss == 0.0, "and at the start after that"
    assert planned(MIXTRAL, f"out={out}", "model.router_loss=0.1").changed_from(begun["identity"]) == [
        "model.router_loss"
    ]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model": {}, "router_loss": "high"}', '{"model": 1, "router_loss": -1}']
)
def test_what_no_run_has_written_decides_nothing(planned: Planned, tmp_path: Path, content: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "plan.json").write_text(content)
    assert planned(MIXTRAL, f"out={out}").router_loss == 0.5


def test_a_dense_run_keeps_the_id_that_it_had_before_there_were_routers(plan: Planned) -> None:
    now = plan()
    tree = json.loads(json.dumps(now.to_dict()))
    del tree["router_loss"], tree["model"]["active_parameters"]
    assert "model.router_loss" not in now.identity
    assert run_id_of(tree) == now.run_id


@pytest.mark.parametrize(("config", "why"), [
    (None, "there are no routers in a dense model, and no loss of theirs"),
    ({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32}, "there are no routers in a dense model"),
    (DEEPSEEK, "transformers computes no auxiliary loss for the routers of this family"),
])  # fmt: skip
def test_a_model_without_such_a_loss_is_refused_it(
    config: dict[str, Any] | None, why: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, **(config or {})}))
    name = f"hf:{tmp_path}" if config else "llama-nano"
    assert main(["plan", f"model={name}", f"data={corpus}", "model.router_loss=0.01"]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith(f"error: {why}")
    assert main(["plan", f"model={name}", f"data={corpus}", "model.router_loss=0.01"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in said] == ["error:", " from:", "  try:"]
    assert "model.router_loss=0.01" in said[1]


def test_experts_without_such_a_loss_are_said_to_have_none(planned: Planned) -> None:
    assert any("transformers computes no auxiliary loss for the routers" in said for said in planned(DEEPSEEK).warnings)
    assert not any("routers" in said for said in planned(MIXTRAL).warnings)
    assert not any(
        "routers" in said
        for said in planned({"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4}).warnings
    )


def test_windows_go_without_a_mask_whether_routers_are_asked_or_not() -> None:
    from halfstep.models.observe import NAME, leave_out_masks

    model = build({**MIXTRAL, "vocab_size": 64, "sliding_window": None}, seed=1)
    leave_out_masks(model)
    made = model(input_ids=torch.arange(24).reshape(1, 24), output_router_logits=True)
    assert model.config._attn_implementation == NAME
    assert len(made.router_logits) == 2
