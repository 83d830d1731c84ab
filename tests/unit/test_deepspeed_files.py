"""DeepSpeed JSON files: read as DeepSpeed reads them, and their word is taken wherever no run key was given."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.deepspeed_files import REAL
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.cli import main
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.load import load
from halfstep.launcher.errors import HalfstepError, RequestError
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.ds import dsconfig, dsfile
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology

GPUS = Topology(
    world_size=8, ranks_per_node=8, accelerator="cuda", fused_adam=True, device_name="NVIDIA H100 80GB HBM3"
)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """Return a function that plans a DeepSpeed file's text, or content, with more words, for two CPU ranks."""

    def make(content: str | dict[str, Any], *arguments: str, topology: Topology | None = None) -> Plan:
        file = tmp_path / "mine.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        request = load(["model=gpt2-nano", "model.vocabulary=4096", f"--ds-config={file}", *arguments], data=False)
        world = topology or Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
        return resolve(request, world, facts.read(request.spec))

    return make


Planned = Callable[..., Plan]


def refusal(planned: Planned, content: str | dict[str, Any], *arguments: str) -> HalfstepError:
    with pytest.raises(RequestError) as caught:
        planned(content, *arguments).require_allowed()
    return caught.value


# --- read as DeepSpeed reads it ------------------------------------------------------------------------------------

ODD = {
    "comments": '{\n  // a line\n  "train_batch_size": 16, # and its end\n  /* a block */ "gradient_clipping": 0.5\n}',
    "commas": '{"train_batch_size": 16, "gradient_clipping": 0.5,}',
    "mark": '\ufeff{"train_batch_size": 16, "gradient_clipping": 0.5}',
    "no quotes, no commas": "{\n  train_batch_size: 16\n  gradient_clipping: 0.5\n}",
    "no braces": "train_batch_size: 16\ngradient_clipping: 0.5\n",
    "a number like 8.0": '{"train_batch_size": 16.0, "gradient_clipping": 0.5}',
    "plain": '{"train_batch_size": 16, "gradient_clipping": 0.5}',
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_what_deepspeed_reads_is_read_alike(planned: Planned, text: str, tmp_path: Path) -> None:
    import hjson
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    made = planned(text)
    with (tmp_path / "mine.json").open() as file:  # as runtime/config.py does, which leaves it open
        theirs = DeepSpeedConfig(hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys))
    assert (made.batch.global_, made.clip) == (theirs.train_batch_size, theirs.gradient_clipping) == (16, 0.5)


