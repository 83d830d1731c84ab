"""Two DeepSpeed ranks prove that a model starts with the same values at every ZeRO stage and in every precision.

Run by torchrun, this file is the program of a rank: it writes what it found to rank-N.json in the folder it is given.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from fakes.experts import BIAS, ROUTED
from ranks import reported_by_two

from halfstep.launcher.engine.numerics import cpu_fp16
from halfstep.models.loss import next_token_loss
from halfstep.models.network import build, initial_statistics
from halfstep.models.presets import PRESETS
from halfstep.models.shapes import hf_config, shape_of

FAMILIES = ("gpt2-nano", "llama-nano")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY = 384
SEED = 1234
EXPERTS = {**ROUTED, "vocab_size": VOCABULARY, "intermediate_size": 32}
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    # Drawn in a constructor, and set in one.
    "openai-gpt": {"model_type": "openai-gpt", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "apertus": {"model_type": "apertus", **_SIZES, "num_key_value_heads": 2, "intermediate_size": 48},
    # Buffers of a type that a constructor asks for, and a table that is not trained.
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        **_SIZES,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
    },
    "lfm2_moe": {
        "model_type": "lfm2_moe",
        **_SIZES,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "roformer": {"model_type": "roformer", **_SIZES, "intermediate_size": 48, "is_decoder": True},
}


def ds_config(stage: int, precision: str) -> dict:
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


def config_of(name: str) -> dict:
    return hf_config(shape_of(PRESETS[name], layers=2, width=64, vocabulary=VOCABULARY))


def digests(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Hash every parameter, rounded to `dtype`, and every buffer as it is."""
    import deepspeed

    hashes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        whole = (
            deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext()
        )
        with whole:
            hashes[name] = _digest(parameter.detach().to(dtype))
    return hashes | {name: _digest(buffer) for name, buffer in model.named_buffers()}


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()


