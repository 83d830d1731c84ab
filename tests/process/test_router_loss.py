"""Mixtures of experts train with their routers' auxiliary loss as transformers computes it, at every ZeRO stage.

Run by torchrun, this file is the program of a rank: it trains small mixtures through the loop, and the same on
transformers alone, and writes what it saw to rank-N.json in the folder it is given.
"""

import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.mixtures import MIXTURES
from process.conftest import BIN, Outcome
from process.conftest import WORDS as RUN
from process.test_host_share import Operators, Waits
from ranks import reported_by_two

from halfstep.launcher.checkpoint import store
from halfstep.launcher.checkpoint.manifest import read

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]
VOCABULARY = 64
WORDS = ["sequence=32", "batch.global=8", "batch.micro=2", "steps=3", "precision=fp32", "optimizer.clip=0.5", "data=x"]
STAGES = {f"{family} z{zero}": (family, f"zero={zero}") for family in MIXTURES for zero in range(4)}
OTHERS = {
    "checkpointed z1": ("mixtral", "zero=1", "activation_checkpointing=true"),
    "checkpointed z3": ("qwen2_moe", "zero=3", "activation_checkpointing=true"),
    "fused head": ("qwen2_moe", "zero=2", "fused_head=true"),
    "fused head z3": ("mixtral", "zero=3", "fused_head=true", "activation_checkpointing=true"),
    "as asked": ("mixtral", "zero=2", "model.router_loss=0.25"),
}
WITHOUT = ("mixtral", "zero=2", "model.router_loss=0")


def plan_of(home: Path, family: str, *keys: str) -> Any:
    """Return the plan of a family on two ranks that make their batches themselves (the gate's feed)."""
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.corpus.description import DataFacts
    from halfstep.launcher.plan.facts import Facts
    from halfstep.launcher.plan.pretrained import read_model
    from halfstep.launcher.plan.resolve import resolve

    request = load([*WORDS, f"model=hf:{home / family}", *keys])
    data = DataFacts(
        path="synthetic",
        train_prefix="synthetic",
        validation_prefix=None,
        train_tokens=10**9,
        validation_tokens=0,
        vocabulary=VOCABULARY,
        has_tokenizer=False,
        digest="synthetic",
    )
    plan = resolve(request, topology.describe(2, 2), Facts(data=data, model=read_model(request.spec), ds_config=None))
    plan.require_allowed()
    return plan


def trained(plan: Any, rank: int) -> tuple[list[list[float | None]], int]:
    """Train through the loop; return each step's losses and norm, and how often we made the host wait in the second."""
    from halfstep.launcher.engine.build import build
    from halfstep.launcher.engine.loop import train
    from halfstep.launcher.engine.numerics.guard import Guard
    from halfstep.launcher.engine.training import Training
    from halfstep.launcher.parity.trial import SyntheticFeed

    rows: list[list[float | None]] = []
    counts, counting = Counter[str](), contextlib.ExitStack()

    def on_step(record: Any) -> None:
        counting.close()
        rows.append([record.loss, record.router_loss, record.grad_norm])
        if record.step == 1:
            counting.enter_context(Operators(counts))
            counting.enter_context(Waits(counts))

    engine, repairs = build(plan)
    guard = Guard(engine, plan, repairs, lambda kind, **about: None, rank)
    train(
        Training(
            engine=engine,
            plan=plan,
            feed=SyntheticFeed(plan, rank, engine.device),
            guard=guard,
            on_step=on_step,
        )
    )
    engine.destroy()
    return rows, counts["wait"] + counts["aten._local_scalar_dense.default"]