WRONG = {
    '{"fp16": {"enabled": true}, "fp16": {"enabled": false}}': ("the key 'fp16' stands there twice", "keep one"),
    '{"fp16": {"enabled": true, "enabled": false}, // x\n}': ("the key 'enabled' stands there twice", "keep one"),
    '{"train_batch_size": 32 "fp16": {}}': ("as plain JSON it is wrong at line 1, column 25", "a comma"),
    '{"fp16": {"enabled": True}}': ("as plain JSON it is wrong at line 1, column 22", "fix that place"),
    '{"a": /* no end': ("it ends in the middle", "close the comment"),
    '{"a": "no end': ("as plain JSON it is wrong at line 1", "fix that place"),
    "": ("the DeepSpeed config is not a JSON object", "wrap it in { }"),
    "[1]": ("the DeepSpeed config is not a JSON object", "wrap it in { }"),
    "null": ("the DeepSpeed config is not a JSON object", "wrap it in { }"),
    '{"gradient_clipping": NaN}': ("gradient_clipping is nan, not a finite number", "give a finite number"),
    '{"gradient_clipping": -Infinity}': ("gradient_clipping is -inf, not a finite number", "give a finite number"),
    '{"gradient_clipping": 1e999}': ("gradient_clipping is inf, not a finite number", "give a finite number"),
    '{"optimizer": {"params": {"betas": [0.9, 1e999]}}}': ("optimizer.params.betas[1] is inf", "give a finite number"),
    '{"gradient_clipping": 1e999, // x\n}': ("1e999 is larger than a number can be", "fix that place"),
    '{"gradient_clipping": ' + "9" * 400 + "}": ("gradient_clipping is a whole number of", "give at most"),
    '{"gradient_clipping": ' + "9" * 5000 + "}": ("the DeepSpeed config cannot be read: Exceeds the limit", "fix that"),
    '{"a":' * 100_000: ("it is nested more than 32 levels deep", "check how it is nested"),
    '{"a":' * 100_000 + "1" + "}" * 100_000: ("it is nested more than 32 levels deep", "check how it is nested"),
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": ("it is nested more than 32 levels deep", "check how it is nested"),
    "{a: " * 100_000: ("it is nested more than 32 levels deep", "check how it is nested"),
    '{"a":' * 40 + "1" + "}" * 40: ("is nested more than 32 levels deep", "check how it is nested"),
    '{"fp16.enabled": true}': ("the key 'fp16.enabled' has a dot in it", '{"fp16": {"enabled": ...}}'),
    '{"wandb": {"project": "\\ud800"}}': ("wandb.project holds the character U+D800", "take it out"),
    '{"wandb": {"project": "a\\u001b[31m"}}': ("wandb.project holds the character U+001B", "take it out"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=[text[:30] for text in WRONG])
def test_what_cannot_be_read_says_where_and_what_to_do(planned: Planned, text: str, said: tuple[str, str]) -> None:
    error = refusal(planned, text)
    assert said[0] in error.what
    assert said[1] in error.fix
    assert len(str(error)) < 600


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "large", "latin", "missing", "long"])
def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    import os

    file = tmp_path / "mine.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "large":
        file.write_bytes(b" " * (2**20 + 1))
    elif kind == "latin":
        file.write_bytes('{"wandb": {"project": "é"}}'.encode("latin-1"))
    elif kind == "long":
        file = tmp_path / ("x" * 300)
    with pytest.raises(RequestError) as caught:
        facts.ds_config(load(["model=gpt2-124m", f"--ds-config={file}"], data=False).spec)
    said = {
        "folder": "Is a directory|is no regular file",
        "pipe": "is no regular file",
        "device": "is no regular file",
        "large": "is larger than 1,048,576 bytes",
        "latin": "is not UTF-8 at byte 23",
        "missing": "does not exist",
        "long": "a name of 300 bytes is longer than a file system takes",
    }
    assert any(part in caught.value.what for part in said[kind].split("|")), caught.value.what


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["fp16", "bf16", "zero_optimization", "optimizer", "scheduler", "train_batch_size", "x", ""])


@given(st.dictionaries(keys, values, max_size=4) | values, st.randoms(use_true_random=False))
def test_no_content_of_a_file_ends_in_anything_but_a_plan_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, content: Any, random: Any
) -> None:
    file = tmp_path_factory.mktemp("any") / "mine.json"
    text = json.dumps(content)
    for _ in range(random.randrange(3)):  # cut, doubled and swapped characters
        place = random.randrange(len(text) + 1)
        text = random.choice([text[:place], text[place:], text[:place] + random.choice('{}[]",:/#*') + text[place:]])
    file.write_text(text, encoding="utf-8")
    request = load(["model=gpt2-nano", "model.vocabulary=64", f"--ds-config={file}"], data=False)
    world = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
    plan = None
    with contextlib.suppress(HalfstepError):
        plan = resolve(request, world, facts.read(request.spec))
    if plan is not None:
        written = json.dumps(plan.to_dict(), allow_nan=False)
        assert json.loads(written)["deepspeed"] == plan.deepspeed, "what is planned survives being written"


@pytest.mark.parametrize(("text", "expected"), REAL.values(), ids=REAL)
def test_a_file_as_people_have_them_is_planned_or_says_what_to_change(
    planned: Planned, text: str, expected: str
) -> None:
    if not expected.startswith("zero="):
        error = refusal(planned, text)
        assert any(expected in problem.fix for problem in (error, *error.more)), str(error)
        return
    made = planned(text)
    assert made.refused_by == []
    solved = made.batch.equation().partition("  ")[0]
    assert f"zero={made.zero} {made.precision} {solved}" == expected


