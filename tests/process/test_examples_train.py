"""Examples trained on real ranks: packed as unpacked, two ranks as one, accumulated or not, and as each by itself.

Run as a program, this file is a rank: it trains each case through the loop, and rank 0 also on transformers alone,
where every example is a call of its own. It writes what it saw to rank-N.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.examples import drawn, write_examples
from ranks import printed_alone, reported_by_two
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.process
VALIDATION = [7, 30, 11, 4]
LENGTHS = [20, 7, 5, 17, 14, 16, 16, 31] * 4
"""32 examples, which are 16 sequences of 32."""
STEPS = 3
COMMON = ["model=llama-nano", "sequence=32", f"steps={STEPS}", "precision=fp32", "model.vocabulary=64", "zero=1",
          "model.layers=2", "model.width=32", "model.heads=4", "eval.sequences=4", "schedule.warmup=0"]  # fmt: skip
# The global batch is an epoch, so that all see the same examples in a step.
CASES = {
    "packed": ("batch.global=16", "batch.micro=8"),
    "packed, accumulated": ("batch.global=16", "batch.micro=2"),
    "unpacked": ("batch.global=32", "batch.micro=16", "packing=false"),
    "unpacked, accumulated": ("batch.global=32", "batch.micro=4", "packing=false"),
}

# Of eight examples one has targets: three steps of an epoch have none at all.
SPARSE = ("batch.global=2", "batch.micro=1", "packing=false", "steps=4")
SPARSE_CASES = {"fp32": SPARSE, "fp16": (*SPARSE, "precision=fp16", "zero=2", "fp16.initial_scale_power=8")}


def planned(folder: Path, ranks: int, *keys: str, corpus: str = "corpus") -> Any:
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve

    request = load([*COMMON, f"data={folder}/{corpus}", *keys])
    return resolve(request, topology.describe(ranks, ranks), facts.read(request.spec))


def trained(plan: Any, place: Any) -> dict[str, Any]:
    """Train through the loop; return each step's loss, norm and targets, and the losses of the evaluations."""
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.causal_check import refuse_crossing
    from halfstep.launcher.engine.feed import Feed
    from halfstep.launcher.engine.loop import train
    from halfstep.launcher.engine.numerics.guard import Guard
    from halfstep.launcher.engine.training import Training

    engine, repairs = build(plan)
    across = refuse_crossing(engine, plan)["across"]
    steps: list[list[Any]] = []
    evaluations: list[float | None] = []
    train(
        Training(
            engine=engine,
            plan=plan,
            feed=Feed(plan, place, engine.device),
            guard=Guard(engine, plan, repairs, lambda kind, **about: None, place.rank),
            on_step=lambda record: steps.append([record.loss, record.grad_norm, record.targets]),
            on_evaluation=lambda record: evaluations.append(record.eval_loss),
        )
    )
    engine.destroy()
    return {"steps": steps, "evaluations": evaluations, "across": across}


