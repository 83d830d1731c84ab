"""Building one rank's model: its initial values are the architecture's and a function of the seed alone.

What needs ranks (stage 3, world sizes) is in tests/process/test_init_across_stages.py.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from halfstep.models.hf_config import Unfit, positions
from halfstep.models.loss import next_token_loss
from halfstep.models.network import build, count_parameters, initial_statistics, skeleton
from halfstep.models.presets import PRESETS
from halfstep.models.shapes import hf_config, parameters, shape_of

FAMILIES = ["gpt2-nano", "llama-nano"]
VOCABULARY = 512


def config_of(name: str, **overrides) -> dict:
    return hf_config(shape_of(PRESETS[name], vocabulary=VOCABULARY, **overrides))


def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = model.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def first_loss(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(4 * 65).reshape(4, 65) * 7 % VOCABULARY
    return next_token_loss(model(tokens[:, :-1]).logits, tokens[:, 1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_initial_values_are_those_of_transformers_own_distribution(name: str):
    ours = build(config_of(name), seed=1)
    torch.manual_seed(2)  # transformers draws from the global state, which other tests move
    theirs = AutoModelForCausalLM.from_config(ours.config)
    for (key, mine), (_, reference) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if reference.std() == 0:  # norms and biases
            assert torch.equal(mine, reference), key
        else:
            assert mine.std().item() == pytest.approx(reference.std().item(), rel=0.03), key
            assert abs(mine.mean().item()) < 5 * mine.std().item() / math.sqrt(mine.numel()), key


def test_gpt2_scales_the_residual_projections_by_depth():
    statistics = initial_statistics(build(config_of("gpt2-nano"), seed=1))
    deviations = {name.removeprefix("transformer."): value for name, (_, value) in statistics.items()}
    assert deviations == {
        "wte.weight": pytest.approx(0.02, rel=0.02),
        "h.1.attn.c_attn.weight": pytest.approx(0.02, rel=0.02),
        "h.1.attn.c_proj.weight": pytest.approx(0.02 / math.sqrt(4), rel=0.02),
        "h.1.mlp.c_fc.weight": pytest.approx(0.02, rel=0.02),
        "h.1.mlp.c_proj.weight": pytest.approx(0.02 / math.sqrt(4), rel=0.02),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_loss_is_that_of_a_uniform_guess(name: str):
    assert first_loss(build(config_of(name), seed=5)).item() == pytest.approx(math.log(VOCABULARY), abs=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_alone_decides_the_values(name: str):
    torch.manual_seed(1)
    first = build(config_of(name), seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = build(config_of(name), seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert same(first, two)
    assert not same(first, build(config_of(name), seed=8))


def test_no_two_layers_start_equal():
    layers = build(config_of("llama-nano"), seed=1).model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_fp32_values_rounded(dtype: torch.dtype):
    whole, half = build(config_of("llama-nano"), seed=3), build(config_of("llama-nano"), seed=3, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in half.parameters())
    assert same(whole.to(dtype), half)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_the_embedding_and_an_untied_one_gets_values_of_its_own(tied: bool):
    model = build({**config_of("llama-nano"), "tie_word_embeddings": tied}, seed=1)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_the_model_trains_with_fused_attention_and_keeps_no_cache():
    model = build(config_of("gpt2-nano"), seed=1)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert model(torch.zeros(1, 4, dtype=torch.long)).past_key_values is None


def test_scaled_rotary_frequencies_are_transformers_own():
    config = hf_config(shape_of(PRESETS["llama-1b"], layers=1, width=64, heads=4))
    ours = build({**config, "vocab_size": 128}, seed=1)
    theirs = AutoModelForCausalLM.from_config(ours.config)
    expected = dict(theirs.named_buffers())
    assert expected
    for key, buffer in ours.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, expected[key])


def test_activation_checkpointing_leaves_loss_and_gradients_alone():
    plain = build(config_of("gpt2-nano"), seed=1)
    checkpointed = build(config_of("gpt2-nano"), seed=1, activation_checkpointing=True)
    assert checkpointed.is_activation_checkpointing
    losses = [first_loss(model) for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for parameter, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_a_parameter_without_elements_is_refused():
    with pytest.raises(ValueError, match=r"parameter transformer.wpe.weight has no elements \(shape \(0, 128\)\)"):
        build({**config_of("gpt2-nano"), "n_positions": 0}, seed=1)


def forget(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Let Llama's own initialisation leave one class of modules alone."""

    def forgetful(model: PreTrainedModel, module: torch.nn.Module) -> None:
        if kind not in type(module).__name__:
            PreTrainedModel._init_weights(model, module)

    monkeypatch.setattr("transformers.LlamaPreTrainedModel._init_weights", forgetful, raising=False)


def test_a_parameter_that_neither_initialisation_nor_constructor_sets_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Unset(torch.nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(size))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm", Unset)
    with pytest.raises(
        Unfit, match=r"nor a constructor gives model.layers.0.input_layernorm.weight a value, nor 4 oth"
    ):
        build(config_of("llama-nano"), seed=1)