# --- its word is taken ---------------------------------------------------------------------------------------------


def test_what_a_file_decides_needs_no_run_key(planned: Planned) -> None:
    made = planned(
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.5,
            "fp16": {"enabled": True, "initial_scale_power": 11, "loss_scale_window": 500, "hysteresis": 3},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0}},
        }
    )
    assert made.refused_by == []
    assert (made.precision, made.zero, made.clip, made.schedule.peak) == ("fp16", 3, 0.5, 3e-4)
    assert made.batch.equation().startswith("64 = 4 x 8 x 2")
    config = flatten(made.deepspeed)
    assert config["optimizer.params.betas"] == [0.8, 0.9]
    assert config["fp16.initial_scale_power"] == 11
    assert config["fp16.min_loss_scale"] == 1.0
    assert made.origins["fp16.enabled"] == "--ds-config mine.json"
    assert made.origins["bf16.enabled"] == "run key precision, from mine.json: fp16.enabled"
    assert made.origins["gradient_accumulation_steps"] == "the batch equation"


def test_a_run_key_that_was_given_is_not_overruled_and_both_are_named(planned: Planned) -> None:
    content = {
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
    }
    arguments = ["batch.global=32", "optimizer.clip=1", "precision=bf16", "zero=2", "offload=none", "optimizer.lr=1e-3"]
    error = refusal(planned, content, *arguments)
    problems = [error, *error.more]
    paths = ["train_batch_size", "gradient_clipping", "zero_optimization.stage", "fp16.enabled", "optimizer.params.lr"]
    paths.append("zero_optimization.offload_optimizer.device")
    assert {problem.what.partition(" ")[0] for problem in problems} == set(paths)
    keys = {"batch.global", "optimizer.clip", "precision", "zero", "optimizer.lr", "offload"}
    assert all(problem.where.startswith("--ds-config mine.json and ") for problem in problems)
    assert all(problem.where.endswith(" from the command line") for problem in problems)
    assert {problem.where.split(" and ")[1].split(" from ")[0] for problem in problems} == keys
    assert planned(content, "zero=3", "precision=fp16", "batch.global=64").refused_by == []


def test_a_default_that_contradicts_a_word_is_called_one(planned: Planned) -> None:
    (broken,) = planned({}, "ds.gradient_clipping=0.5").refused_by
    assert broken["sentence"] == (
        "gradient_clipping is 0.5 in the DeepSpeed config, but run key optimizer.clip, left at its default, "
        "makes it 1.0"
    )
    assert broken["fix"] == "change optimizer.clip, which decides it, and drop gradient_clipping"


@pytest.mark.parametrize(
    ("content", "precision"),
    [
        ({}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "fp32"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16-autocast"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "bf16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {}, "bf16": None}, "bf16"),
    ],
    ids=json.dumps,
)
def test_the_precision_is_what_deepspeed_would_train_in(
    planned: Planned, content: dict[str, Any], precision: str
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    made = planned(content)
    assert made.refused_by == []
    assert made.precision == precision
    if content and "auto" not in str(content):
        said = {key: value for key, value in content.items() if value}
        theirs = DeepSpeedConfig({**said, "train_batch_size": 1})
        enabled = "fp16" if theirs.float16_config.enabled else "bf16" if theirs.bfloat16_config.enabled else "fp32"
        enabled = "bf16-autocast" if theirs.torch_autocast_enabled else enabled
        assert enabled == precision or not said


@pytest.mark.parametrize(
    ("content", "arguments", "equation"),
    [
        ({"train_batch_size": 64}, [], "64 = 8 x 4 x 2"),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}, [], "64 = 2 x 16 x 2"),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, [], "64 = 16 x 2 x 2"),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5}, [], "30 = 3 x 5 x 2"),
        ({"train_micro_batch_size_per_gpu": 3}, [], "6 = 3 x 1 x 2"),
        ({"gradient_accumulation_steps": 4}, [], "32 = 4 x 4 x 2"),
        ({"gradient_accumulation_steps": 4}, ["batch.micro=3"], "24 = 3 x 4 x 2"),
        ({"gradient_accumulation_steps": 4}, ["batch.global=16"], "16 = 2 x 4 x 2"),
        ({"train_micro_batch_size_per_gpu": 4}, ["batch.micro=4"], "32 = 4 x 4 x 2"),
        ({"train_micro_batch_size_per_gpu": 4}, ["batch.global=16"], "16 = 4 x 2 x 2"),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, [], "32 = 8 x 2 x 2"),
    ],
    ids=str,
)
def test_the_batch_equation_is_solved_as_deepspeed_does(
    planned: Planned, content: dict[str, Any], arguments: list[str], equation: str
) -> None:
    made = planned(content, *arguments)
    assert made.batch.equation().partition("  ")[0] == equation
    assert made.refused_by == []
    assert made.identity["batch.global"] == made.batch.global_