def by_examples(plan: Any, folder: Path) -> dict[str, Any]:
    """Train on transformers and torch alone: each example by itself, from position 0 on."""
    from halfstep.launcher.engine.build import parameter_groups
    from halfstep.models.network import build

    def examples(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ids = np.fromfile(folder / f"{name}.bin", dtype=np.uint16).astype(np.int64)
        marks = np.fromfile(folder / f"{name}.mask.bin", dtype=np.uint8).astype(bool)
        ends = np.cumsum(LENGTHS if name == "train" else VALIDATION)[:-1]
        return [
            (torch.from_numpy(own), torch.from_numpy(counted))
            for own, counted in zip(np.split(ids, ends), np.split(marks, ends), strict=True)
        ]

    model, settings = build(plan.model.config, seed=plan.seed), plan.deepspeed["optimizer"]["params"]

    def loss_of(name: str) -> tuple[torch.Tensor, int]:
        total, count = torch.zeros(()), 0
        for tokens, counted in examples(name):
            logits = model(input_ids=tokens[None, :-1]).logits[0]
            total = total + cross_entropy(logits[counted[1:]], tokens[1:][counted[1:]], reduction="sum")
            count += int(counted[1:].sum())
        return total / count, count

    optimizer = torch.optim.AdamW(
        parameter_groups(model, plan), lr=settings["lr"], betas=settings["betas"], eps=settings["eps"]
    )
    steps, evaluations = [], [loss_of("validation")[0].item()]
    for step in range(1, plan.steps + 1):
        loss, count = loss_of("train")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = plan.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append([loss.item(), norm, count])
    return {"steps": steps, "evaluations": [*evaluations, loss_of("validation")[0].item()], "across": 0.0}


def rank_main(folder: Path) -> None:
    """Train every case in one start."""
    from halfstep.launcher import topology
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    plans = {name: planned(folder, rank.world_size, *keys) for name, keys in CASES.items()}
    alone = rank.world_size == 1
    store = (
        torch.distributed.HashStore() if alone else file_store(folder / f"meeting.{os.environ['MASTER_PORT']}", rank)
    )
    distributed.join(rank, plans["packed"], store)
    seen = {name: trained(plan, rank) for name, plan in plans.items()}
    for name, keys in SPARSE_CASES.items():
        seen[f"sparse {name}"] = trained(planned(folder, rank.world_size, *keys, corpus="sparse"), rank)
    if rank.rank == 0:
        seen["each by itself"] = by_examples(plans["packed"], folder / "corpus")
    (folder / f"rank-{rank.rank}.json").write_text(json.dumps(seen))
    distributed.leave()


def corpora_in(folder: Path) -> Path:
    write_examples(folder / "corpus", drawn(LENGTHS, 1), drawn(VALIDATION, 2))
    sparse = [(ids, [int(number == 3)] * len(ids)) for number, (ids, _) in enumerate(drawn([9] * 8, 3))]
    write_examples(folder / "sparse", sparse, drawn(VALIDATION, 2))
    return folder


def require_same(name: str, ranks: list[dict[str, Any]]) -> None:
    """Compare a case, on each rank, with what the examples by themselves give."""
    expected = ranks[0]["each by itself"]
    for case in (rank[name] for rank in ranks):
        assert len(case["steps"]) == len(expected["steps"]) == STEPS
        for (loss, norm, targets), (own_loss, own_norm, own_targets) in zip(
            case["steps"], expected["steps"], strict=True
        ):
            assert loss == pytest.approx(own_loss, rel=1e-6)
            assert norm == pytest.approx(own_norm, rel=1e-6)
            assert targets == own_targets
        assert case["evaluations"] == pytest.approx(expected["evaluations"], rel=1e-6)
        assert case["across"] == 0.0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> list[dict[str, Any]]:
    return reported_by_two(__file__, corpora_in(tmp_path_factory.mktemp("two")), scratch)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> list[dict[str, Any]]:
    folder = corpora_in(tmp_path_factory.mktemp("alone"))
    printed_alone(__file__, scratch, str(folder))
    return [json.loads((folder / "rank-0.json").read_text())]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_examples_in_every_layout_as_each_by_itself(name: str, two: list[dict[str, Any]]) -> None:
    require_same(name, two)


@pytest.mark.parametrize("precision", SPARSE_CASES)
def test_a_step_without_any_target_changes_nothing_and_breaks_nothing(
    precision: str, two: list[dict[str, Any]]
) -> None:
    steps = two[0][f"sparse {precision}"]["steps"]
    assert two[1][f"sparse {precision}"]["steps"] == steps
    assert sorted(targets for _, _, targets in steps) == [0, 0, 0, 8]
    for loss, norm, targets in steps:
        assert (loss, norm) == (0.0, 0.0) if targets == 0 else loss > 3 and norm > 0


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_a_single_rank_trains_examples_in_every_layout_as_each_by_itself(
    name: str, alone: list[dict[str, Any]]
) -> None:
    require_same(name, alone)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
