"""The DeepSpeed key table is what the installed DeepSpeed reads, and nothing wrong gets past it."""

import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfstep.launcher.plan.ds import dskeys

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "launcher" / "plan" / "ds" / "deepspeed_keys.json"
RAW = json.loads(TABLE.read_text(encoding="utf-8"))
PARAMS = {f"optimizer.params.{name}": entry for name, entry in RAW["optimizers"]["adamw"].items()}
EVERY_KEY = dict(dskeys.KEYS) | PARAMS


def nested(path: str, value: Any) -> dict[str, Any]:
    """Return a configuration that holds one key; optimizer parameters are those of AdamW."""
    config: dict[str, Any] = {"optimizer": {"type": "AdamW"}} if path.startswith("optimizer.params.") else {}
    *parents, name = path.split(".")
    block = config
    for parent in parents:
        block = block.setdefault(parent, {})
    block[name] = value
    return config


def paths(config: dict[str, Any]) -> list[str]:
    return [problem.path for problem in dskeys.problems(config)]


GOOD = {"bool": True, "int": 1, "float": 0.5, "str": "x", "list": [], "open": {}, "section": {}, "any": 1}
WRONG = {
    "bool": ["true", 1, 0, None, [True]],
    "int": ["2", True, 2.5, [2]],
    "float": ["0.5", True, float("nan"), float("inf"), {}],
    "str": [3, False, ["x"]],
    "list": ["a", 3, {}],
    "open": [3, "a", []],
    "section": [True, "a", 3, []],
    "enum": [True, "no such value", 17, []],
    "int|str": [True, 2.5, []],
    "str|int": [True, 2.5, []],
    "float|str": [True, []],
}


def good(entry: dict[str, Any]) -> Any:
    """Return a value that the entry allows."""
    if entry["type"] == "enum":
        return next(value for value in (*entry.get("values", ()), *entry.get("any_case", ())) if value != "auto")
    return GOOD[entry["type"].partition("|")[0]]


def is_deprecated(path: str) -> bool:
    return bool(dskeys.KEYS.get(path, {}).get("deprecated"))


# --- the table is true ---------------------------------------------------------------------------------------------


def test_the_table_is_what_the_generator_prints_for_the_installed_deepspeed_and_stdout_holds_nothing_else():
    # Left to find the accelerator itself, DeepSpeed announces it on stdout.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "tools.dskeys_table"]
    printed = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    ).stdout
    assert printed == TABLE.read_text(encoding="utf-8"), (
        "the installed DeepSpeed (or torch) reads other keys than launcher/plan/deepspeed_keys.json says; "
        "read the difference, then accept it with: python -m tools.dskeys_table --write"
    )


def test_the_table_is_compact_sorted_and_led_by_the_deepspeed_version():
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith('{"deepspeed": "0.19.8",\n')
    assert dskeys.DEEPSPEED_VERSION == "0.19.8"
    assert len(text) < 60_000
    for block in ("keys", "optimizers", "removed", "schedulers"):
        assert list(RAW[block]) == sorted(RAW[block])


CONFIG_READERS = (
    "runtime.config",
    "runtime.precision_config",
    "runtime.zero.config",
    "runtime.tensor_parallel.config",
    "runtime.activation_checkpointing.config",
    "runtime.model_checkpointing.config",
    "runtime.swap_tensor.aio_config",
    "runtime.data_pipeline.config",
    "autotuning.config",
    "comm.config",
    "compile.config",
    "datastates.config",
    "module_inject.auto_ep_config",
    "monitor.config",
    "profiling.config",
    "utils.config",
)