def test_what_the_initialisation_forgets_keeps_the_value_of_its_constructor(monkeypatch: pytest.MonkeyPatch):
    whole = build(config_of("llama-nano"), seed=1)
    forget(monkeypatch, "RMSNorm")
    assert same(build(config_of("llama-nano"), seed=1), whole)  # ones, either way


def test_values_drawn_in_a_constructor_are_decided_by_the_seed_too():
    config = {"model_type": "openai-gpt", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    torch.manual_seed(1)
    model = build(config, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(model, build(config, seed=7))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    blocks = [block.attn.c_attn.weight for block in model.transformer.h]
    assert not torch.equal(*blocks)
    assert blocks[0].std().item() == pytest.approx(0.02, rel=0.1)  # Conv1D's constructor draws it so
    assert not same(model, build(config, seed=8))
    half = build(config, seed=7, dtype=torch.bfloat16)
    assert torch.equal(half.transformer.h[1].attn.c_attn.weight, blocks[1].to(torch.bfloat16))


@pytest.mark.parametrize("padding", [3, -1, None])
def test_the_row_of_the_padding_token_is_drawn_and_trained(padding: int | None):
    config = {**config_of("llama-nano"), "pad_token_id": padding, "tie_word_embeddings": False}
    model = build(config, seed=1)
    assert model.config.pad_token_id == padding, "an export says what the user said"
    row = model.model.embed_tokens.weight[3 if padding is None else padding]
    assert row.std().item() == pytest.approx(0.02, rel=0.5)
    assert same(model, build({**config, "pad_token_id": None}, seed=1))
    model(torch.arange(VOCABULARY).view(8, 64)).logits.square().sum().backward()
    assert (model.model.embed_tokens.weight.grad.norm(dim=1) > 0).all()


def test_loaded_weights_train_their_padding_row_as_well(tmp_path: Path):
    config = {**config_of("llama-nano"), "pad_token_id": 0, "tie_word_embeddings": False}
    build(config, seed=1).save_pretrained(tmp_path)
    model = build(json.loads((tmp_path / "config.json").read_text()), seed=1, weights=str(tmp_path))
    first_loss(model).backward()
    assert model.model.embed_tokens.weight.grad[0].norm() > 0


def test_positions_that_begin_after_the_padding_are_left_alone():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "roberta", **sizes, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 1}
    model = build({**config, "is_decoder": True}, seed=1)
    assert positions(model) == 30
    assert model(torch.arange(30)[None] + 5).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.arange(31)[None] + 5)


def test_weights_of_a_checkpoint_are_loaded_and_need_no_seed(tmp_path: Path):
    saved = build(config_of("llama-nano"), seed=11)
    saved.save_pretrained(tmp_path)
    loaded = build(json.loads((tmp_path / "config.json").read_text()), seed=1, weights=str(tmp_path))
    assert same(saved, loaded)
    assert loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path: Path):
    build(config_of("llama-nano", layers=2), seed=1).save_pretrained(tmp_path)
    with pytest.raises(Unfit, match=r"lack 9 parameters, such as model.layers.2.input_layernorm.weight, of the model"):
        build(config_of("llama-nano", layers=3), seed=1, weights=str(tmp_path))


def test_a_checkpoint_of_another_width_is_refused(tmp_path: Path):
    build(config_of("llama-nano", width=64), seed=1).save_pretrained(tmp_path)
    what = (
        r"model.embed_tokens.weight is \[512, 64\] in .*model.safetensors and \[512, 128\] in the config's model, and 1"
    )
    with pytest.raises(Unfit, match=what):
        build(config_of("llama-nano"), seed=1, weights=str(tmp_path))


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        build(config_of("llama-nano"), seed=1, weights=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"model_type": "gpt5"}, "transformers knows no model_type 'gpt5'"),
        ({}, "no model_type None"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "makes no llama model"),
        ({"model_type": "gpt2", "n_layer": "many"}, "makes no gpt2 model"),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, "makes no gpt2 model"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_one_line(config: dict, phrase: str):
    with pytest.raises(Unfit, match=phrase) as refusal:
        skeleton(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_counting_on_the_meta_device_agrees_with_the_arithmetic(name: str):
    assert count_parameters(skeleton(config_of(name))) == parameters(shape_of(PRESETS[name], vocabulary=VOCABULARY))


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "mixtral", "phi"])
def test_families_without_arithmetic_are_built_and_counted_too(family: str):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[family](**sizes, vocab_size=64, intermediate_size=48, max_position_embeddings=32).to_dict()
    model = build(config, seed=1)
    assert count_parameters(skeleton(config)) == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_repository_runs_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "own.py").write_text(REMOTE_CODE)
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    config = {**config_of("llama-nano"), **own}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no model_type 'own'"):
        build({**config, "_name_or_path": str(source)}, seed=1)
    with pytest.raises(Unfit, match="nothing says where that code is"):
        build(config, seed=1, trust_remote_code=True)
    assert skeleton(config, source=str(source), trust_remote_code=True).config.model_type == "own"
    model = build(config, seed=1, source=str(source), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert same(model, build(config_of("llama-nano"), seed=1))
