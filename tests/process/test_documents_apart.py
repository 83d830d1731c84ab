"""Documents that are kept apart on real ranks: trained as by themselves, at stages 0 and 3, compiled and not.

Run by torchrun, this file is the program of a rank: it trains through the loop on a corpus of short documents, and on
transformers alone, where every document of every window is a call of its own; and it edits tokens and looks at the
engine's logits. It writes what it saw to rank-N.json in the folder that holds the corpus.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import reported_by_two

pytestmark = [pytest.mark.process, pytest.mark.full]
LENGTHS = [3, 40, 1, 1, 17, 9, 70, 5, 5, 30] * 12
WORDS = ["sequence=32", "batch.global=8", "batch.micro=2", "steps=3", "precision=fp32", "model.vocabulary=64",
         "model.layers=2", "model.width=32", "model.heads=4", "documents=masked"]  # fmt: skip
CASES = {
    "z0": ("model=gpt2-nano", "zero=0"),
    "z0 compiled": ("model=llama-nano", "zero=0", "compile=true"),
    "z3": ("model=llama-nano", "zero=3"),
    "z3 compiled": ("model=gpt2-nano", "zero=3", "compile=true"),
}


def plan_of(prefix: Path, *keys: str) -> Any:
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve

    request = load([*WORDS, f"data={prefix}", *keys])
    return resolve(request, topology.describe(2, 2), facts.read(request.spec))


def trained(plan: Any, place: Any) -> tuple[list[list[float | None]], dict[str, float]]:
    """Train through the loop; return each step's loss and norm, and what an edit of the first document moves."""
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.feed import Feed
    from halfstep.launcher.engine.loop import train
    from halfstep.launcher.engine.numerics.guard import Guard
    from halfstep.launcher.engine.training import Training

    engine, repairs = build(plan)
    rows: list[list[float | None]] = []
    train(
        Training(
            engine=engine,
            plan=plan,
            feed=Feed(plan, place, engine.device),
            guard=Guard(engine, plan, repairs, lambda kind, **about: None, place.rank),
            on_step=lambda record: rows.append([record.loss, record.grad_norm]),
        )
    )
    moved = edited(engine)
    engine.destroy()
    return rows, moved


@torch.no_grad()
def edited(engine: Any) -> dict[str, float]:
    """Return the most that an edit of each token moves the logits of its own and of the other documents."""
    from halfstep.models.micro_batch import MicroBatch

    tokens = torch.arange(66).reshape(2, 33) * 7 % 64
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [9, 10, 20]] = starts[1, [4, 32]] = True
    engine.eval()
    documents = starts[:, :-1].cumsum(1) + torch.tensor([[0], [9]])
    before = MicroBatch.of_documents(tokens, starts).logits(engine).clone()
    most = {"own": float("inf"), "other": 0.0}
    for row, column in [(row, column) for row in (0, 1) for column in range(0, 32, 3)]:
        changed = tokens.clone()
        changed[row, column] = (changed[row, column] + 31) % 64
        moved = (MicroBatch.of_documents(changed, starts).logits(engine) - before).abs().amax(-1)
        own = documents == documents[row, column]
        most["own"] = min(most["own"], float(moved[own].max()))
        most["other"] = max(most["other"], float(moved[~own].max()))
    engine.train()
    return most


def by_documents(plan: Any, prefix: Path) -> list[list[float]]:
    """Train on transformers and torch alone: each document of a window by itself, from position 0 on."""
    from halfstep.launcher.data.order import windows_of_step
    from halfstep.launcher.engine.build import parameter_groups
    from halfstep.models.network import build

    stream = np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    model, settings = build(plan.model.config, seed=plan.seed), plan.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, plan), lr=settings["lr"], betas=settings["betas"], eps=settings["eps"]
    )
    rows = []
    for step in range(1, plan.steps + 1):
        total, count = torch.zeros(()), 0
        for window in windows_of_step(plan.seed, step, plan.batch.global_, plan.data.train_windows):
            part = slice(window * plan.sequence, window * plan.sequence + plan.sequence + 1)
            for document in np.unique(owner[part]):
                tokens = torch.from_numpy(stream[part][owner[part] == document])
                if len(tokens) > 1:
                    logits = model(input_ids=tokens[None, :-1]).logits[0]
                    total = total + torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
                    count += len(tokens) - 1
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = plan.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([(total / count).item(), norm])
    return rows


def rank_main(prefix: Path) -> None:
    """Train everything the test below looks at, in one start of the ranks."""
    from halfstep.launcher import topology
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store

    # Everything of the compiler that sees masks and positions; the C++ that Inductor makes of it takes a minute more.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    rank = topology.from_environment()
    topology.prepare_environment(rank)
    plans = {name: plan_of(prefix, *keys) for name, keys in CASES.items()}
    store = file_store(prefix.parent / f"meeting.{os.environ['MASTER_PORT']}", rank)
    distributed.join(rank, plans["z0"], store)
    seen = {name: trained(plan, rank) for name, plan in plans.items()}
    expected = {name: by_documents(plan, prefix) for name, plan in plans.items()} if rank.rank == 0 else {}
    out = prefix.parent / f"rank-{rank.rank}.json"
    out.write_text(json.dumps({"seen": seen, "expected": expected}))
    distributed.leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> list[dict[str, Any]]:
    from halfstep.launcher.data.tokens import open_writer

    out = tmp_path_factory.mktemp("documents")
    drawn = np.random.default_rng(1)
    with open_writer(out / "corpus", np.dtype(np.uint16)) as writer:
        for length in LENGTHS:
            writer.add_document(drawn.integers(0, 64, length, dtype=np.uint16))
    return reported_by_two(__file__, out, scratch)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_documents_by_themselves(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        rows, expected = rank["seen"][name][0], ranks[0]["expected"][name]
        assert len(rows) == len(expected) == 3
        for (loss, norm), (own_loss, own_norm) in zip(rows, expected, strict=True):
            assert loss == pytest.approx(own_loss, abs=3e-6)
            assert norm == pytest.approx(own_norm, rel=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_an_edited_token_moves_no_logit_of_another_document(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        moved = rank["seen"][name][1]
        assert moved["other"] == 0.0
        assert moved["own"] > 1e-3


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]) / "corpus")
    sys.stdout.flush()
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
