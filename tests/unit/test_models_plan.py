"""What `plan` makes of an `hf:` model before anything is started: what cannot be trained is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from halfstep.launcher.cli.main import main
from halfstep.launcher.config.load import load
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology
from halfstep.models.network import build
from halfstep.models.presets import PRESETS
from halfstep.models.shapes import hf_config, shape_of

Planned = Callable[..., Plan]
Refused = Callable[..., str]
LLAMA = hf_config(shape_of(PRESETS["llama-nano"], vocabulary=4096, layers=1, width=32, heads=2))


def folder(tmp_path: Path, config: dict[str, Any] | str, *files: str) -> Path:
    """Make a model's folder with a config and empty files beside it."""
    home = tmp_path / "model"
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for file in files:
        (home / file).mkdir() if file.endswith("/") else (home / file).write_bytes(b"")
    return home


@pytest.fixture
def planned(corpus: Path) -> Planned:
    """Return a function that plans a folder on two CPU ranks."""

    def plan(home: Path, *keys: str) -> Plan:
        request = load([f"model=hf:{home}", f"data={corpus}", *keys])
        world = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
        return resolve(request, world, facts.read(request.spec))

    return plan


@pytest.fixture
def refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that has `halfstep plan` refuse a folder with exit code 2, and returns what it says."""

    def refuse(home: Path, *keys: str) -> str:
        capsys.readouterr()
        assert main(["plan", f"model=hf:{home}", f"data={corpus}", *keys]) == 2
        said = capsys.readouterr().err
        assert [line[:6] for line in said.splitlines()] == ["error:", " from:", "  try:"]
        return said

    return refuse


@pytest.mark.parametrize("spelling", ["Infinity", '{"__float__": "Infinity"}', "1e999"])
def test_infinity_in_a_config_is_planned_and_built(planned: Planned, tmp_path: Path, spelling: str) -> None:
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}
    config = json.dumps({"model_type": "mamba2", "vocab_size": 4096, "time_step_limit": [0.0, 7.5], **sizes})
    plan = planned(folder(tmp_path, config.replace("7.5", spelling)))
    json.dumps(plan.to_dict(), allow_nan=False)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    model = build(plan.model.config, seed=1)
    assert model.config.time_step_limit[1] == float("inf")


def test_other_spellings_of_the_same_infinity_are_one_run(planned: Planned, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}
    config = json.dumps({"model_type": "mamba2", "vocab_size": 4096, "time_step_limit": [0.0, 7.5], **sizes})
    ids = {
        planned(folder(tmp_path, config.replace("7.5", spelling))).run_id
        for spelling in ("Infinity", '{"__float__": "Infinity"}', "1e999")
    }
    assert len(ids) == 1


def test_trained_weights_are_not_to_be_moved_as_fast_as_drawn_ones(planned: Planned, tmp_path: Path) -> None:
    build(LLAMA, seed=1).save_pretrained(tmp_path / "trained")
    (said,) = [line for line in planned(tmp_path / "trained").warnings if "optimizer.lr" in line]
    assert said.startswith("optimizer.lr=0.001, the default by model size, is one to train from scratch with")
    for home, *keys in (
        (tmp_path / "trained", "optimizer.lr=2e-5"),
        (tmp_path / "trained", "ds.optimizer.params.lr=2e-5"),
        (tmp_path / "trained", "train=lora"),
        (folder(tmp_path, LLAMA),),
    ):
        assert not [line for line in planned(home, *keys).warnings if "optimizer.lr" in line], keys


NESTED = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_nested_text_config_has_its_vocabulary_and_positions_read(planned: Planned, tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **NESTED}}
    config["vision_config"] = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **VISION}
    plan = planned(folder(tmp_path, {**config, "mm_tokens_per_image": 4}))
    assert (plan.model.vocabulary, plan.sequence) == (4096, 512)
    model = build(plan.model.config, seed=1)
    assert plan.model.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not model.config.get_text_config().use_cache


def test_the_vocabulary_of_a_nested_config_can_be_set(planned: Planned, tmp_path: Path) -> None:
    config = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", **NESTED, "vocab_size": 99}}
    config["text_config"] |= {"layer_types": ["full_attention", "full_attention"]}
    plan = planned(folder(tmp_path, config), "model.vocabulary=5000")
    assert plan.model.vocabulary == 5000


@pytest.mark.parametrize(
    ("family", "sizes", "limit"),
    [
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}, None),
        ("rwkv", {"hidden_size": 16, "num_hidden_layers": 1}, None),
        ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "attn_type": "uni"}, None),
        ("gptj", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 96}, 96),
        ("mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 96}, 96),
        ("opt", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}, 2048),
    ],
)
def test_the_longest_sequence_is_the_models_and_not_invented(
    planned: Planned, refused: Refused, tmp_path: Path, family: str, sizes: dict[str, Any], limit: int | None
) -> None:
    home = folder(tmp_path, CONFIG_MAPPING[family](**sizes, vocab_size=4096).to_dict())
    assert planned(home).sequence == min(1024, limit or 1024)
    longest = limit or 4000
    assert planned(home, f"sequence={longest}").sequence == longest
    if limit is not None:
        assert f"longer than the model's {limit} positions" in refused(home, f"sequence={limit + 1}")


def test_a_size_that_a_config_leaves_out_is_the_one_that_is_built(planned: Planned, tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    plan = planned(folder(tmp_path, {**config, "intermediate_size": 16}))
    assert plan.model.vocabulary == CONFIG_MAPPING["gpt_neox"]().vocab_size


def test_padding_beyond_the_vocabulary_is_refused_with_its_key(
    planned: Planned, refused: Refused, tmp_path: Path
) -> None:
    home = folder(tmp_path, {**LLAMA, "pad_token_id": 4096})
    said = refused(home)
    assert "the model cannot be constructed: the configuration makes no llama model: Padding_idx must be" in said
    assert "pad_token_id=4096 is no token of a vocabulary of 4096: set it to null" in said
    assert planned(home, "model.vocabulary=4097").model.vocabulary == 4097
    assert planned(folder(tmp_path, {**LLAMA, "pad_token_id": 4095})).model.vocabulary == 4096


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"num_attention_heads": 3}, "makes no llama model"),
        ({"model_type": "t5"}, "transformers has no causal language model of model_type 't5'"),
        ({"model_type": "gpt5"}, "transformers knows no model_type 'gpt5'"),
        ({"hidden_act": "no_such_function"}, "makes no llama model"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "makes no llama model"),
        ({"num_hidden_layers": 10**9}, "the model's config says num_hidden_layers 1e+09; at most"),
        ({"max_position_embeddings": "many"}, "makes no llama model"),
        ({"vocab_size": 0}, "has no elements"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_constructed_is_refused_before_anything_starts(
    refused: Refused, tmp_path: Path, changed: dict[str, Any], what: str
) -> None:
    assert what in refused(folder(tmp_path, {**LLAMA, **changed}))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "mxfp4", None])
def test_quantised_weights_are_refused_by_the_name_of_the_method(
    refused: Refused, tmp_path: Path, family: str, method: str | None
) -> None:
    quantised = {"quantization_config": {"bits": 4, **({"quant_method": method} if method else {})}}
    config = CONFIG_MAPPING[family]().to_dict()
    if family == "gemma3":
        config["text_config"] |= quantised
    home = folder(tmp_path, config if family == "gemma3" else {**config, **quantised}, "model.safetensors")
    assert f"is quantised ({method or 'an unnamed method'})" in refused(home)


@pytest.mark.parametrize(
    "file",
    [
        "llama.gguf",
        "consolidated.00.pth",
        "model-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "global_step100/",
        "pytorch_model_fsdp_0/",
    ],
)
def test_weights_that_nothing_loads_are_not_passed_over_for_fresh_ones(
    refused: Refused, tmp_path: Path, file: str
) -> None:
    home = folder(tmp_path, LLAMA, file)
    said = refused(home)
    assert f"{home} has {file.strip('/')}, but no weights under a name that transformers loads" in said
    assert "model.safetensors" in said


def test_what_a_trainer_leaves_beside_a_config_is_no_weight(planned: Planned, tmp_path: Path) -> None:
    files = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "tokenizer.json", "README.md")
    home = folder(tmp_path, LLAMA, *files)
    (home / "tokenizer.json").unlink()
    assert planned(home).model.weights is None


def test_an_adapter_is_refused(refused: Refused, tmp_path: Path) -> None:
    home = folder(tmp_path, LLAMA, "adapter_config.json", "adapter_model.safetensors")
    assert "holds an adapter (adapter_config.json), which is no model's weights" in refused(home)


def test_weights_of_another_model_are_refused_by_the_plan(refused: Refused, tmp_path: Path) -> None:
    home = folder(tmp_path, LLAMA)
    build({**LLAMA, "num_hidden_layers": 2}, seed=1).save_pretrained(home)
    (home / "config.json").write_text(json.dumps(LLAMA))
    assert "have 9 parameters, such as model.layers.1.input_layernorm.weight, that the config's" in refused(home)


def test_truncated_weights_are_refused_by_the_plan_with_their_file(refused: Refused, tmp_path: Path) -> None:
    home = folder(tmp_path, LLAMA)
    build(LLAMA, seed=1).save_pretrained(home)
    with (home / "model.safetensors").open("r+b") as file:
        file.truncate(40_000)
    assert f"the weights of {home / 'model.safetensors'} cannot be loaded" in refused(home)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
pathlib.Path(__file__).with_name("ran").touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_its_own_is_found_in_the_folder_that_was_named(
    planned: Planned, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    home = folder(tmp_path, {**LLAMA, "model_type": "own", "auto_map": auto_map})
    (home / "own.py").write_text(CODE)
    said = refused(home)
    assert "transformers knows no model_type 'own'" in said
    assert "trust_remote_code=true lets it run the Python code in its folder, if you trust that" in said
    assert not list(tmp_path.rglob("ran"))
    for named in (home, home / "config.json"):
        plan = planned(named, "trust_remote_code=true")
        assert "_name_or_path" not in plan.model.config
        assert plan.model.vocabulary == 4096
    assert list(modules.rglob("ran"))


def test_code_beside_a_model_that_transformers_knows_never_runs_unasked(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", never)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    home = folder(tmp_path, {**LLAMA, "auto_map": auto_map})
    (home / "own.py").write_text(CODE)
    assert planned(home).model.vocabulary == 4096
    assert not list(tmp_path.rglob("ran"))


def test_layers_that_are_skipped_at_random_are_refused_where_ranks_share_them(
    planned: Planned, refused: Refused, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "vocab_size": 4096}
    home = folder(tmp_path, {"model_type": "opt", **sizes, "layerdrop": 0.1})
    assert "layerdrop=0.1 skips layers at random, other ones on every rank" in refused(home, "zero=3")
    assert planned(home, "zero=2").zero == 2


def test_a_package_that_a_model_needs_is_named(refused: Refused, tmp_path: Path) -> None:
    said = refused(folder(tmp_path, CONFIG_MAPPING["gemma3n"]().to_dict()))
    assert "a gemma3n model needs a package that is not here: TimmWrapperModel requires the timm library" in said
    assert "try: install it, where the ranks will run too" in said


def test_what_is_not_json_is_refused(refused: Refused, tmp_path: Path) -> None:
    for text in ("", "[]", '"llama"', "{", "[" * 100_000, '{"hidden_size": 3}'):
        assert "config.json is no model's config" in refused(folder(tmp_path, text))


def test_nothing_stale_is_kept_between_two_plans(planned: Planned, tmp_path: Path) -> None:
    first = planned(folder(tmp_path, LLAMA)).model.parameters
    shutil.rmtree(tmp_path / "model")
    assert planned(folder(tmp_path, {**LLAMA, "num_hidden_layers": 2})).model.parameters > first
    os.stat(tmp_path / "model" / "config.json")


def test_a_head_whose_logits_are_changed_after_it_cannot_be_fused_and_the_plan_says_so(
    planned: Planned, refused: Refused, tmp_path: Path
) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
             "vocab_size": 4096, "num_hidden_layers": 1, "head_dim": 8, "max_position_embeddings": 64,
             "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    assert planned(folder(tmp_path, {"model_type": "llama", **small}), "fused_head=true").fused_head
    said = refused(folder(tmp_path, {"model_type": "gemma2", **small}), "fused_head=true")
    assert "the loss cannot be made in this model's head" in said
    assert "take fused_head=false" in said
