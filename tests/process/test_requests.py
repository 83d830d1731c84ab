"""What a request asks for, on two real ranks: odd models, DeepSpeed files as people write them, missing packages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process.conftest import BIN, Outcome

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]

ODD = ["model.width=15", "model.heads=3", "model.layers=1", "model.vocabulary=4098"]
"""A model whose number of parameters is odd: the bucket of stages 1 and 2 has to be rounded up."""
SHORT = ["model=gpt2-nano", "sequence=32", "eval.every=0", "eval.sequences=2", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def odd(start: Start, data: Path) -> Callable[[int, str], Outcome]:
    def train(zero: int, precision: str) -> Outcome:
        arguments = [
            *SHORT,
            *ODD,
            "steps=6",
            "batch.global=8",
            "batch.micro=2",
            f"zero={zero}",
            f"precision={precision}",
        ]
        command = [str(BIN / "halfstep"), "run", *arguments, f"data={data}", "out={out}"]
        return start(f"odd-z{zero}-{precision}", command)

    return train


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_with_an_odd_number_of_parameters_trains_alike_at_stages_1_and_2(
    odd: Callable[[int, str], Outcome], precision: str
) -> None:
    runs = [odd(zero, precision) for zero in (1, 2)]
    for run in runs:
        assert run.returncode == 0, run.output
        plan = run.json("plan.json")
        assert plan["model"]["parameters"] % 2 == 1
        assert plan["batch"]["accumulation"] == 2
        assert run.losses == pytest.approx(runs[0].losses, rel=2e-4)


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "a Trainer's stage 2 with auto": (
        """{
          "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
          "bf16": {"enabled": "auto"},
          "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
          "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                       "warmup_num_steps": "auto"}},
          "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": true},
            "allgather_partitions": true, "allgather_bucket_size": 2e8, "overlap_comm": true, "reduce_scatter": true,
            "reduce_bucket_size": 2e8, "contiguous_gradients": true},
          "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
          "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false
        }""",
        {"zero": 2, "precision": "bf16", "batch": (32, 8, 2)},
    ),
    "a Trainer's stage 3 with auto": (
        """{
          "bf16": {"enabled": true},
          "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": null,
            "overlap_comm": true, "contiguous_gradients": true, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": true},
          "gradient_accumulation_steps": "auto", "gradient_clipping": 1.0, "train_batch_size": "auto",
          "train_micro_batch_size_per_gpu": "auto"
        }""",
        {"zero": 3, "precision": "bf16", "batch": (32, 8, 2)},
    ),
    "a launch script's, with comments": (
        """{
          // sizes
          "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10,
          "zero_optimization": {"stage": 1,}, "gradient_clipping": 0.5, "prescale_gradients": true,
          "fp16": {"enabled": true, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1,
                   "initial_scale_power": 11},  # half precision
          "wall_clock_breakdown" : false,
        }""",
        {"zero": 1, "precision": "fp16", "batch": (16, 4, 2)},
    ),
    "fine-tuning with a schedule": (
        """{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "bf16": {"enabled": true},
          "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
          "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5, "warmup_min_lr": 0,
            "warmup_max_lr": 2e-4, "warmup_num_steps": 2, "warmup_type": "linear"}},
          "zero_optimization": {"stage": 0}}""",
        {"zero": 0, "precision": "bf16", "batch": (12, 2, 3)},
    ),
    "a fixed scale": (
        """{"train_batch_size": 8, "fp16": {"enabled": true, "loss_scale": 128, "loss_scale_window": 500},
          "zero_optimization": {"stage": 2, "allgather_bucket_size": 50000000, "reduce_bucket_size": 50000000}}""",
        {"zero": 2, "precision": "fp16", "batch": (8, 4, 1)},
    ),
}


RARE = ("a Trainer's stage 3 with auto", "a launch script's, with comments", "a fixed scale")
"""Files of which `make test-all` alone trains: what they say is resolved in tests/unit/test_deepspeed_files.py."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in RARE else name for name in FILES]
)
def test_a_deepspeed_file_trains_as_it_says(start: Start, data: Path, tmp_path: Path, name: str) -> None:
    text, expected = FILES[name]
    file = tmp_path / "mine.json"
    file.write_text(text)
    length = [] if "total_num_steps" in text else ["steps=5"]
    command = [str(BIN / "halfstep"), "run", *SHORT, *length, f"--ds-config={file}", f"data={data}", "out={out}"]
    outcome = start(f"file-{list(FILES).index(name)}", command)
    assert outcome.returncode == 0, outcome.output
    plan = outcome.json("plan.json")
    solved = plan["batch"]
    assert {
        "zero": plan["zero"],
        "precision": plan["precision"],
        "batch": (solved["global"], solved["micro"], solved["accumulation"]),
    } == expected
    assert [row["step"] for row in outcome.steps] == [1, 2, 3, 4, 5]
    assert outcome.losses[-1] < outcome.losses[0]
    if "total_num_steps" in text:
        assert [row["lr"] for row in outcome.steps] == pytest.approx([1e-4, 2e-4, 4e-4 / 3, 2e-4 / 3, 0.0])
    if "128" in text:
        assert {row["loss_scale"] for row in outcome.steps} == {128.0}
        again = start(f"file-{list(FILES).index(name)}", command)
        assert again.returncode == 0
        assert "is finished" in again.output, "the same arguments are the same run"


def test_a_rank_without_a_package_that_a_key_needs_says_so_before_anything_is_built(
    start: Start, data: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / "site"
    hidden.mkdir()
    # Python reads this file at its start: the package is hidden on the ranks, wherever it is installed.
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'wandb' else real(name, *more)\n"
    )
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *SHORT, "steps=2", f"data={data}"]
    outcome = start("no-package", [*command, "out={out}", "ds.wandb.enabled=true"], PYTHONPATH=str(hidden))
    assert outcome.returncode == 2, outcome.output
    assert outcome.output.count("wandb.enabled needs the package wandb, which is not installed here") == 1
    assert "pip install wandb, or remove wandb" in outcome.output
    assert "Traceback" not in outcome.output
    assert not outcome.out.exists()