def losses(name: str, stage: int, precision: str, *, checkpointing: bool = False, steps: int = 1) -> list[float]:
    """Train a few steps and return the losses, the mean of the ranks."""
    import deepspeed

    config = ds_config(stage, precision)
    cpu_fp16.prepare(precision, "cpu", compiled=False)  # DeepSpeed refuses fp16 on a CPU without it
    model = build(
        config_of(name), seed=SEED, zero3=config if stage == 3 else None, activation_checkpointing=checkpointing
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    tokens = torch.arange(33) * (7 + torch.distributed.get_rank()) % VOCABULARY
    seen = []
    for _ in range(steps):
        loss = next_token_loss(engine(tokens[None, :-1]).logits, tokens[None, 1:])
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        seen.append(total.item() / torch.distributed.get_world_size())
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return seen


def rank_main(out: Path) -> None:
    """Measure everything the tests below assert, in one start of the ranks."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    gathered_elements: list[int] = []

    class Recorded(deepspeed.zero.GatheredParameters):
        def __enter__(self) -> None:
            gathered_elements.append(sum(parameter.ds_numel for parameter in getattr(self, "params", [])))
            super().__enter__()

    deepspeed.zero.GatheredParameters = Recorded
    results: dict = {"digests": {}, "losses": {}, "checkpointed": {}, "elements": {}, "untouched": True}
    for name in FAMILIES:
        for precision, dtype in PRECISIONS.items():
            state = torch.get_rng_state()
            plain = build(config_of(name), seed=SEED)
            gathered_elements.clear()
            split = build(config_of(name), seed=SEED, zero3=ds_config(3, precision))
            results["elements"][name] = [max(gathered_elements), sum(p.numel() for p in plain.parameters())]
            results["untouched"] &= torch.equal(state, torch.get_rng_state())
            results["partitioned"] = all(hasattr(p, "ds_id") and p.numel() == 0 for p in split.parameters())
            results["statistics"] = initial_statistics(split)
            results["digests"][f"{name} {precision}"] = [digests(plain, dtype), digests(split, dtype)]
            results["losses"][f"{name} {precision}"] = [losses(name, stage, precision) for stage in range(4)]
        results["checkpointed"][name] = [
            [losses(name, stage, "fp32", checkpointing=on, steps=3) for on in (False, True)] for stage in range(4)
        ]
    results["others"] = {
        f"{name} {precision}": [
            digests(build(config, seed=SEED, dtype=dtype), dtype),
            digests(build(config, seed=SEED, zero3=ds_config(3, precision)), dtype),
        ]
        for name, config in OTHERS.items()
        for precision, dtype in PRECISIONS.items()
    }
    results["loaded"] = loaded_digests(out)
    results["router"] = router_digests(out)
    results["forgotten"] = forgotten_digests()
    results["refused"] = refusals(out)
    (out / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


def loaded_digests(out: Path) -> list[dict[str, str]]:
    """Save a checkpoint from rank 0 and load it plainly and under `zero.Init`, with another seed."""
    folder, config = out / "checkpoint", config_of("llama-nano")
    saved = build(config, seed=99)
    if torch.distributed.get_rank() == 0:
        saved.save_pretrained(folder)
    torch.distributed.barrier()
    plain = build(config, seed=1, weights=str(folder))
    split = build(config, seed=2, weights=str(folder), zero3=ds_config(3, "bf16"))
    after = build(config, seed=99, dtype=torch.bfloat16)
    assert not any(hasattr(p, "ds_id") for p in after.parameters()), "loading left stage 3 behind"
    return [digests(model, torch.bfloat16) for model in (saved, plain, split, after)]


def router_digests(out: Path) -> dict[str, list[dict[str, str]]]:
    """Save experts whose router has a bias that bf16 cannot hold, and load them plainly and under `zero.Init`."""
    folder, config = out / "router", EXPERTS
    if torch.distributed.get_rank() == 0:
        saved = build(config, seed=99)
        saved.get_buffer(BIAS).copy_(torch.tensor([5.001, 5.002, 5.003, 5.004]))
        saved.save_pretrained(folder)
    torch.distributed.barrier()
    return {
        precision: [
            digests(build(config, seed=1, weights=str(folder), dtype=dtype), dtype),
            digests(build(config, seed=2, weights=str(folder), zero3=ds_config(3, precision)), dtype),
        ]
        for precision, dtype in PRECISIONS.items()
    }


def forgotten_digests() -> list[dict[str, str]]:
    """Build an architecture whose initialisation forgets a matrix, which its constructor has drawn."""
    from transformers import LlamaPreTrainedModel, PreTrainedModel

    def forget(model: PreTrainedModel, module: torch.nn.Module) -> None:
        if module is not model.base_model.layers[1].mlp.up_proj:
            PreTrainedModel._init_weights(model, module)

    LlamaPreTrainedModel._init_weights = forget
    try:
        config = config_of("llama-nano")
        plain, split = build(config, seed=SEED), build(config, seed=SEED, zero3=ds_config(3, "fp32"))
        assert plain.model.layers[1].mlp.up_proj.weight.std() > 0.05, "torch's own, not Llama's 0.02"
        return [digests(model, torch.float32) for model in (plain, split)]
    finally:
        del LlamaPreTrainedModel._init_weights


def refusals(out: Path) -> list[str]:
    """Return what `build` says at stage 3 of a parameter without a value, and of weights of another model."""
    from transformers.models.llama import modeling_llama

    class Unset(torch.nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(size))

    norm, modeling_llama.LlamaRMSNorm = modeling_llama.LlamaRMSNorm, Unset
    said = []
    config, zero3 = config_of("llama-nano"), ds_config(3, "fp32")
    weights = str(out / "checkpoint")
    for attempt in (
        lambda: build(config, seed=1, zero3=zero3),
        lambda: build({**config, "num_hidden_layers": 1}, seed=1, zero3=zero3, weights=weights),
        lambda: build({**config, "tie_word_embeddings": False}, seed=1, zero3=zero3, weights=weights),
        lambda: build(config, seed=1, zero3=zero3, weights=str(out / "nowhere")),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error).replace(str(out), "OUT"))
        else:
            said.append("accepted")
        modeling_llama.LlamaRMSNorm = norm
    return said


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    return reported_by_two(__file__, out, scratch)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_partitioned_model_has_the_rounded_values_of_a_plain_one(ranks: list[dict], name: str, precision: str):
    for results in ranks:
        plain, split = results["digests"][f"{name} {precision}"]
        assert plain == split
        assert plain == ranks[0]["digests"][f"{name} {precision}"][0]


def test_the_whole_model_is_never_gathered(ranks: list[dict]):
    for name in FAMILIES:
        largest, whole = ranks[0]["elements"][name]
        assert largest < whole * 0.6
    assert ranks[0]["partitioned"]


def test_the_callers_random_state_is_left_alone(ranks: list[dict]):
    assert all(results["untouched"] for results in ranks)


def test_the_statistics_of_a_partitioned_model_are_the_architectures(ranks: list[dict]):
    for _, deviation in ranks[1]["statistics"].values():
        assert deviation == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_loss_is_the_same_at_every_stage(ranks: list[dict], name: str, precision: str):
    first = [stage[0] for stage in ranks[0]["losses"][f"{name} {precision}"]]
    assert first[0] == pytest.approx(math.log(VOCABULARY), abs=0.2)
    assert max(first) - min(first) < (1e-6 if precision == "fp32" else 2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_changes_no_loss_at_any_stage(ranks: list[dict], name: str):
    for without, checkpointed in ranks[0]["checkpointed"][name]:
        assert checkpointed == pytest.approx(without, abs=1e-5)
        assert without[2] < without[0]


def test_a_checkpoint_loads_the_same_with_and_without_partitioning(ranks: list[dict]):
    for results in ranks:
        saved, plain, split, after = results["loaded"]
        assert saved == plain == split == after


@pytest.mark.parametrize("name", [f"{name} {precision}" for name in OTHERS for precision in PRECISIONS])
def test_other_families_start_with_the_same_parameters_and_buffers(ranks: list[dict], name: str):
    for results in ranks:
        plain, split = results["others"][name]
        assert plain == split == ranks[0]["others"][name][0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_routers_bias_is_loaded_the_same_with_and_without_partitioning(ranks: list[dict], precision: str):
    for results in ranks:
        plain, split = results["router"][precision]
        assert plain == split == ranks[0]["router"]["fp32" if precision == "fp32" else precision][0]
        assert plain[BIAS] == ranks[0]["router"]["fp32"][0][BIAS], "fp32 in every precision"


def test_what_an_initialisation_forgets_is_drawn_by_its_constructor_at_every_stage(ranks: list[dict]):
    for results in ranks:
        plain, split = results["forgotten"]
        assert plain == split == ranks[0]["forgotten"][0]


def test_every_rank_of_stage_3_refuses_with_the_same_words(ranks: list[dict]):
    unset, layers, untied, nowhere = ranks[0]["refused"]
    assert unset.startswith("neither LlamaForCausalLM._init_weights nor a constructor gives model.layers.")
    assert layers.startswith("the weights of OUT/checkpoint have 9 parameters, such as model.layers.1.")
    assert untied == (
        "the weights of OUT/checkpoint lack lm_head.weight, and the config does not tie it to the input embedding"
    )
    assert nowhere.startswith("the weights of OUT/nowhere cannot be loaded")
    assert ranks[0]["refused"] == ranks[1]["refused"]


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    os._exit(0)  # taking Python down beside threads of gloo can abort