@pytest.mark.parametrize(
    ("content", "arguments", "what", "fix"),
    [
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            [],
            "train_batch_size=32 is not train_micro_batch_size_per_gpu=4 x gradient_accumulation_steps=2 x 2 ranks",
            "write train_batch_size 16, or leave one of the three out",
        ),
        ({"train_batch_size": 33}, [], "batch.global=33 cannot be shared by 2 ranks", "take batch.global=32 or 34"),
        (
            {"train_batch_size": 32, "gradient_accumulation_steps": 5},
            [],
            "batch.global=32 is not a whole micro-batch x gradient_accumulation_steps=5 x 2 ranks",
            "take batch.global=30 or 40",
        ),
        (
            {"gradient_accumulation_steps": 4},
            ["batch.global=32", "batch.micro=8"],
            "gradient_accumulation_steps is 4 in the DeepSpeed config, but the batch equation makes it 2",
            "change batch.global or batch.micro",
        ),
        ({"train_batch_size": 10**12}, [], "batch.global=1000000000000: input should be less than", "batch.global is"),
        ({"train_batch_size": "32"}, [], 'train_batch_size: it takes a whole number, not the text "32"', "write 32"),
    ],
    ids=str,
)
def test_a_batch_that_does_not_come_out_is_explained(
    planned: Planned, content: dict[str, Any], arguments: list[str], what: str, fix: str
) -> None:
    error = refusal(planned, content, *arguments)
    assert error.what.startswith(what)
    assert error.fix.startswith(fix)
    assert "mine.json" in error.where


