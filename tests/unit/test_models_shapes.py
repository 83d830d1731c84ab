"""The presets and the arithmetic of shapes, held against transformers' own models on the meta device."""

import dataclasses
import json
import subprocess
import sys

import pytest
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from halfstep.models import shapes
from halfstep.models.presets import PRESETS, Preset
from halfstep.models.shapes import (
    Shape,
    flops_per_token,
    from_hf_config,
    hf_config,
    override_hf_config,
    parameters,
    shape_of,
)

PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
}
SMALL = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
}


def on_meta(config: dict) -> PreTrainedModel:
    values = dict(config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[values.pop("model_type")].from_dict(values))
    model.tie_weights()
    return model


def shape(name: str, **overrides) -> Shape:
    return shape_of(PRESETS[name], **({"vocabulary": 4096} if PRESETS[name].vocabulary is None else {}), **overrides)


def small_config(family: str) -> dict:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"intermediate_size": 160, "vocab_size": 300, "max_position_embeddings": 64}
    return CONFIG_MAPPING[family](**sizes, **rest, **SMALL[family]).to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_parameters_transformers_counts(name: str):
    model = on_meta(hf_config(shape(name)))
    sizes = [parameter.numel() for parameter in model.parameters()]
    embedding = model.get_input_embeddings().weight
    heads = {id(embedding): embedding, id(model.lm_head.weight): model.lm_head.weight}
    assert parameters(shape(name)) == sum(sizes)
    assert shapes.largest_tensor(shape(name)) == max(sizes)
    assert shapes.embedding_parameters(shape(name)) == sum(weight.numel() for weight in heads.values())


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_named_sizes_have_the_published_parameters_but_for_the_padding(name: str, count: int):
    padding = 47 * PRESETS[name].width if PRESETS[name].family == "gpt2" else 0
    assert parameters(shape(name)) - padding == count


