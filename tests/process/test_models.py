"""Models from elsewhere and runs that go wrong, on one real rank each."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from process.conftest import BIN, WORDS, Outcome

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]


def train(start: Start, name: str, *arguments: str) -> Outcome:
    return start(name, [sys.executable, "launcher/train.py", *WORDS, *arguments, "out={out}"])


def test_trained_weights_of_another_family_are_loaded_at_stage_3(start: Start, data: Path, scratch: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(scratch / "neox")
    outcomes = [
        train(
            start,
            f"neox{zero}",
            f"model=hf:{scratch / 'neox'}",
            f"data={data}",
            f"zero={zero}",
            "precision=fp32",
            "steps=3",
        )
        for zero in (1, 3)
    ]
    for outcome in outcomes:
        assert outcome.returncode == 0, outcome.output
        plan = outcome.json("plan.json")["model"]
        assert plan["weights"] == str(scratch / "neox")
        assert plan["parameters"] == model.num_parameters()
    assert outcomes[0].losses == pytest.approx(outcomes[1].losses, abs=1e-5)


BERT = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize("keys", [["zero=0", "precision=bf16"], ["zero=3", "precision=fp16"], ["compile=true"]])
def test_a_model_that_sees_the_future_is_refused_before_a_step(
    start: Start, data: Path, scratch: Path, keys: list[str]
) -> None:
    home = scratch / "bert"
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps({"model_type": "bert", **BERT}))
    outcome = train(start, f"sees {keys[0]}", f"model=hf:{home}", f"data={data}", *keys)
    assert outcome.returncode == 3, outcome.output
    assert (
        "error: the model sees the future: changing the last 16 of 29 tokens moves what it makes of earlier ones"
        in (outcome.output)
    )
    assert f" from: model=hf:{home}, model_type 'bert'" in outcome.output
    assert "  try: set is_decoder to true in its config.json" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.rows == []
    assert json.loads((outcome.out / "attempts/0001/exit.json").read_text())["code"] == 3


def test_the_way_out_trains_and_what_was_measured_is_written_down(start: Start, data: Path, scratch: Path) -> None:
    home = scratch / "bert-decoder"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"model_type": "bert", **BERT, "is_decoder": True}))
    keys = [f"model=hf:{home}", f"data={data}", "zero=1", "precision=bf16", "steps=2"]
    outcome = train(start, "decoder", *keys)
    assert outcome.returncode == 0, outcome.output
    (seen,) = (event for event in outcome.events if event["event"] == "causal")
    assert (seen["tokens"], seen["first_changed"], seen["earlier"], seen["rows"]) == (29, 13, 0.0, False)
    assert seen["later"] > 0.1


def test_dropout_is_decided_by_the_seed(start: Start, cell: Callable[[int, str], Outcome], data: Path) -> None:
    arguments = ["model.dropout=0.2", f"data={data}", "precision=fp32", "steps=3", "eval.every=0"]
    first, again = (train(start, name, *arguments) for name in ("dropout", "dropout again"))
    assert first.losses == again.losses
    assert abs(first.losses[0] - cell(1, "fp32").losses[0]) > 1e-3, "the again weights and batch without dropout"


def test_a_run_that_diverges_ends_with_code_76_and_says_so(start: Start, data: Path) -> None:
    arguments = [
        f"data={data}",
        "precision=fp32",
        "zero=0",
        "steps=9",
        "optimizer.lr=1e30",
        "optimizer.clip=0",
        "eval.every=0",
    ]
    outcome = train(start, "diverged", *arguments, "schedule.warmup=0")
    assert outcome.returncode == 76, outcome.output
    assert "error: the loss was not finite 3 steps in a row, up to step 4" in outcome.output, outcome.output
    assert " from: first in the output of transformer.h.0.ln_1 on rank 0 at step 2; last good step 1" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.json("summary.json")["status"] == "diverged"
    assert outcome.steps[-1]["loss"] is None
    assert json.loads((outcome.out / "attempts/0001/exit.json").read_text())["code"] == 76


def test_sgd_trains_at_a_sharded_stage(start: Start, data: Path) -> None:
    arguments = [
        f"data={data}",
        "precision=bf16",
        "zero=2",
        "optimizer.kind=sgd",
        "optimizer.lr=0.1",
        "steps=5",
        "eval.every=0",
    ]
    outcome = train(start, "sgd", *arguments)
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses[-1] < outcome.losses[0]


def test_a_token_beyond_the_vocabulary_is_refused_once_with_its_place(start: Start, data: Path) -> None:
    arguments = [*WORDS, f"data={data / 'train'}", "model.vocabulary=300", "zero=1", "out={out}"]
    outcome = start("beyond", [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments])
    assert outcome.returncode == 2, outcome.output
    assert outcome.output.count("is outside the vocabulary of 300") == 1
    assert "Traceback" not in outcome.output
    assert json.loads((outcome.out / "attempts/0001/exit.json").read_text())["code"] == 2


def test_fp16_at_its_smallest_scale_ends_with_code_76(start: Start, data: Path) -> None:
    arguments = [f"data={data}", "precision=fp16", "zero=2", "steps=20", "eval.every=0"]
    outcome = train(start, "smallest", *arguments, "fp16.initial_scale_power=28", "fp16.min_scale=134217728")
    assert outcome.returncode == 76, outcome.output
    assert "error: gradients overflow fp16 at the smallest loss scale" in outcome.output
    assert outcome.json("summary.json")["status"] == "diverged"