@pytest.mark.parametrize(
    ("section", "offload"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, "optimizer-cpu"),
        ({"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, "cpu"),
        ({"offload_optimizer": {"device": "none"}}, "none"),
        ({"offload_optimizer": {"pin_memory": True}}, "none"),
        ({"offload_optimizer": None, "offload_param": None}, "none"),
        ({"offload_optimizer": {"device": "auto", "nvme_path": "auto"}}, "none"),
    ],
    ids=json.dumps,
)
def test_what_is_offloaded_is_the_files_word(planned: Planned, section: dict[str, Any], offload: str) -> None:
    made = planned({"zero_optimization": {"stage": 3, **section}})
    assert made.refused_by == []
    config = flatten(made.deepspeed)
    moved = [config.get(f"zero_optimization.offload_{what}.device", "none") for what in ("optimizer", "param")]
    assert dsconfig.OFFLOADS[offload] == (moved[0], moved[1])
    assert planned({"zero_optimization": {"stage": 3, **section}}, f"offload={offload}").refused_by == []


def test_nvme_takes_its_folder_from_the_file(planned: Planned) -> None:
    away = {"device": "nvme", "nvme_path": "/disk"}
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": away, "offload_param": away}}
    unsaved = ["checkpoint.every=0", "checkpoint.at_end=false", "batch.global=8"]
    assert planned(content, *unsaved, topology=GPUS).refused_by == []
    away["nvme_path"] = "/other"
    content["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": "/disk"}
    assert refusal(planned, content).what == "the two nvme_path are different folders"
    mixed = {"zero_optimization": {"stage": 3, "offload_optimizer": away, "offload_param": {"device": "cpu"}}}
    assert "which is not one of the ways" in refusal(planned, mixed).what


def test_a_fixed_loss_scale_makes_the_moving_ones_idle_as_in_deepspeed(planned: Planned) -> None:
    made = planned({"fp16": {"enabled": True, "loss_scale": 128, "loss_scale_window": 500, "initial_scale_power": 32}})
    assert made.refused_by == []
    assert made.deepspeed["fp16"]["loss_scale"] == 128
    assert refusal(planned, {"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.window=5").what.startswith("a fixed")
    power = refusal(planned, {"fp16": {"enabled": True, "initial_scale_power": 40}})
    assert power.what == "fp16.initial_scale_power=40: input should be less than or equal to 32"
    assert power.where == "mine.json: fp16.initial_scale_power"


def test_both_precisions_at_once_are_refused(planned: Planned) -> None:
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    assert refusal(planned, both).what == "fp16.enabled and bf16.enabled are both true"
    neither = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}
    assert refusal(planned, neither).fix == "write true or false, or give precision=fp16 or precision=fp32"
    assert planned(neither, "precision=fp16").precision == "fp16"


# --- schedulers ----------------------------------------------------------------------------------------------------


def scheduler(kind: str, lr: float | None = None, **params: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"scheduler": {"type": kind, "params": params}}
    if lr is not None:
        content["optimizer"] = {"type": "AdamW", "params": {"lr": lr}}
    return content


@pytest.mark.parametrize(
    ("content", "curve"),
    [
        (
            scheduler("WarmupLR", warmup_max_lr=2e-4, warmup_num_steps=50, warmup_type="linear"),
            "constant 0.0002 50 1000",
        ),
        (scheduler("WarmupLR", 3e-4, warmup_num_steps=50, warmup_type="linear"), "constant 0.0003 50 1000"),
        (
            scheduler(
                "WarmupDecayLR",
                2e-5,
                total_num_steps=500,
                warmup_min_lr=0,
                warmup_max_lr=2e-5,
                warmup_num_steps=50,
                warmup_type="linear",
            ),
            "linear 2e-05 50 500 to 0",
        ),
        (
            scheduler("WarmupDecayLR", total_num_steps=1e3, warmup_num_steps=50, warmup_type="linear"),
            "linear 0.001 50 1000 to 0",
        ),
        (
            scheduler("WarmupCosineLR", 3e-4, total_num_steps=2000, warmup_num_steps=9, warmup_type="linear"),
            "cosine 0.0003 9 2000 to 0.0001",
        ),
        (
            scheduler("WarmupCosineLR", 3e-4, cos_min_ratio=0.2, warmup_num_steps=9, warmup_type="linear"),
            "cosine 0.0003 9 1000 to 0.2",
        ),
        (
            scheduler("WarmupLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto"),
            "constant 0.001 100 1000",
        ),
        (
            scheduler("WarmupDecayLR", warmup_max_lr="auto", warmup_num_steps="auto", total_num_steps="auto"),
            "linear 0.001 100 1000 to 0",
        ),
        ({"scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}}}, "cosine 0.001 100 1000 to 0.1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scheduler_becomes_the_run_keys_that_say_the_same(
    planned: Planned, content: dict[str, Any], curve: str
) -> None:
    made = planned(content)
    assert made.refused_by == []
    assert "scheduler" not in made.deepspeed
    kept = made.schedule
    said = f"{kept.kind} {kept.peak:g} {kept.warmup} {kept.steps}"
    assert said + ("" if kept.kind == "constant" else f" to {kept.min_ratio:g}") == curve
    assert any("mine.json's Warmup" in warning for warning in made.warnings) == (content["scheduler"]["type"] != "auto")


def test_the_curve_is_deepspeeds_two_steps_earlier(planned: Planned) -> None:
    """DeepSpeed gives its first two updates the rate of step 0 (docs/deepspeed.md, 6)."""
    import torch
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = WarmupDecayLR(optimizer, total_num_steps=40, warmup_max_lr=1e-3, warmup_num_steps=10, warmup_type="linear")
    rates = []
    for _ in range(42):
        rates.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    content = scheduler(
        "WarmupDecayLR", total_num_steps=40, warmup_max_lr=1e-3, warmup_num_steps=10, warmup_type="linear"
    )
    ours = [planned(content).schedule.learning_rate(step) for step in range(1, 41)]
    assert ours == pytest.approx(rates[2:], abs=1e-12)


@pytest.mark.parametrize(
    ("content", "arguments", "what", "fix"),
    [
        (scheduler("OneCycle", cycle_min_lr=1e-5, cycle_max_lr=1e-3), [], "scheduler.type OneCycle", "schedule.kind"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, [], "the scheduler has no type", "schedule.warmup"),
        (scheduler("WarmupLR", warmup_num_steps=50), [], "WarmupLR warms up along a logarithm", '"linear"'),
        (
            scheduler("WarmupLR", warmup_num_steps=50, warmup_type="linear", warmup_min_lr=1e-5),
            [],
            "warmup_min_lr is 1e-05; Halfstep's warm-up begins at 0",
            "write 0",
        ),
        (
            scheduler("WarmupLR", 1e-4, warmup_max_lr=1e-3, warmup_type="linear"),
            [],
            "the schedule peaks at warmup_max_lr 0.001, and optimizer.params.lr is 0.0001",
            "write the same in both",
        ),
        (
            scheduler("WarmupDecayLR", 1e-4, total_num_steps=50, warmup_type="linear"),
            [],
            "the schedule peaks at warmup_max_lr 0.001, which DeepSpeed takes where it is left out, and "
            "optimizer.params.lr is 0.0001",
            "write the same in both",
        ),
        (
            scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_type="linear"),
            ["optimizer.lr=1e-4"],
            "the schedule peaks at warmup_max_lr 0.001, and optimizer.lr from the command line is 0.0001",
            "write the same in both",
        ),
        (
            scheduler("WarmupDecayLR", total_num_steps=50, warmup_num_steps=5, warmup_type="linear"),
            ["steps=60"],
            "mine.json: scheduler.params.total_num_steps is 50, and the run key steps is 60",
            "drop steps",
        ),
        (
            scheduler("WarmupDecayLR", total_num_steps=50, warmup_num_steps=5, warmup_type="linear"),
            ["tokens=1e6"],
            "mine.json: scheduler.params.total_num_steps is 50, and the run key tokens is 1000000",
            "drop tokens",
        ),
        (
            scheduler("WarmupLR", warmup_num_steps=5, warmup_type="linear"),
            ["schedule.kind=cosine"],
            "mine.json: scheduler.type is constant, and the run key schedule.kind is cosine",
            "drop schedule.kind",
        ),
        (
            scheduler("WarmupLR", warmup_num_steps=5, warmup_type="linear", last_batch_iteration=7),
            [],
            "last_batch_iteration begins in the middle",
            "remove it",
        ),
    ],
    ids=lambda value: None,
)
def test_a_scheduler_that_is_another_curve_names_the_run_keys(
    planned: Planned, content: dict[str, Any], arguments: list[str], what: str, fix: str
) -> None:
    error = refusal(planned, content, *arguments)
    assert error.what.startswith(what)
    assert fix in error.fix
    assert "mine.json" in error.where


def test_run_keys_that_a_scheduler_leaves_open_are_the_users(planned: Planned) -> None:
    content = scheduler("WarmupDecayLR", warmup_type="linear", warmup_num_steps=5)
    made = planned(content, "steps=77", "schedule.warmup=5")
    assert (made.steps, made.schedule.warmup, made.schedule.kind) == (77, 5, "linear")
    assert planned(scheduler("WarmupCosineLR", warmup_type="linear"), "schedule.warmup=3").schedule.warmup == 3


# --- "auto" --------------------------------------------------------------------------------------------------------


def test_auto_leaves_a_key_to_halfstep(planned: Planned) -> None:
    made = planned(
        {
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_gather_16bit_weights_on_model_save": "auto",
                "overlap_comm": "auto",
            },
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        }
    )
    config = flatten(made.deepspeed)
    assert "auto" not in config.values()
    assert made.refused_by == []
    assert config["zero_optimization.reduce_bucket_size"] == made.model.parameters
    assert config["zero_optimization.stage3_param_persistence_threshold"] == 10 * 128
    assert made.origins["zero_optimization.reduce_bucket_size"] == "scaled to the model, for mine.json's auto"
    assert made.origins["zero_optimization.overlap_comm"] == "ds_configs/zero/3.json, for mine.json's auto"
    assert config["gradient_clipping"] == 1.0
    assert config["optimizer.params.betas"] == [0.9, 0.95]


def test_auto_for_what_halfstep_does_not_decide_is_refused(planned: Planned) -> None:
    error = refusal(planned, {"aio": {"block_size": "auto"}, "steps_per_print": "auto"})
    assert [problem.what.partition(":")[0] for problem in (error, *error.more)] == ["aio.block_size", "steps_per_print"]
    assert error.fix == "write the value you want, or remove aio.block_size"


def test_auto_beside_what_does_not_exist_at_this_stage_says_nothing(planned: Planned) -> None:
    made = planned({"zero_optimization": {"stage": 1, "stage3_prefetch_bucket_size": "auto"}})
    assert made.deepspeed["zero_optimization"] == {"stage": 1}


# --- what earlier runs rely on -------------------------------------------------------------------------------------


def test_a_file_in_plain_json_keeps_the_digest_that_earlier_runs_have(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}, "gradient_clipping": 1.0}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    read = dsfile.read(file)
    assert json.dumps(read) == json.dumps(content)


def test_the_identity_of_a_run_is_of_its_own_words_and_the_files_digest(planned: Planned) -> None:
    content = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}, "zero_optimization": {"stage": 1}}
    made = planned(content)
    assert made.identity["optimizer.lr"] is None
    assert made.identity["ds_config"] is not None
    assert made.schedule.peak == 0.5


