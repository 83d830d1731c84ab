"""A mixture that is killed at any instant and moved to more ranks reads what the undisturbed run reads."""

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import rig
from faults.rig import Launch

from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Rank

pytestmark = pytest.mark.faults
THREE = {"argparse": 0.6, "inspect": 0.3, "typing": 0.1}
WITH_EXAMPLES = {"argparse": 0.6, "examples": 0.4}


@pytest.fixture(scope="module")
def part(data: Path, scratch: Path) -> Callable[[str], Path]:
    """Return a function that prepares a corpus with the tokenizer of the one that all faults are tried on."""

    def prepared(name: str) -> Path:
        out = scratch / "parts" / name
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            source, how = scratch / "text" / f"{name}.txt", {}
            if name == "examples":
                lines = (scratch / "text" / "typing.txt").read_text().splitlines()
                pairs = [pair for pair in itertools.pairwise(lines) if all(pair)]
                source, how = scratch / "examples.jsonl", {"format": "sft"}
                rows = [{"prompt": before, "completion": after} for before, after in pairs]
                source.write_text("".join(json.dumps(row) + "\n" for row in rows))
            prepare(str(source), out, tokenizer=str(data), validation=0.05, workers=1, progress=False, **how)
        return out

    return prepared


def windows(plan_file: Path) -> list[tuple[list[int], list[int]]]:
    """Return the parts and windows of every step, as the ranks of an attempt read them."""
    plan = Plan.from_dict(json.loads(plan_file.read_text()))
    world = plan.topology.world_size
    rank = Rank(rank=0, local_rank=0, world_size=world, local_world_size=world, source="by hand")
    feed = Feed(plan, rank, torch.device("cpu"))
    drawn = (feed.sequences(step) for step in range(1, plan.steps + 1))
    return [(parts.tolist(), own.tolist()) for parts, own in drawn]


@pytest.mark.parametrize("weights", [THREE, WITH_EXAMPLES], ids=["text", "examples"])
def test_a_mixture_is_killed_at_any_instant_and_moved_from_one_rank_to_two(
    launch: Callable[..., Launch],
    undisturbed: Callable[..., Path],
    part: Callable[[str], Path],
    record: Callable[..., None],
    weights: dict[str, float],
) -> None:
    mixture = "data=" + ",".join(f"{part(name)}:{weight}" for name, weight in weights.items())
    more = ("too_long=drop",) if "examples" in weights else ()
    arguments = (mixture, *more, "zero=1", "precision=fp32", "model.dropout=0", "checkpoint.every=5")
    reference = undisturbed(*arguments, world=1)
    instants = random.Random(11)
    launched = launch(f"mixture-{len(weights)}", *arguments, world=1)
    launched.until_step(instants.randrange(6, 18))
    launched.kill(ranks=(0,))
    launched.wait()
    moved = rig.steps_saved(launched.out)[-1]
    again = launch(launched.out, *arguments, world=2)
    again.until_step(instants.randrange(moved + 2, 38))
    again.kill(ranks=(instants.randrange(2),))
    again.wait()
    last = launch(launched.out, *arguments, world=2)
    assert last.wait() == [0, 0], last.output

    attempts = sorted((launched.out / "attempts").glob("*/plan.json"))
    assert len(attempts) == 3
    read = windows(reference / "plan.json")
    assert all(windows(attempt) == read for attempt in attempts)
    counts = np.bincount(np.concatenate([parts for parts, _ in read]), minlength=len(weights))
    for count, weight in zip(counts, weights.values(), strict=True):
        assert abs(count - 320 * weight) < math.sqrt(320 * weight * (1 - weight))

    ours, theirs = (
        {row["step"]: row["loss"] for row in rig.rows(out) if "loss" in row} for out in (last.out, reference)
    )
    assert list(ours) == list(theirs) == list(range(1, 41))
    assert all(ours[step] == theirs[step] for step in range(1, moved + 1)), "what one rank did stands, to the bit"
    difference = max(abs(ours[step] - theirs[step]) for step in ours)
    assert difference < 2e-3, "two ranks add in another order, and read the same"
    for row in rig.rows(last.out):
        if "eval_loss" in row:
            parts = row["eval_loss_by_part"]
            assert [Path(path).name for path in parts] == list(weights)
            mean = sum(weight * loss for weight, loss in zip(weights.values(), parts.values(), strict=True))
            assert row["eval_loss"] == pytest.approx(mean, rel=1e-12)
    kind = "mixture with examples" if "examples" in weights else "mixture"
    record(f"{kind}, killed twice, 1 -> 2 ranks", injected=2, survived=2, worst_redone=rig.redone(last.out))
