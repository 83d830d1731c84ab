"""Adapters are trained alike at every stage and in every precision, resumed to the bit, and exported for other tools.

So is the moving average of what is trained. Run by torchrun, this file is the program of a rank: it trains every cell
and writes what it saw to rank-N.json.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process.conftest import BIN, Outcome
from ranks import reported_by_two

from halfstep.launcher.checkpoint import store
from halfstep.launcher.checkpoint.manifest import read
from halfstep.launcher.forecast import states
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.plan import Plan

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]
CELLS = [(zero, precision) for precision in ("fp32", "fp16", "bf16") for zero in range(4)]
RECOMPUTED = (3, "bf16", "activation_checkpointing=true")
FULL = [(zero, "bf16", "train=full") for zero in (0, 1, 3)]
AUTOCAST = [(0, "bf16-autocast"), (3, "bf16-autocast")]
EVERY: list[tuple[Any, ...]] = [*CELLS, RECOMPUTED, *FULL, *AUTOCAST]
"""All that is trained; autocast last, for DeepSpeed remembers it as long as the process lives."""
DECAY, SKIPPED = 0.75, 3
"""Of the average, and the step that is skipped in every cell."""
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
WORDS = ["sequence=32", "batch.global=4", "batch.micro=2", "steps=4", "eval.every=0", "eval.sequences=2"]
LORA = ["train=lora", "lora.rank=4", "lora.dropout=0.1", "ema.decay=0.5", "checkpoint.every=2"]


def rank_main(folder: Path) -> None:
    """Train every cell, and note what it did."""
    from process.synthetic import plan_of

    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store
    from halfstep.launcher.topology import from_environment

    rank = from_environment()
    keys = ("lora.rank=4", "optimizer.lr=1e-2", "schedule.warmup=0", "steps=6", f"ema.decay={DECAY}")
    plans = []
    for zero, precision, *more in EVERY:
        own = ["train=lora", *keys] if "train=full" not in more else keys[1:]
        plans.append(plan_of(*own, f"zero={zero}", f"precision={precision}", *more, ranks=2))
    distributed.join(rank, plans[0], file_store(folder / "store", rank))
    distributed.quiet_deepspeed(folder / f"log-{rank.rank}")
    (folder / f"rank-{rank.rank}.json").write_text(json.dumps([trained(plan, rank.rank) for plan in plans]))
    distributed.leave()


def trained(plan: Plan, rank: int) -> dict[str, Any]:
    """Train a plan, and compare its average with the recursion over the masters of its steps."""
    import torch

    from halfstep.launcher.checkpoint.shards import AVERAGE, MASTER
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.loop import train
    from halfstep.launcher.engine.numerics.guard import Guard
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.state import training_state
    from halfstep.launcher.engine.training import Training
    from halfstep.launcher.parity.trial import SyntheticFeed

    engine, repairs = build(plan)

    def held(state: str) -> torch.Tensor:
        pieces = training_state.fragments(engine)
        return torch.cat([training_state.tensors(engine, piece)[state].double() for piece in pieces])

    first = sum(distributed.gather_objects(training_state.checksum(engine))) % 2**64
    expected, records = [held(MASTER)], []

    def step(record: Any) -> None:
        records.append(record)
        expected.append(expected[-1] if record.overflow else DECAY * expected[-1] + (1 - DECAY) * held(MASTER))

    guard = Guard(engine, plan, repairs, lambda kind, **details: None, rank)
    train(Training(engine=engine, plan=plan, feed=SyntheticFeed(plan, rank, engine.device), guard=guard, on_step=step))
    average = held(AVERAGE)
    kept = [tensor for _, tensor in training_state.average_of(engine)._kept.values()]
    seen = {
        "first": first,
        "losses": [record.loss for record in records if not record.overflow],
        "skipped": [record.step for record in records if record.overflow],
        "off": float((average - expected[-1]).abs().max()),
        "moved": float((average - expected[0]).abs().max()),
        "behind": float((average - held(MASTER)).abs().max()),
        "bytes": sum(tensor.nbytes for tensor in kept),
        "planned": states.states(estimate.workload_of(plan), rank).average,
        "types": sorted({str(tensor.dtype) for tensor in kept}),
    }
    engine.destroy()
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lora")
    return reported_by_two(__file__, folder, scratch, HALFSTEP_FAULT=f"fwd:0:{SKIPPED}:nan")


def test_adapters_begin_with_the_same_bits_in_every_cell(ranks: list[list[dict[str, Any]]]) -> None:
    """Rounded to the precision, as every weight is."""
    by_precision: dict[str, set[int]] = {}
    for (_, precision), seen in zip(CELLS, ranks[0], strict=False):
        by_precision.setdefault(precision, set()).add(seen["first"])
    assert {precision: len(checksums) for precision, checksums in by_precision.items()} == {
        "fp32": 1,
        "fp16": 1,
        "bf16": 1,
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 1e-3), ("bf16", 1e-3)])
def test_every_stage_trains_the_same_adapters(
    ranks: list[list[dict[str, Any]]], precision: str, tolerance: float
) -> None:
    losses = [seen["losses"] for (_, kind), seen in zip(CELLS, ranks[0], strict=False) if kind == precision]
    assert [len(own) for own in losses] == [5] * 4
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=tolerance)
    assert losses[0][-1] < losses[0][0] - 0.01, "they learn"


def test_so_do_recomputed_blocks_and_autocast(ranks: list[list[dict[str, Any]]]) -> None:
    losses = {cell: seen["losses"] for cell, seen in zip(EVERY, ranks[0], strict=True)}
    assert losses[RECOMPUTED] == pytest.approx(losses[3, "bf16"], rel=1e-3)
    for cell in AUTOCAST:
        assert losses[cell] == pytest.approx(losses[0, "fp32"], rel=1e-2)


def test_the_average_is_the_recursion_over_the_masters_of_the_steps_that_were_taken(
    ranks: list[list[dict[str, Any]]],
) -> None:
    for measured in ranks:
        for cell, seen in zip(EVERY, measured, strict=True):
            assert seen["skipped"] == [SKIPPED], cell
            assert seen["off"] < 1e-6, cell
            assert seen["moved"] > 1e-3, cell
            assert seen["behind"] > 1e-3, cell
            assert (seen["bytes"], seen["types"]) == (seen["planned"], ["torch.float32"]), cell


@pytest.fixture(scope="module")
def train(start: Start, data: Path) -> Callable[..., Outcome]:
    def run(name: str, *keys: str, common: list[str] = LORA, ranks: int = 1, **more: str) -> Outcome:
        given = [*WORDS, *common, f"gpus_per_node={ranks}", f"data={data}", *keys]
        command = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "launcher/train.py", *given, "out={out}"]
        return start(f"lora-{name}", command, **more)

    return run


DRAWN = ("model=gpt2-nano", "model.layers=1", "model.width=32", "zero=3", "precision=fp32")
"""A model whose weights are drawn from the seed."""


@pytest.fixture(scope="module")
def tuned(train: Callable[..., Outcome]) -> Outcome:
    done = train("tuned", *DRAWN)
    assert done.returncode == 0, done.output
    return done


def test_a_run_resumes_to_the_bit_though_its_base_is_in_no_checkpoint(
    tuned: Outcome, train: Callable[..., Outcome]
) -> None:
    assert " trained of " in tuned.output
    again = tuned.out.with_name("lora-again")
    shutil.copytree(tuned.out, again)
    shutil.rmtree(store.home(again) / store.folder_name(4))
    (again / "summary.json").unlink()
    assert_same(train("again", *DRAWN), tuned)


@pytest.mark.full
def test_a_killed_run_ends_as_the_undisturbed_one(tuned: Outcome, train: Callable[..., Outcome]) -> None:
    killed = train("killed", *DRAWN, HALFSTEP_FAULT="step:0:4:kill9")
    assert killed.returncode != 0
    assert_same(train("killed", *DRAWN), tuned)


def assert_same(resumed: Outcome, whole: Outcome) -> None:
    assert resumed.returncode == 0, resumed.output
    assert any(event["event"] == "resumed" and event["logits_differ_by"] == 0 for event in resumed.events)
    assert resumed.losses == whole.losses
    assert [file.xxh3 for file in manifest(resumed).files] == [file.xxh3 for file in manifest(whole).files]


def test_a_checkpoint_holds_the_adapters_alone(tuned: Outcome) -> None:
    about = manifest(tuned)
    names = list(about.model["parameters"])
    assert len(names) == 4 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert about.model["buffers"] == {}
    states = 4 * 4 * tuned.json("plan.json")["lora"]["parameters"]  # masters, two moments and their average in fp32
    assert states < about.bytes < states + 80_000, "and logits, random states and names"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by transformers' old name
def test_the_adapter_is_loaded_by_peft_and_by_transformers_and_computes_the_same(
    tuned: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from halfstep.launcher.checkpoint.shards import Shards, probe_tokens
    from halfstep.models.network import build

    about = manifest(tuned)
    base, folder, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    build(about.model["config"], seed=0).save_pretrained(base)
    done = exported(capsys, tuned, "--adapter", "--to", folder)
    assert done["compare"]["ok"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(done["files"])
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert len(done["warnings"]) == 1, "the base lies nowhere"
    assert exported(capsys, tuned, "--to", merged)["compare"]["ok"]

    saved = torch.from_numpy(Shards(store.home(tuned.out) / store.folder_name(4), about).probe())
    tokens = torch.tensor([probe_tokens(about.sequence, about.model["vocabulary"])])
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        untrained = plain(tokens).logits[0]
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(tokens).logits[0]
        plain.load_adapter(str(folder))
        by_transformers = plain.eval()(tokens).logits[0]
        whole = AutoModelForCausalLM.from_pretrained(merged).eval()(tokens).logits[0]
    assert (saved - untrained).abs().max() > 1e-4, "they were trained"
    for logits in (by_peft, by_transformers, whole):
        assert (logits - saved).abs().max() <= 1e-4 * saved.abs().max()


def test_the_average_is_exported_merged_and_alone(
    tuned: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    from halfstep.launcher.checkpoint.shards import Shards
    from halfstep.models.network import build

    files = Shards(store.home(tuned.out) / store.folder_name(4), manifest(tuned))
    done = exported(capsys, tuned, "--ema", "--to", tmp_path / "merged")
    assert done["compare"] is None, "the engine has no logits of it"
    exported(capsys, tuned, "--ema", "--adapter", "--to", tmp_path / "adapter")
    alone, merged = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("adapter", "merged"))
    layer = "transformer.h.0.mlp.c_fc"
    a, b = (
        torch.from_numpy(files.read(name, "ema")).view(files.shape(name))
        for name in (f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight")
    )
    assert torch.equal(alone[f"base_model.model.{layer}.lora_A.weight"], a)
    assert not torch.equal(torch.from_numpy(files.read(f"{layer}.lora_B.default.weight", "master")).view(b.shape), b)
    frozen = build(manifest(tuned).model["config"], seed=0).get_parameter(f"{layer}.weight")
    assert torch.allclose(merged[f"{layer}.weight"], frozen + (b @ a).T * (32 / 4), atol=1e-7)


def exported(capsys: pytest.CaptureFixture[str], run: Outcome, *options: str | Path) -> dict[str, Any]:
    from halfstep.launcher.cli.main import main

    capsys.readouterr()  # what libraries print when they are imported
    assert main(["checkpoint", "export", str(run.out), *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def manifest(run: Outcome, step: int = 4) -> Any:
    return read(store.home(run.out) / store.folder_name(step))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from halfstep.models.network import build

    folder = tmp_path_factory.mktemp("base") / "llama"
    build(LLAMA, seed=3).save_pretrained(folder)
    return folder


@pytest.mark.full
def test_a_run_begins_with_what_another_made_of_its_base_and_its_adapters(
    train: Callable[..., Outcome], tuned: Outcome
) -> None:
    """The loss before the first step is that after the last of the run that it begins with."""
    ended = tuned.evaluations[-1]["eval_loss"]
    for name, keys in {"upon": ("zero=2", "lora.rank=2"), "further": ("zero=3", "train=full")}.items():
        lora = ["lora.rank", "lora.dropout"]
        given = [word for word in LORA if keys[1] != "train=full" or word.partition("=")[0] not in lora]
        done = train(name, f"model=run:{tuned.out}", "precision=fp32", *keys, common=given)
        assert done.returncode == 0, done.output
        assert done.evaluations[0]["eval_loss"] == pytest.approx(ended, rel=1e-6)
        assert done.json("plan.json")["model"]["weights"] == f"run:{tuned.out}@4"


@pytest.mark.full
def test_another_base_is_another_run_and_exports_nothing(
    train: Callable[..., Outcome], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfstep.launcher.cli.main import main
    from halfstep.models.network import build

    keys = (f"model=hf:{base}", "zero=2", "precision=bf16", "lora.targets=q_proj,down_proj")
    done, kept = train("based", *keys), tmp_path / "kept"
    assert done.returncode == 0, done.output
    assert exported(capsys, done, "--to", tmp_path / "first")["compare"]["ok"]
    shutil.copytree(base, kept)
    try:
        build(LLAMA, seed=4).save_pretrained(base)
        other = train("based", *keys, "steps=6")
        assert other.returncode == 2
        assert "belongs to a different run: weights was" in other.output
        assert main(["checkpoint", "export", str(done.out), "--to", str(tmp_path / "merged")]) == 3
        assert "the weights under the adapters are not those that they were trained on" in capsys.readouterr().err
    finally:
        shutil.rmtree(base)
        shutil.copytree(kept, base)


@pytest.mark.full
def test_adapters_and_their_average_go_on_at_another_stage_on_other_ranks_and_in_another_precision(
    train: Callable[..., Outcome], base: Path
) -> None:
    from halfstep.launcher.checkpoint.shards import Shards

    keys = [f"model=hf:{base}", "lora.dropout=0"]
    whole = train("through", *keys, "zero=1", "precision=fp32", "steps=8", "schedule.kind=constant")
    train("moved", *keys, "zero=3", "precision=fp32", "schedule.kind=constant")
    moved = train("moved", *keys, "zero=0", "precision=fp32", "steps=8", "schedule.kind=constant", ranks=2)
    assert moved.returncode == 0, moved.output
    assert manifest(moved, 8).world_size == 2
    assert moved.losses == pytest.approx(whole.losses, rel=1e-4)
    kept = [Shards(store.home(run.out) / store.folder_name(8), manifest(run, 8)) for run in (whole, moved)]
    for name in kept[0].parameters():
        assert kept[1].read(name, "ema") == pytest.approx(kept[0].read(name, "ema"), abs=1e-5)
    moved = train("moved", *keys, "zero=1", "precision=bf16-autocast", "steps=12", "schedule.kind=constant")
    assert moved.returncode == 0, moved.output


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    os._exit(0)  # taking Python down beside threads of gloo can abort