def test_reading_a_file_changes_nothing_in_it(planned: Planned, tmp_path: Path) -> None:
    content = {"fp16": {}, "bf16": {}, "optimizer": {}, "zero_optimization": {}}
    assert planned(content).identity["ds_config"] == planned(content, "precision=fp16").identity["ds_config"]


def test_the_search_tries_only_what_the_file_leaves_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    arguments = ["plan", "--search", "--json", "model=gpt2-1.5b", "hardware=H100", "nodes=1,2", "gpus=8"]
    assert main.main([*arguments, "--ds-config", str(file)]) == 0
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    assert {candidate["zero"] for candidate in candidates} == {2}
    assert {candidate["offload"] for candidate in candidates} == {"none", "optimizer-cpu"}
    assert {candidate["micro"] * candidate["accumulation"] * candidate["ranks"] for candidate in candidates} == {64}
    file.write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}')
    assert main.main([*arguments, "--ds-config", str(file)]) == 0
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    assert {(candidate["micro"], candidate["accumulation"]) for candidate in candidates} == {(4, 1)}


@given(st.sampled_from([text for text, _ in REAL.values()]), st.randoms(use_true_random=False))
def test_a_changed_file_is_read_as_deepspeed_reads_it_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, text: str, random: Any
) -> None:
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    place = random.randrange(len(text) + 1)
    odd = [
        '"',
        "'",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "//",
        "#",
        "/*",
        "*/",
        "\n",
        "\\",
        "1e999",
        "NaN",
        "true",
        "0",
        "\ufeff",
    ]
    more, end = random.choice([*odd, text[place : place + 40]]), place + random.choice([0, 0, 1, 5])
    file = tmp_path_factory.mktemp("any") / "mine.json"
    file.write_text(text[:place] + more + text[end:], encoding="utf-8")
    try:
        read = dsfile.read(file)
    except RequestError:
        return
    with file.open(encoding="utf-8") as there:
        assert read == hjson.load(there, object_pairs_hook=dict_raise_error_on_duplicate_keys)
