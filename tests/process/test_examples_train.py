"""Examples trained on real ranks: packed as unpacked, two ranks as one, accumulated or not, and as each by itself.

Run as a program, this file is a rank: it trains each case through the loop, and on one rank also on transformers alone,
where every example is a call of its own. Two ranks write what they saw to rank-N.json, one prints it.
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


def planned(folder: Path, ranks: int, *keys: str) -> Any:
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve

    request = load([*COMMON, f"data={folder}/corpus", *keys])
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
    if alone:
        seen["each by itself"] = by_examples(plans["packed"], folder / "corpus")
        print("\n" + json.dumps(seen))
    else:
        (folder / f"rank-{rank.rank}.json").write_text(json.dumps(seen))
    distributed.leave()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> dict[str, dict[str, Any]]:
    """Return what each case saw, by its name and the number of ranks."""
    folder = tmp_path_factory.mktemp("examples")
    write_examples(folder / "corpus", drawn(LENGTHS, 1), drawn(VALIDATION, 2))
    alone = json.loads(printed_alone(__file__, scratch, str(folder))[-1])
    first, second = reported_by_two(__file__, folder, scratch)
    assert first == second
    return {f"{name}, 1": own for name, own in alone.items()} | {f"{name}, 2": own for name, own in first.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_lay_examples_out_trains_the_same(seen: dict[str, dict[str, Any]], name: str, ranks: int) -> None:
    case, expected = seen[f"{name}, {ranks}"], seen["each by itself, 1"]
    assert len(case["steps"]) == len(expected["steps"]) == STEPS
    for (loss, norm, targets), (own_loss, own_norm, own_targets) in zip(case["steps"], expected["steps"], strict=True):
        assert loss == pytest.approx(own_loss, rel=1e-6)
        assert norm == pytest.approx(own_norm, rel=1e-6)
        assert targets == own_targets
    assert case["evaluations"] == pytest.approx(expected["evaluations"], rel=1e-6)
    assert case["across"] == 0.0


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
