"""A nano model of a run's own family: what is cut down, what stays, and what the parity gate makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.launcher import topology
from halfstep.launcher.cli.main import main
from halfstep.launcher.config.load import load
from halfstep.launcher.parity import cases, gate, verdict
from halfstep.launcher.parity.case_plan import plan_of
from halfstep.launcher.parity.cases import Case
from halfstep.launcher.parity.cell import question_of
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.study import proof
from halfstep.launcher.topology import Topology
from halfstep.models import network
from halfstep.models.hf_config import Unfit
from halfstep.models.nano import nano

CPU = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
QWEN: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "attention_dropout": 0.1,
    "initializer_range": 0.03, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21,
    "bos_token_id": 151643, "eos_token_id": 151645, "architectures": ["Qwen2ForCausalLM"],
}  # fmt: skip
"""A config.json as one lies beside a published model, with dropout and a window to see what comes of them."""


def test_sizes_are_cut_down_and_what_makes_the_structure_stays() -> None:
    made = nano(QWEN, 64)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "sliding_window": 16,
    }  # fmt: skip
    kept = {
        "model_type": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "initializer_range": 0.03,
        "hidden_act": "silu", "layer_types": ["full_attention", "sliding_attention"],
    }  # fmt: skip
    assert {name: made[name] for name in sizes} == sizes
    assert {name: made[name] for name in kept} == kept
    assert made["rope_parameters"] == {"rope_theta": 1000000.0, "rope_type": "default"}
    assert made["attention_dropout"] == 0.0, "no two trainers draw alike"
    assert (made["bos_token_id"], made["eos_token_id"]) == (1, 2)
    model = network.build(made, seed=0)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert network.count_parameters(model) == 17_696


def test_configs_of_a_structure_share_a_nano_model_and_others_do_not() -> None:
    llama = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    larger = {**llama, "num_attention_heads": 64, "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 128256}
    assert nano(llama, 64) == nano({**larger, "_name_or_path": "elsewhere", "transformers_version": "4.40.0"}, 64)
    others = [
        {**llama, "attention_bias": True},
        {**llama, "tie_word_embeddings": True},
        {**llama, "num_key_value_heads": 32},
        {**llama, "num_key_value_heads": 1},
        {**llama, "rope_theta": 500000.0},
        {**llama, "rms_norm_eps": 1e-5},
        {**llama, "hidden_act": "gelu"},
    ]
    made = [json.dumps(nano(config, 64), sort_keys=True) for config in [llama, *others]]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mixtral"}, {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 1, "decoder_sparse_step": 4},
         {"num_local_experts": 4, "num_experts_per_tok": 1, "decoder_sparse_step": 2, "moe_intermediate_size": 24}),
        ({"model_type": "deepseek_v3", "q_lora_rank": None},
         {"q_lora_rank": None, "kv_lora_rank": 16, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
        ({"model_type": "gemma3_text"}, {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}),
        ({"model_type": "gpt2", "n_layer": 1, "attn_pdrop": 0.1}, {"n_layer": 1, "n_inner": None, "attn_pdrop": 0.0}),
        ({"model_type": "phi", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                   "partial_rotary_factor": 0.4}},
         {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ({"model_type": "jamba"}, {"attn_layer_period": 2, "num_experts": 4}),
    ],
    ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_a_family_is_known_by_is_still_there(config: dict[str, Any], expected: dict[str, Any]) -> None:
    made = nano(config, 64)
    assert {name: made[name] for name in expected} == expected
    logits = network.build(made, seed=0)(input_ids=torch.arange(32)[None]).logits
    assert logits.shape == (1, 32, 64)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}, "it has code of its own"),
        ({**QWEN, "quantization_config": {"quant_method": "gptq"}}, "it is quantised"),
        ({"model_type": "mamba", "expand": 100_000}, r"cut down it still has [\d,]+ parameters"),
        ({**QWEN, "hidden_act": "no such"}, "makes no qwen2 model"),
        ({"model_type": "bert"}, None),
    ],
)
def test_what_cannot_be_cut_down_says_why(config: dict[str, Any], why: str | None) -> None:
    if why is None:
        assert nano(config, 64)["hidden_size"] == 32, "whether it sees the future is another's question"
        return
    with pytest.raises(Unfit, match=why):
        nano(config, 64)


@pytest.fixture
def planned(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Return a function that plans a config.json, written for it, on two CPU ranks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def plan(config: dict[str, Any], *keys: str) -> Plan:
        home = tmp_path / f"model-{len(list(tmp_path.glob('model-*')))}"
        home.mkdir()
        (home / "config.json").write_text(json.dumps({**config, "vocab_size": 4096}))
        request = load([f"model=hf:{home}", f"data={corpus}", "sequence=32", *keys])
        return resolve(request, CPU, facts.read(request.spec))

    return plan


SMALL = {**QWEN, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip


def test_a_run_of_a_family_is_asked_about_with_models_of_that_family(planned: Callable[..., Plan]) -> None:
    asked = question_of(planned(SMALL, "zero=2", "precision=fp16", "optimizer.kind=sgd"))
    assert asked.unknown == ()
    assert {case.world_size for case in asked.cases} == {1, 2}
    assert {(case.zero, case.precision, case.optimizer, case.family) for case in asked.cases} == {
        (2, "fp16", "sgd", "qwen2")
    }
    for case in asked.cases:
        assert json.loads(case.config) == nano(QWEN, 64), "the sizes of the run's own do not matter"
        made = plan_of(case, topology.describe(case.world_size, case.world_size), repairs=True)
        assert made.model.config == nano(QWEN, 64)
        assert (made.model.weights, made.model.vocabulary, made.model.parameters) == (None, 64, 17_696)
        assert str(case).startswith("hf:qwen2 ")


def test_two_configs_alike_do_not_share_a_verdict(planned: Callable[..., Plan], tmp_path: Path) -> None:
    llama = {**SMALL, "model_type": "llama"}
    plain, biased = planned(llama, "zero=1"), planned({**llama, "attention_bias": True}, "zero=1")
    preset = [case for case in cases.default_cases() if case.family == "llama"]
    verdict.store(topology.describe(1, 1), [{**vars(case), "ok": True} for case in preset])
    assert proof.tell(tmp_path, plain)["proved"] is None, "the preset's family is not its own"
    verdict.store(topology.describe(1, 1), [{**vars(case), "ok": True} for case in question_of(plain).cases])
    assert proof.tell(tmp_path, plain)["proved"] is True
    record = proof.tell(tmp_path, biased)
    assert (record["proved"], record["reason"]) == (None, "the parity gate was not run for it here")


def test_what_the_family_has_besides_is_asked_of_it_as_well(planned: Callable[..., Plan]) -> None:
    asked = question_of(planned(SMALL, "zero=2", "precision=bf16", "compile=true", "ds.communication_data_type=bf16"))
    assert {(case.compile, case.keys) for case in asked.cases} == {(True, ('ds.communication_data_type="bf16"',))}
    assert all(case.config for case in asked.cases)


def test_a_mixture_is_asked_about_at_the_coefficient_of_its_routers_loss(planned: Callable[..., Plan]) -> None:
    mixture = {**SMALL, "model_type": "mixtral", "router_aux_loss_coef": 0.02}
    asked = {
        coefficient: question_of(planned(mixture, "zero=1", *keys)).cases
        for coefficient, keys in {0.02: (), 0.5: ("model.router_loss=0.5",), 0.0: ("model.router_loss=0",)}.items()
    }
    for coefficient, chosen in asked.items():
        alone = [case for case in chosen if case.world_size == 1]
        assert [plan_of(case, topology.describe(1, 1), repairs=True).router_loss for case in alone] == [coefficient]
    assert len({case for chosen in asked.values() for case in chosen}) == 6, "another coefficient is another question"


def test_a_family_that_cannot_be_cut_down_is_not_proved_and_says_why(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.models.nano.MOST_PARAMETERS", 17_000)
    made = planned({**SMALL, "rms_norm_eps": 3e-6})
    assert question_of(made).cases == ()
    record = proof.tell(tmp_path, made)
    assert record["proved"] is None
    assert record["reason"] == (
        "the parity gate does not know the model family qwen2 (no nano model can be made of it: with all known sizes "
        "cut down it still has 17,696 parameters)"
    )


def test_code_of_a_models_own_is_not_proved(planned: Callable[..., Plan]) -> None:
    made = planned({**SMALL, "auto_map": {"AutoModelForCausalLM": "code.Mine"}})
    assert question_of(made).cases, "without consent it is transformers' own class that trains"
    trusted = Plan.from_dict({**made.to_dict(), "trust_remote_code": True})
    assert question_of(trusted).unknown == ("the model family qwen2 (its code is its own: trust_remote_code)",)


def test_every_case_has_an_hf_family_made_without_a_file() -> None:
    families = cases.family_cases()
    assert {case.family for case in families} == {"qwen2", "qwen3_moe"}
    for family in ("qwen2", "qwen3_moe"):
        own = [case for case in families if case.family == family]
        assert len({(case.zero, case.precision) for case in own}) == 12
        assert {case.world_size for case in own} == {1, 2}
    assert set(families) <= set(cases.every_case())
    assert set(families).isdisjoint(cases.default_cases())


def test_a_cell_of_a_family_that_ends_in_an_error_does_not_take_the_others_with_it(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def verify(chosen: list[Case], *, repairs: bool, quiet: bool) -> gate.Outcome:
        asked.append({case.precision for case in chosen})
        if "fp16" in asked[-1]:
            raise gate.Fault("a rank ended: expected Half", where="a log", fix="none")
        cells = [{**vars(case), "ok": True} for case in chosen]
        return gate.Outcome(cells=cells, not_run=[], seconds=1.0, repairs=repairs)

    monkeypatch.setattr(gate, "verify", verify)
    plans = [planned(SMALL, "zero=1", f"precision={precision}") for precision in ("fp32", "fp16", "bf16")]
    said: list[str] = []
    results = proof.run(plans, said.append)
    assert asked == [{"fp32", "fp16", "bf16"}, {"fp32"}, {"fp16"}, {"bf16"}]
    assert "6 cases of the family qwen2 on this hardware" in said[0]
    records = [proof.tell(tmp_path, plan, results) for plan in plans]
    assert [record["proved"] for record in records] == [True, False, True]
    assert records[1]["reason"] == "the parity gate could not run it: a rank ended: expected Half"


def test_verify_of_a_run_proves_it_with_its_own_family_and_tells_its_summary(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, ran = planned(SMALL, "zero=3", "steps=5"), []
    request = load([f"model={made.model.name}", f"data={made.data.path}", "sequence=32", "zero=3", "steps=5"])
    run_directory.write_plan(tmp_path / "run", request, made)
    (tmp_path / "run" / "summary.json").write_text(
        '{"status": "done", "proved": null, "unproved_because": "asked not"}'
    )

    def verify(chosen: list[Case], *, repairs: bool, quiet: bool) -> gate.Outcome:
        ran.extend(chosen)
        cells = [{**vars(case), "ok": True} for case in chosen]
        return gate.Outcome(cells=cells, not_run=[], seconds=1.0, repairs=repairs)

    monkeypatch.setattr(gate, "verify", verify)
    assert main(["verify", "--json", "--run", str(tmp_path / "run")]) == 0
    assert tuple(ran) == question_of(made).cases
    assert {case.family for case in ran} == {"qwen2"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == {"status": "done", "proved": True, "unproved_because": ""}