def keys_read_by(module: Any) -> set[str]:
    """Return the keys that a module's source asks any configuration dictionary for, found without running it."""
    values: set[str] = set()

    def note(node: ast.expr) -> None:
        with contextlib.suppress(ValueError, NameError, AttributeError, TypeError):
            value = node.value if isinstance(node, ast.Constant) else getattr(module, getattr(node, "id", ""))
            values.update([value] if isinstance(value, str) else [])

    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            note(node.args[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("_param") and len(node.args) > 1:
            note(node.args[1])
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            dictionary = ast.unparse(node.comparators[0])
            if "dict" in dictionary or "config" in dictionary:
                note(node.left)
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("config", "param_dict", "ds_config"):
            note(node.slice)
    return values


# Read by those modules, but no keys of the table.
NOT_KEYS = {
    "_tp_plan",  # runtime/tensor_parallel/config.py: an attribute of a transformers model
    "allgather_size",  # runtime/zero/config.py: only where zero_optimization is a bool, which is refused
    "curriculum_metrics",  # inside the free table data_efficiency.data_sampling.curriculum_learning
    "layer_token_lr_schedule",  # inside the free table data_efficiency.data_routing.random_ltd
    "max_grad_norm",  # refused
}


@pytest.mark.parametrize("name", CONFIG_READERS)
def test_every_key_that_deepspeeds_source_asks_for_is_in_the_table(name: str):
    module = importlib.import_module(f"deepspeed.{name}")
    known = {part for path in (*dskeys.KEYS, *RAW["removed"]) for part in path.split(".")} | NOT_KEYS
    assert keys_read_by(module) - known == set()


def test_the_source_scan_sees_each_way_of_asking_for_a_key(tmp_path: Path):
    source = (
        "A = 'by_name'\nget_scalar_param(d, A, 1)\nparam_dict.get('by_get')\n'by_in' in param_dict.keys()\n"
        "param_dict['by_item']\nconfig['by_config']\n"
    )
    (tmp_path / "reader_of_keys.py").write_text(source)
    module = type("Reader", (), {"A": "by_name", "__file__": str(tmp_path / "reader_of_keys.py")})
    assert keys_read_by(module) == {"by_name", "by_get", "by_in", "by_item", "by_config"}


def default_filled(section: str) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for path, entry in dskeys.KEYS.items():
        if not path.startswith(f"{section}.") or "same_as" in entry or entry.get("deprecated"):
            continue
        name = path[len(section) + 1 :]
        if entry["default"] is None or entry["type"] in ("section", "object") or "." in name:
            continue
        filled[name] = entry["default"]
    return filled


def test_deepspeed_accepts_every_section_filled_with_its_defaults():
    from deepspeed.runtime.config import DeepSpeedConfig

    sections = [path for path, entry in dskeys.KEYS.items() if entry["type"] == "section"]
    assert len(sections) > 30
    for section in sections:
        filled = default_filled(dskeys.KEYS[section].get("same_as", section))
        DeepSpeedConfig(nested(section, filled) | {"train_batch_size": 1})


def test_the_defaults_are_deepspeeds_own():
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig({"train_batch_size": 1})
    zero, fp16 = config.zero_config.model_dump(), config.float16_config.model_dump()
    for name in ("reduce_bucket_size", "contiguous_gradients", "sub_group_size", "round_robin_gradients"):
        assert dskeys.KEYS[f"zero_optimization.{name}"]["default"] == zero[name]
    assert dskeys.KEYS["zero_optimization.stage3_max_live_parameters"]["default"] == zero["max_live_parameters"]
    for name, value in fp16.items():
        assert dskeys.KEYS[f"fp16.{name}"]["default"] == value
    assert dskeys.KEYS["gradient_clipping"]["default"] == config.gradient_clipping == 1.0


# --- nothing wrong gets past it --------------------------------------------------------------------------------------


def test_a_good_value_passes_at_every_key():
    refused = {
        path: problem
        for path, entry in EVERY_KEY.items()
        if entry["type"] != "object"
        and (problem := [problem for problem in paths(nested(path, good(entry))) if not is_deprecated(problem)])
    }
    assert refused == {}


def test_a_typo_is_reported_with_its_full_path_at_every_key():
    silent = []
    for path in EVERY_KEY:
        parent, _, name = path.rpartition(".")
        middle = len(name) // 2
        for typo in (name[:middle] + name[middle + 1 :], f"{name}x", f"x{name[1:]}"):
            wrong = f"{parent}.{typo}" if parent else typo
            assert wrong not in EVERY_KEY
            if [problem for problem in paths(nested(wrong, True)) if not is_deprecated(problem)] != [wrong]:
                silent.append(wrong)
    assert silent == []


def test_a_wrong_type_is_reported_with_its_full_path_at_every_key():
    silent = [
        (path, wrong)
        for path, entry in EVERY_KEY.items()
        for wrong in WRONG.get(entry["type"], ())
        if (wrong is not None or entry["default"] is not None) and path not in paths(nested(path, wrong))
    ]
    assert silent == []
    untyped = {path for path, entry in EVERY_KEY.items() if entry["type"] not in WRONG}
    assert untyped == {"tensor_parallel.dtype", "tensor_parallel.tp.mpu", "tensor_parallel.tp.tp_group"}


def test_auto_is_reported_with_its_full_path_at_every_key():
    assert [path for path in EVERY_KEY if path not in paths(nested(path, "auto"))] == []


def test_a_typo_names_the_right_key_nearly_everywhere():
    missed = []
    for path in EVERY_KEY:
        wrong = path[:-1] + ("" if len(path) - path.rfind(".") > 3 else path[-1] * 2)
        (problem,) = [problem for problem in dskeys.problems(nested(wrong, True)) if not is_deprecated(problem.path)]
        if path not in problem.suggestion:
            missed.append(path)
    assert len(missed) / len(EVERY_KEY) < 0.02, missed


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("overlap_comm", "did you mean zero_optimization.overlap_comm?"),
        ("stage", "did you mean zero_optimization.stage?"),
        ("lr", "did you mean optimizer.params.lr?"),
        ("zero_optimization.gradient_clipping", "did you mean gradient_clipping?"),
        ("gradient_cliping", "did you mean gradient_clipping?"),
        ("zero_optimization.offload_optimizer.devise", "did you mean zero_optimization.offload_optimizer.device?"),
        ("xyzzy", "remove xyzzy"),
    ],
)
def test_a_key_in_the_wrong_place_or_misspelt_names_the_right_one(path: str, suggestion: str):
    (problem,) = dskeys.problems(nested(path, 1))
    assert (problem.path, problem.sentence) == (path, "DeepSpeed 0.19.8 has no such key")
    assert problem.suggestion == suggestion