def by_transformers(plan: Any, coefficient: float | None = None) -> list[list[float]]:
    """Train on transformers and torch alone, with the loss that `labels` and `output_router_logits` give.

    Every micro-batch of every rank is a call of its own. `coefficient` stands for the config's.
    """
    from halfstep.launcher.engine.build import parameter_groups
    from halfstep.launcher.parity.trial import SyntheticFeed
    from halfstep.models.network import build

    model = build(plan.model.config, seed=plan.seed)
    if coefficient is not None:
        model.router_aux_loss_coef = coefficient
    settings = plan.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, plan), lr=settings["lr"], betas=settings["betas"], eps=settings["eps"]
    )
    feed, rows = SyntheticFeed(plan, 0, torch.device("cpu")), []
    for step in range(1, plan.steps + 1):
        shares = [share.tokens for share in feed.shares(step)]
        losses, routers = [], []
        for share in shares:
            targets = share[:, 1:].contiguous()
            made = model(input_ids=share[:, :-1], labels=targets, shift_labels=targets, output_router_logits=True)
            (made.loss / len(shares)).backward()
            losses.append(torch.nn.functional.cross_entropy(made.logits.flatten(0, 1), targets.flatten()).item())
            routers.append(made.aux_loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = plan.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([sum(losses) / len(losses), sum(routers) / len(routers), norm])
    return rows


def rank_main(out: Path) -> None:
    """Train everything the tests below look at, in one start of the ranks."""
    from halfstep.launcher import topology
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    first = plan_of(out, *WITHOUT)
    distributed.join(rank, first, file_store(out / f"meeting.{os.environ['MASTER_PORT']}", rank))
    cases = {**STAGES, **OTHERS, "without": WITHOUT}
    plans = {name: plan_of(out, *keys) for name, keys in cases.items()}
    training = {name: trained(plan, rank.rank) for name, plan in plans.items()}
    seen, waits = ({name: both[part] for name, both in training.items()} for part in (0, 1))
    expected = {family: by_transformers(plans[f"{family} z1"]) for family in MIXTURES}
    expected |= {"as asked": by_transformers(first, 0.25), "without": by_transformers(first, 0.0)}
    (out / f"rank-{rank.rank}.json").write_text(json.dumps({"seen": seen, "waits": waits, "expected": expected}))
    distributed.leave()


def train(start: Start, name: str, home: Path, data: Path, *keys: str) -> Outcome:
    given = [*RUN, f"model=hf:{home}", f"data={data}", "steps=4", "eval.every=0", "checkpoint.every=2", *keys]
    return start(name, [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *given, "out={out}"])


def without_last_step(outcome: Outcome, to: Path) -> Path:
    """Copy a run as it was before its last checkpoint."""
    shutil.copytree(outcome.out, to)
    shutil.rmtree(store.home(to) / store.folder_name(4))
    (to / "summary.json").unlink()
    return to


def write_folders(home: Path, vocabulary: int) -> None:
    """Write a folder with a config.json for each mixture."""
    for family, config in MIXTURES.items():
        (home / family).mkdir()
        (home / family / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("mixtures")
    write_folders(out, VOCABULARY)
    return reported_by_two(__file__, out, scratch)


def test_transformers_alone_has_a_loss_and_a_gradient_that_the_routers_change(ranks: list[dict[str, Any]]) -> None:
    """What the tests below compare with is not the same with and without."""
    with_it, without = ranks[0]["expected"]["mixtral"], ranks[0]["expected"]["without"]
    assert with_it[0][:2] == without[0][:2], "the same weights"
    assert with_it[0][1] > 2.01, "2, experts per token, were perfect balance"
    assert abs(with_it[0][2] - without[0][2]) > 1e-3
    assert abs(with_it[2][0] - without[2][0]) > 1e-4


def test_a_step_waits_for_its_device_no_more_often_than_without(ranks: list[dict[str, Any]]) -> None:
    for name, count in ranks[0]["waits"].items():
        assert count == (2 if name.endswith("z0") else 1), f"{name}: once for all readings, and at stage 0 for its norm"


@pytest.mark.parametrize("name", [*STAGES, *OTHERS])
def test_the_routers_loss_is_transformers_own_and_so_is_the_gradient(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        expected = rank["expected"].get(name) or rank["expected"][{**STAGES, **OTHERS}[name][0]]
        assert len(rank["seen"][name]) == len(expected) == 3
        for (loss, router, norm), (own_loss, own_router, own_norm) in zip(rank["seen"][name], expected, strict=True):
            assert router == pytest.approx(own_router, abs=1e-6)
            assert loss == pytest.approx(own_loss, abs=2e-6), "the language-model loss alone"
            assert norm == pytest.approx(own_norm, rel=1e-5)


def test_a_coefficient_of_0_trains_by_the_language_model_loss_and_computes_no_other(
    ranks: list[dict[str, Any]],
) -> None:
    for (loss, router, norm), (own_loss, _, own_norm) in zip(
        ranks[0]["seen"]["without"], ranks[0]["expected"]["without"], strict=True
    ):
        assert router is None
        assert loss == pytest.approx(own_loss, abs=2e-6)
        assert norm == pytest.approx(own_norm, rel=1e-5)


@pytest.fixture(scope="module")
def home(scratch: Path) -> Path:
    """A mixture's folder with the vocabulary of the corpus."""
    folders = scratch / "mixtures"
    folders.mkdir()
    write_folders(folders, 512)
    return folders / "mixtral"


def files(run: Path) -> list[str]:
    return [file.xxh3 for file in read(store.home(run) / store.folder_name(4)).files]


@pytest.mark.full
@pytest.mark.parametrize("cell", [("zero=1", "precision=fp32"), ("zero=3", "precision=bf16")])
def test_a_run_resumes_with_the_loss_to_the_bit_and_evaluates_without_it(
    start: Start, data: Path, home: Path, cell: tuple[str, str]
) -> None:
    whole = train(start, f"mixture-{cell[0]}", home, data, *cell)
    assert whole.returncode == 0, whole.output
    assert whole.json("plan.json")["router_loss"] == 0.5
    routers = [row["router_loss"] for row in whole.steps]
    assert all(2 < loss < 4 for loss in routers), routers
    assert abs(whole.evaluations[0]["eval_loss"] - whole.losses[0]) < 0.25 < 0.5 * routers[0] / 2, (
        "alike: neither has it"
    )
    again = without_last_step(whole, whole.out.with_name(f"{whole.out.name}-again"))
    resumed = train(start, again.name, home, data, *cell)
    assert resumed.returncode == 0, resumed.output
    assert "resumes after step 2" in resumed.output
    assert resumed.losses == whole.losses
    assert [row["router_loss"] for row in resumed.steps] == routers
    assert files(again) == files(whole.out)


@pytest.mark.full
def test_a_run_that_is_older_than_the_loss_goes_on_without_it(start: Start, data: Path, home: Path) -> None:
    whole = train(start, "older", home, data, "zero=1", "precision=fp32", "model.router_loss=0")
    assert whole.returncode == 0, whole.output
    old = without_last_step(whole, whole.out.with_name("older-killed"))
    for file in (old / "plan.json", old / "attempts" / "0001" / "plan.json"):
        tree = json.loads(file.read_text())
        del tree["router_loss"], tree["model"]["active_parameters"]
        tree["model"]["flops_per_token"] = None
        file.write_text(json.dumps(tree))
    request = old / "request.toml"
    request.write_text("".join(line for line in request.read_text().splitlines(True) if "router_loss" not in line))
    resumed = train(start, old.name, home, data, "zero=1", "precision=fp32")
    assert resumed.returncode == 0, resumed.output
    assert "was begun without its routers' auxiliary loss, and goes on without it" in resumed.output
    assert resumed.losses == whole.losses
    assert [row["router_loss"] for row in resumed.steps] == [None] * 4
    assert resumed.json("plan.json")["run_id"] == whole.json("plan.json")["run_id"]
    assert files(old) == files(whole.out)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
