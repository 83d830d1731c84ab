"""Models from elsewhere and runs that go wrong, on one real rank each."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from process.conftest import WORDS, Outcome

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]


def train(start: Start, name: str, *words: str) -> Outcome:
    return start(name, [sys.executable, "launcher/train.py", *WORDS, *words, "out={out}"])


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


def test_dropout_is_decided_by_the_seed(start: Start, data: Path) -> None:
    words = ["model.dropout=0.2", f"data={data}", "precision=fp32", "steps=3", "eval.every=0"]
    one, same = (train(start, name, *words) for name in ("dropout", "dropout again"))
    assert one.losses == same.losses
    without = train(start, "no dropout", f"data={data}", "precision=fp32", "steps=3", "eval.every=0")
    assert one.losses != without.losses


def test_a_run_that_diverges_ends_with_code_76_and_says_so(start: Start, data: Path) -> None:
    words = [
        f"data={data}",
        "precision=fp32",
        "zero=0",
        "steps=3",
        "optimizer.lr=1e30",
        "optimizer.clip=0",
        "eval.every=0",
    ]
    outcome = train(start, "diverged", *words, "schedule.warmup=0")
    assert outcome.returncode == 76, outcome.output
    assert "error: the loss is not finite" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.json("summary.json")["status"] == "diverged"
    assert outcome.steps[-1]["loss"] is None
    assert json.loads((outcome.out / "attempts/0001/exit.json").read_text())["code"] == 76


def test_sgd_trains_at_a_sharded_stage(start: Start, data: Path) -> None:
    words = [
        f"data={data}",
        "precision=bf16",
        "zero=2",
        "optimizer.kind=sgd",
        "optimizer.lr=0.1",
        "steps=5",
        "eval.every=0",
    ]
    outcome = train(start, "sgd", *words)
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses[-1] < outcome.losses[0]


def test_a_token_beyond_the_vocabulary_is_refused_with_its_place(start: Start, data: Path) -> None:
    outcome = train(start, "beyond", f"data={data / 'train'}", "model.vocabulary=300", "zero=1")
    assert outcome.returncode == 2, outcome.output
    assert "is outside the vocabulary of 300" in outcome.output
    assert "Traceback" not in outcome.output