@pytest.mark.parametrize(
    ("path", "value", "sentence", "suggestion"),
    [
        ("fp16.enabled", "true", 'it takes true or false, not the text "true"', "write true without quotes"),
        ("fp16.hysteresis", "2", 'it takes a whole number, not the text "2"', "write 2 without quotes"),
        ("fp16.enabled", 1, "it takes true or false, not 1", "write true"),
        ("train_batch_size", 8.0, "it takes a whole number, not 8.0", "write 8"),
        ("train_batch_size", 0, "0 is out of its range", "use a number that is at least 1"),
        ("zero_optimization.reduce_bucket_size", 0, "0 is out of its range", "use a number that is more than 0"),
        ("zero_optimization.zenflow.topk_ratio", 1.0, "1.0 is out of its range", "use a number that is less than 1.0"),
        ("zero_optimization.stage", 4, "4 is none of its values", "use 0, 1, 2 or 3"),
        ("zero_optimization.stage", "2", 'the text "2" is none of its values', "use 0, 1, 2 or 3"),
        ("communication_data_type", "fp8", 'the text "fp8" is none of its values', "use fp16, bf16 or fp32"),
        ("optimizer.type", "sgd", 'the text "sgd" is none of its values', "use SGD"),
        ("compile.passes", ["z1", "z2"], 'the text "z2" is none of its values', "use z1, z3, autosp or autotp"),
        ("fp16", None, "it takes a section with keys of its own, not null", "give fp16 a section with keys of its own"),
    ],
)
def test_a_wrong_value_says_what_to_write(path: str, value: Any, sentence: str, suggestion: str):
    (problem,) = dskeys.problems(nested(path, value))
    assert (problem.path, problem.sentence, problem.suggestion) == (path, sentence, suggestion)


