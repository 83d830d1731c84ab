"""The values of the run key `precision`: what each is planned as, how they are written, and modules that stay fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.launcher.config import precisions
from halfstep.launcher.config.load import load
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import hardware, workload
from halfstep.launcher.forecast.activations import activations
from halfstep.launcher.forecast.states import states
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology
from halfstep.models import shapes
from halfstep.models.islands import keep_in_fp32
from halfstep.models.network import build
from halfstep.models.presets import PRESETS

GPUS = Topology(world_size=8, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")
CPU = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")


def planned(*arguments: str, topology: Topology = GPUS) -> Plan:
    request = load(["model=gpt2-124m", *arguments], data=False)
    return resolve(request, topology, facts.read(request.spec))


def test_the_table_is_the_run_keys() -> None:
    assert set(precisions.PRECISIONS) == set(RunSpec.model_fields["precision"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "engine", "autocast"),
    [
        ("fp32", None, None),
        ("tf32", None, None),
        ("fp16", "fp16", None),
        ("bf16", "bf16", None),
        ("fp16-autocast", None, "float16"),
        ("bf16-autocast", None, "bfloat16"),
    ],
)
def test_each_is_one_engine_of_deepspeed(precision: str, engine: str | None, autocast: str | None) -> None:
    made = planned(f"precision={precision}", "zero=2")
    assert made.refused_by == []
    assert {name for name in ("fp16", "bf16") if made.deepspeed[name]["enabled"]} == ({engine} if engine else set())
    said = made.deepspeed["torch_autocast"]
    expected = {"enabled": True, "dtype": autocast, "lower_precision_safe_modules": []}
    assert said == (expected if autocast else {"enabled": False})
    assert ("loss_scale" in made.deepspeed["fp16"]) == precisions.of(precision).scaled


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", ["bf16-autocast", "fp16-autocast"])
def test_autocast_holds_what_fp32_holds_and_16_bit_copies_of_what_is_multiplied(zero: int, precision: str) -> None:
    full, mixed = (planned(f"precision={name}", f"zero={zero}", "batch.micro=1") for name in ("fp32", precision))
    shape = shapes.shape_of(PRESETS["gpt2-124m"])
    multiplied = 12 * 12 * 768**2 + 768 * 50304
    kinds = [
        workload.of(
            plan.deepspeed,
            shape=shape,
            parameters=plan.model.parameters,
            zero=zero,
            precision=plan.precision,
            micro=1,
            accumulation=1,
            topology=GPUS,
            sequence=1024,
        )
        for plan in (full, mixed)
    ]
    assert states(kinds[1]) == states(kinds[0])
    kept = [activations(kind) for kind in kinds]
    assert kept[1].kept - 12 * kept[1].block == 2 * multiplied
    assert kept[1].logits == kept[0].logits // 2


def test_peaks_are_those_of_what_is_multiplied() -> None:
    peaks = {name: hardware.peak_flops("h100", "", name) for name in precisions.PRECISIONS}
    half = 989e12
    assert peaks == {
        "fp32": 67e12,
        "tf32": 494.5e12,
        **dict.fromkeys(("fp16", "bf16", "fp16-autocast", "bf16-autocast"), half),
    }
    assert hardware.peak_flops("v100", "", "tf32") is None, "it has none"


# --- how it is written -----------------------------------------------------------------------------------------------


def test_a_table_in_a_run_file_says_the_same_as_two_words(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "gpt2-nano"\n[precision]\nname = "bf16-autocast"\nkeep_fp32 = ["ln_f", "lm_head"]\n')
    table = load([str(file)], data=False)
    for spelling in ("precision.keep_fp32=ln_f,lm_head", "keep_fp32=[ln_f,lm_head]", 'keep_fp32=["ln_f", "lm_head"]'):
        typed = load(["model=gpt2-nano", "precision=bf16-autocast", spelling], data=False)
        assert typed.spec == table.spec
    assert table.spec.keep_fp32 == ("ln_f", "lm_head")


def test_another_value_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError) as caught:
        load(["model=gpt2-nano", "precision=bf16-amp"], data=False)
    assert "'bf16-autocast'" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "topology", "expected"),
    [
        ({"enabled": True, "dtype": "bfloat16"}, GPUS, "bf16-autocast"),
        ({"enabled": True, "dtype": "torch.bfloat16"}, GPUS, "bf16-autocast"),
        ({"enabled": True, "dtype": "half"}, CPU, "fp16-autocast"),
        ({"enabled": True}, GPUS, "fp16-autocast"),
        ({"enabled": True}, CPU, "bf16-autocast"),
        ({"enabled": False, "dtype": "half"}, CPU, "bf16"),
    ],
)
def test_a_deepspeed_file_with_autocast_is_that_precision(
    tmp_path: Path, section: dict[str, Any], topology: Topology, expected: str
) -> None:
    """Unset, the type is torch's own: float16 on a GPU, whose loss Halfstep scales."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "torch_autocast": section}))
    request = load(["model=gpt2-124m", "--ds-config", str(file)], data=False)
    made = resolve(request, topology, facts.read(request.spec))
    assert (made.precision, made.refused_by) == (expected, [])
    if "autocast" in expected:
        assert made.deepspeed["torch_autocast"]["lower_precision_safe_modules"] == []


def test_autocast_in_a_type_that_it_does_not_have_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"torch_autocast": {"enabled": true, "dtype": "int8"}}')
    request = load(["model=gpt2-124m", "--ds-config", str(file)], data=False)
    with pytest.raises(RequestError) as caught:
        resolve(request, GPUS, facts.read(request.spec))
    assert (caught.value.what, caught.value.where) == ("torch.autocast has no int8", "ds.json: torch_autocast.dtype")


# --- modules that stay in fp32 ---------------------------------------------------------------------------------------


def network() -> torch.nn.Module:
    return build(shapes.hf_config(shapes.shape_of(PRESETS["llama-nano"], layers=2, width=32, vocabulary=64)), seed=0)


def test_kept_modules_compute_in_fp32_and_no_other_does() -> None:
    model, types = network(), {}
    kept = keep_in_fp32(model, ["layers.0.mlp", "lm_head"], "cpu")
    assert kept == ["model.layers.0.mlp", "lm_head"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, made, name=name: types.update({name: made.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(16)[None])
    wide = {name for name, dtype in types.items() if dtype is torch.float32}
    assert wide == {"lm_head", *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))}
    assert len(types) == 15


def test_what_autocast_rounds_away_a_kept_model_keeps() -> None:
    tokens = torch.arange(16)[None]
    full = network()(input_ids=tokens).logits
    kept = network()
    keep_in_fp32(kept, ["*"], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kept(input_ids=tokens).logits, full)
        assert not torch.equal(network()(input_ids=tokens).logits.float(), full)


def test_a_pattern_that_names_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no module is called ln_f; names end in .*input_layernorm.*lm_head"):
        keep_in_fp32(network(), ["lm_head", "ln_f"], "cpu")