def test_all_named_models_are_there():
    gpt2 = {f"gpt2-{size}" for size in ("nano", "124m", "355m", "774m", "1.5b")}
    gpt3 = {f"gpt3-{size}" for size in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")}
    assert set(PRESETS) == gpt2 | gpt3 | {"llama-nano", "llama-1b", "llama-8b", "llama-70b"}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_row_says_where_it_comes_from_and_has_no_dropout(preset: Preset):
    assert len(preset.source) > 20
    assert preset.dropout == 0.0
    assert preset.vocabulary is None or preset.vocabulary % 128 == 0


def test_the_rows_that_differ_from_the_gpt3_table_say_so():
    assert (PRESETS["gpt3-1.3b"].heads, PRESETS["gpt3-13b"].width) == (16, 5120)
    assert "24 heads" in PRESETS["gpt3-1.3b"].source
    assert "5140" in PRESETS["gpt3-13b"].source


def test_presets_and_shapes_load_without_torch():
    code = "import sys, halfstep.models.shapes as s; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("family", SMALL)
def test_other_families_are_counted_as_transformers_does(family: str):
    config = small_config(family)
    shapes = from_hf_config(config)
    assert shapes is not None
    assert parameters(shapes) == sum(parameter.numel() for parameter in on_meta(config).parameters())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["gpt2-nano", "llama-nano"]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 12),
    head_dim=st.sampled_from([2, 8, 10]),
    vocabulary=st.integers(1, 400),
)
def test_any_override_is_counted_as_transformers_does(
    name: str, layers: int, heads: int, head_dim: int, vocabulary: int
):
    overridden = shape_of(PRESETS[name], layers=layers, width=heads * head_dim, heads=heads, vocabulary=vocabulary)
    assert heads % overridden.kv_heads == 0
    sizes = [parameter.numel() for parameter in on_meta(hf_config(overridden)).parameters()]
    assert parameters(overridden) == sum(sizes)
    assert shapes.largest_tensor(overridden) == max(sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_is_plain_json_and_reads_back_as_its_shape(name: str):
    config = hf_config(shape(name))
    assert json.loads(json.dumps(config)) == config
    assert from_hf_config(config) == dataclasses.replace(shape(name), norm_eps=1e-5, rope_theta=None, rope_scaling=())


def test_the_largest_tensor_of_a_thin_gpt2_is_its_fused_projection():
    config = CONFIG_MAPPING["gpt2"](n_embd=32, n_head=2, n_layer=1, n_inner=16, vocab_size=20, n_positions=8).to_dict()
    derived = from_hf_config(config)
    assert derived is not None
    assert (
        shapes.largest_tensor(derived) == 3 * 32 * 32 == max(weight.numel() for weight in on_meta(config).parameters())
    )


def test_gpt2_uses_the_fused_gelu():
    assert hf_config(shape("gpt2-124m"))["activation_function"] == "gelu_pytorch_tanh"


def test_llama_1b_keeps_its_rotary_scaling():
    assert hf_config(shape("llama-1b"))["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(("width", "ffn"), [(256, 704), (64, 176), (96, 264), (384, 1056)])
def test_the_feed_forward_width_keeps_its_ratio_to_the_width(width: int, ffn: int):
    assert shape("llama-nano", width=width).ffn == ffn
    assert shape("gpt2-nano", width=width).ffn == 4 * width


def test_a_fractional_feed_forward_width_is_rounded_up_to_32():
    assert shape("llama-nano", width=10, heads=1).ffn == 32
    assert shape("llama-nano", width=130, heads=1).ffn == 384  # 357.5


def test_key_and_value_heads_stay_legal():
    assert shape("llama-8b", heads=64).kv_heads == 8
    assert shape("llama-8b", heads=4).kv_heads == 4
    assert shape("llama-8b", width=4092, heads=6).kv_heads == 2
    assert shape("gpt2-124m", heads=6).kv_heads == 6


def test_a_longer_sequence_lengthens_the_positions_and_a_shorter_one_does_not():
    assert shape("gpt2-124m", sequence=2048).positions == 2048
    assert shape("gpt2-124m", sequence=512).positions == 1024


def test_nano_takes_the_tokenizers_vocabulary_and_a_named_size_keeps_its_own():
    assert shape_of(PRESETS["gpt2-nano"], vocabulary=1234).vocabulary == 1234
    assert shape_of(PRESETS["gpt2-124m"], vocabulary=1234).vocabulary == 50304


@pytest.mark.parametrize(
    ("name", "overrides", "phrase"),
    [
        ("gpt2-nano", {"heads": 5}, "a width of 128 cannot be split into 5 equal heads; it can into 2, 4, 8"),
        ("gpt2-nano", {"layers": 0}, "layers must be at least 1, not 0"),
        ("gpt2-nano", {"width": -8}, "width must be at least 1, not -8"),
        ("gpt2-nano", {"dropout": 1.0}, "less than 1, not 1.0"),
        ("llama-nano", {"width": 12, "heads": 4}, "12 / 4 = 3 is odd"),
        ("gpt2-124m", {"vocabulary": 60000}, "the tokenizer has 60000 tokens and the model's vocabulary only 50304"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_sentence(name: str, overrides: dict, phrase: str):
    with pytest.raises(ValueError, match=phrase):
        shape_of(PRESETS[name], **{"vocabulary": 512, **overrides})


def test_nano_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="takes its vocabulary from the data's tokenizer"):
        shape_of(PRESETS["llama-nano"])


@pytest.mark.parametrize("family", SMALL)
def test_an_override_is_written_in_the_familys_own_keys(family: str):
    config = small_config(family)
    changed = override_hf_config(config, layers=2, width=128, heads=8, dropout=0.25)
    shapes = from_hf_config(changed)
    assert shapes is not None
    assert (shapes.layers, shapes.width, shapes.heads, shapes.kv_heads) == (2, 128, 8, 2)
    assert (shapes.ffn, shapes.dropout) == (320, 0.25)
    # A head_dim of its own, not width / heads, stays.
    assert shapes.head_dim == SMALL[family].get("head_dim", 16)
    model = on_meta(changed)
    assert parameters(shapes) == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.attention_dropout == 0.25
    assert config == small_config(family)


def test_an_override_of_gpt2_reaches_all_its_dropouts():
    config = CONFIG_MAPPING["gpt2"](n_inner=100).to_dict()
    changed = override_hf_config(config, layers=3, width=96, heads=6, dropout=0.0)
    assert {
        key: changed[key] for key in ("n_layer", "n_embd", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    } == {
        "n_layer": 3,
        "n_embd": 96,
        "n_head": 6,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    assert changed["n_inner"] == 32  # 12.5 rounded up


def test_without_overrides_any_configuration_passes():
    config = {"model_type": "mamba", "anything": [1]}
    assert override_hf_config(config) == config


@pytest.mark.parametrize(
    ("config", "overrides", "phrase"),
    [
        ({"model_type": "mamba"}, {"layers": 2}, "layers can be changed .* not in this one of model_type 'mamba'"),
        ({"model_type": "llama", "hidden_size": 64}, {"width": 32}, "complete configuration"),
        (
            CONFIG_MAPPING["gpt2"]().to_dict(),
            {"heads": 7},
            "768 cannot be split into 7 equal heads; it can into 4, 6, 8",
        ),
    ],
)
def test_an_override_that_cannot_be_is_refused(config: dict, overrides: dict, phrase: str):
    with pytest.raises(ValueError, match=phrase):
        override_hf_config(config, **overrides)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "mamba"},
        {"model_type": "gpt2", "n_embd": 64},
        {key: value for key, value in small_config("mistral").items() if key != "num_key_value_heads"},
        {key: value for key, value in small_config("qwen3").items() if key != "head_dim"},
        {**CONFIG_MAPPING["gpt2"]().to_dict(), "add_cross_attention": True},
        {**CONFIG_MAPPING["gpt2"]().to_dict(), "n_head": 0},
        {**CONFIG_MAPPING["gpt2"]().to_dict(), "n_embd": "wide"},
    ],
)
def test_a_configuration_that_is_not_fully_known_gives_no_shape(config: dict):
    assert from_hf_config(config) is None


def test_flops_of_gpt2_124m_are_those_of_the_published_formulas():
    gpt2 = shape("gpt2-124m")
    attention = 12 * 768 * 1024
    assert flops_per_token(gpt2, 1024, "palm") == 6 * 124_475_904 + 12 * attention
    assert flops_per_token(gpt2, 1024) == 6 * 124_475_904 + 6 * attention  # tied: the matrix works once, as the head


def test_an_untied_input_embedding_costs_no_flops():
    llama = shape("llama-8b")
    attention = 32 * 4096 * 8192
    assert flops_per_token(llama, 8192, "causal") == 6 * (8_030_261_248 - 128256 * 4096) + 6 * attention
    assert flops_per_token(llama, 8192, "palm") == 6 * 8_030_261_248 + 12 * attention


def test_an_unknown_flop_convention_is_refused():
    with pytest.raises(ValueError, match="causal or palm, not 'full'"):
        flops_per_token(shape("llama-nano"), 128, "full")