def test_a_deprecated_key_names_its_successor_and_a_removed_one_says_so():
    cpu, old, amp = dskeys.problems({"zero_optimization": {"cpu_offload": True}, "bfloat16": {}, "amp": {}})
    assert cpu.suggestion == "use zero_optimization.offload_optimizer instead"
    assert old.suggestion == "use bf16 instead"
    assert amp.sentence.startswith("DeepSpeed 0.19.8 refuses it: NVIDIA Apex AMP integration has been removed.")


def test_two_spellings_of_one_setting_are_reported_and_one_is_not():
    both = {"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}}
    assert paths(both) == ["zero_optimization.prefetch_bucket_size"]
    assert paths({"zero_optimization": {"prefetch_bucket_size": 1}}) == []


def test_auto_is_found_inside_lists_and_free_tables():
    config = {
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, "auto"]}},
        "datastates_ckpt": {"a": [{"b": "auto"}]},
    }
    assert paths(config) == ["optimizer.params.betas[1]", "datastates_ckpt.a[0].b"]


def test_parameters_are_checked_against_the_chosen_optimizer():
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "betas": [0.9, 0.95], "momentum": 0.9}}}
    assert paths(config) == ["optimizer.params.betas"]
    config["optimizer"]["type"] = "ADAMW"
    assert paths(config) == ["optimizer.params.momentum"]


def test_the_origin_of_the_key_or_of_its_section_is_told():
    config = {"zero_optimization": {"stage": 9}, "fp16": {"enbled": True}, "x": 1, "bf16": 3}
    origin = {"zero_optimization.stage": "zero/2.json", "fp16": "run.toml", "bf16.enabled": "precision/bf16.json"}
    assert [problem.where for problem in dskeys.problems(config, origin)] == [
        "zero/2.json",
        "run.toml",
        "the DeepSpeed configuration",
        "precision/bf16.json",
    ]
    assert {problem.where for problem in dskeys.problems(config, "file: {}".format)} == {
        "file: zero_optimization.stage",
        "file: fp16.enbled",
        "file: x",
        "file: bf16",
    }


# --- nothing right is refused ----------------------------------------------------------------------------------------

ZERO3_NVME = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 1,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 10}},
    "aio": {"block_size": 262144, "queue_depth": 32, "intra_op_parallelism": 1, "single_submit": False},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme", "pin_memory": True, "buffer_count": 4},
        "offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 5, "buffer_size": 1e8},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
ZERO2_FP16 = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1,
    "communication_data_type": "FP32",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 500, "hysteresis": 2},
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True, "adam_w_mode": False}},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 200000000,
        "overlap_comm": False,
        "reduce_scatter": True,
        "round_robin_gradients": False,
    },
    "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}, "writer": None},
}
MONITORS = {
    "train_micro_batch_size_per_gpu": 1,
    "tensorboard": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_bert"},
    "wandb": {"enabled": False, "group": "my_group", "team": "my_team", "project": "my_project"},
    "csv_monitor": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_bert"},
    "comet": {"enabled": False, "workspace": None, "samples_log_interval": 50},
    "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1, "output_file": None},
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": False, "prof_ops": ["all_reduce"]},
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": True},
    "log_level": "Warning",
}
BF16_ACCUMULATED_IN_FP32 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "bf16": {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True},
    "fp16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["norm"]},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "optimizer": {"type": "SGD", "params": {"lr": 1, "momentum": 0.9}},
    "zero_optimization": {"stage": 1, "offload_param": None, "leaf_module": {"classes": [], "names": ["moe"]}},
    "data_efficiency": {"enabled": True, "data_sampling": {"curriculum_learning": {"enabled": False, "any": {"a": 1}}}},
    "compile": {"deepcompile": False, "passes": ["z1"]},
}


@pytest.mark.parametrize("config", [ZERO3_NVME, ZERO2_FP16, MONITORS, BF16_ACCUMULATED_IN_FP32])
def test_realistic_configurations_give_no_problem(config: dict[str, Any]):
    assert dskeys.problems(config) == []
