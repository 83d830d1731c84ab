"""Trained weights that are not the configuration's: refused by name, with what to do, by plan and ranks alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfstep.models.hf_config import Unfit
from halfstep.models.hf_weights import check
from halfstep.models.network import build, skeleton
from halfstep.models.presets import PRESETS
from halfstep.models.shapes import hf_config, shape_of

CONFIG = hf_config(shape_of(PRESETS["llama-nano"], vocabulary=64, layers=2, width=32, heads=2))
UNTIED = {**CONFIG, "tie_word_embeddings": False}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(folder: Path, config: dict[str, Any] = CONFIG, **changed: Any) -> Path:
    """Save weights of a configuration beside another one."""
    build(config, seed=11).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, {"format": "pt"})


def refusals(folder: Path) -> list[Unfit]:
    """Return what the plan says, on the meta device, and what a rank says that loads."""
    config, content = json.loads((folder / "config.json").read_text()), []
    for attempt in (
        lambda: check(str(folder), skeleton(config).config, {}),
        lambda: build(config, seed=1, weights=str(folder)),
    ):
        with pytest.raises(Unfit) as refusal:
            attempt()
        assert "\n" not in str(refusal.value)
        content.append(refusal.value)
    return content


def both(folder: Path) -> Unfit:
    """Return the refusal that plan and rank agree on."""
    planned, loaded = refusals(folder)
    assert (str(planned), planned.fix) == (str(loaded), loaded.fix)
    return planned


def test_a_config_with_fewer_layers_than_the_file_is_refused(tmp_path: Path):
    refusal = both(saved(tmp_path, num_hidden_layers=1))
    assert f"the weights of {tmp_path} have 9 parameters, such as model.layers.1." in str(refusal)
    assert str(refusal).endswith("that the config's model lacks")
    assert "save_pretrained" in str(refusal.fix)


def test_one_tensor_too_many_is_refused_by_name(tmp_path: Path):
    tensors(saved(tmp_path), lambda content: content.update(extra=torch.zeros(2)))
    assert f"{tmp_path} have extra that the config's model lacks" in str(both(tmp_path))


def test_weights_under_other_names_are_not_taken_for_fresh_ones(tmp_path: Path):
    def rename(content: dict[str, torch.Tensor]) -> None:
        for name in list(content):
            content[f"net.{name}"] = content.pop(name)

    tensors(saved(tmp_path), rename)
    assert "have other names than the model's: net.model." in str(both(tmp_path))


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(tmp_path: Path):
    refusal = both(saved(tmp_path, UNTIED, tie_word_embeddings=True))
    assert f"have a {HEAD} of their own, and the config ties it to {EMBEDDING}" in str(refusal)
    assert "set tie_word_embeddings to false" in str(refusal.fix)


def test_a_head_that_is_written_twice_but_equal_stays_tied(tmp_path: Path):
    tensors(saved(tmp_path), lambda content: content.update({HEAD: content[EMBEDDING].clone()}))
    check(str(tmp_path), skeleton(CONFIG).config, {})
    model = build(CONFIG, seed=1, weights=str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_head_under_a_config_that_does_not_tie_it_names_the_key(tmp_path: Path):
    refusal = both(saved(tmp_path, CONFIG, tie_word_embeddings=False))
    assert f"lack {HEAD}, and the config does not tie it" in str(refusal)
    assert "set tie_word_embeddings to true" in str(refusal.fix)


@pytest.mark.parametrize("kept", [100, 5000])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int):
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refusal = both(tmp_path)
    assert f"the weights of {file} cannot be loaded" in str(refusal)
    assert refusal.fix == "fetch or copy that file again"


def test_a_shard_that_is_missing_is_named(tmp_path: Path):
    build(CONFIG, seed=1).save_pretrained(tmp_path, max_shard_size="20kB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert all(gone.name in str(refusal) for refusal in refusals(tmp_path))


def test_a_pickle_that_is_cut_short_is_named(tmp_path: Path):
    saved(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(tmp_path / "model.safetensors"), file)
    (tmp_path / "model.safetensors").unlink()
    check(str(tmp_path), skeleton(CONFIG).config, {})
    file.write_bytes(file.read_bytes()[:3000])
    assert all("pytorch_model.bin" in str(refusal) for refusal in refusals(tmp_path))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path):
    class Shell:
        def __reduce__(self) -> Any:
            return print, ("this must never be printed",)

    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Shell()}, tmp_path / "pytorch_model.bin")
    for refusal in refusals(tmp_path):
        assert "cannot be loaded" in str(refusal)


def test_a_table_that_is_not_trained_is_not_trained_after_loading_either(tmp_path: Path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "roformer", **sizes, "intermediate_size": 32, "is_decoder": True}
    loaded = build(config, seed=1, weights=str(saved(tmp_path, config)))
    for model in (build(config, seed=1), loaded):
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == ["roformer.encoder.embed_positions.weight"]


def test_a_routers_bias_is_loaded_with_every_bit_in_every_precision(tmp_path: Path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "intermediate_size": 32}
    more |= {"moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "num_key_value_heads": 4}
    more |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_experts_per_tok": 2}
    config = {"model_type": "deepseek_v3", **sizes, **more}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors(saved(tmp_path, config), lambda content: content[bias].copy_(torch.tensor([5.001, 5.002, 5.003, 5.004])))
    for dtype in (torch.float32, torch.bfloat16):
        model = build(config, seed=1, weights=str(tmp_path), dtype=dtype)
        assert model.get_buffer(bias).tolist() == pytest.approx([5.001, 5.002, 5.003, 5.004]), dtype
