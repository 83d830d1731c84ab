"""A micro-batch: the shift by one, which targets count, and what each weighs in the step's mean."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfstep.launcher.engine.loop import train
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.numerics.repair import Repairs
from halfstep.launcher.engine.training import Training
from halfstep.launcher.parity import case_plan
from halfstep.launcher.parity.cases import Case
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.launcher.topology import Topology
from halfstep.models.loss import IGNORED
from halfstep.models.micro_batch import MicroBatch

VOCABULARY = 64


@pytest.fixture
def alone() -> Iterator[None]:
    """Be the only rank of a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """DeepSpeed's interface over a bigram model on one rank: plain SGD over the mean of its micro-batches."""

    device, global_steps, micro_steps = torch.device("cpu"), 0, 0

    def __init__(self, accumulation: int, peak: float = 1.0) -> None:
        self.module = nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY))
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=peak)
        self.accumulation = accumulation
        self.inputs: list[dict[str, Tensor]] = []

    def __call__(self, **inputs: Tensor) -> Any:
        self.inputs.append(inputs)
        return SimpleNamespace(logits=self.module(inputs["input_ids"]))

    def train(self) -> None:
        pass

    eval = train

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.global_steps += 1

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> None:
        return None


class Masked:
    """Two micro-batches a step: of the second one's targets few count."""

    rank = 0

    def __init__(self) -> None:
        tokens = torch.randint(0, VOCABULARY, (2, 4, 9), generator=torch.Generator().manual_seed(1))
        whole, masked = (MicroBatch.of_windows(part) for part in tokens)
        targets = masked.targets.clone()
        targets[:, 2:] = IGNORED
        self.batches = [whole, MicroBatch(masked.inputs, targets)]

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        yield from self.batches

    def target_count(self, step: int) -> float:
        return sum(batch.target_count for batch in self.batches)

    def validation_batches(self, part: int) -> Iterator[tuple[MicroBatch, int]]:
        yield self.batches[1], 3


@pytest.mark.usefixtures("alone")
def test_every_target_of_a_step_counts_the_same_however_they_are_spread_over_micro_batches() -> None:
    case = Case(zero=0, precision="fp32", accumulation=2, clip=0.0, world_size=1, optimizer="sgd", family="gpt2")
    plan = replace(
        case_plan.plan_of(case, Topology(world_size=1, ranks_per_node=1, accelerator="cpu"), repairs=True), steps=1
    )
    engine, feed = Engine(accumulation=2, peak=plan.schedule.peak), Masked()
    records: list[StepRecord] = []
    evaluations: list[EvaluationRecord] = []
    before = engine.module[0].weight.detach().clone().requires_grad_()
    inputs, targets = (torch.cat([getattr(batch, name) for batch in feed.batches]) for name in ("inputs", "targets"))
    expected = cross_entropy(before[inputs].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    expected.backward()
    first = feed.batches[1].rows(3)
    evaluated = cross_entropy(before[first.inputs].flatten(0, 1), first.targets.flatten(), ignore_index=IGNORED)
    guard = Guard(engine, plan, Repairs(), lambda kind, **details: None, 0)
    train(
        Training(
            engine=engine,
            plan=plan,
            feed=feed,
            guard=guard,
            on_step=records.append,
            on_evaluation=evaluations.append,
        )
    )
    (record,) = records
    assert record.loss == pytest.approx(expected.item(), rel=1e-6)
    moved = before.detach() - engine.module[0].weight.detach()
    torch.testing.assert_close(moved, plan.schedule.learning_rate(1) * before.grad, rtol=1e-4, atol=1e-6)
    assert evaluations[0].eval_loss == pytest.approx(evaluated.item(), rel=1e-6)


def test_a_window_is_shifted_by_one_and_every_token_but_the_first_is_a_target() -> None:
    batch = MicroBatch.of_windows(torch.arange(10).reshape(2, 5))
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert (batch.target_count, batch.rows(1).target_count) == (8, 4)


def test_what_is_ignored_or_weighs_nothing_does_not_count() -> None:
    inputs, targets = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1, IGNORED, 2, 3]])
    assert MicroBatch(inputs, targets).target_count == 3
    weighted = MicroBatch(inputs, targets, weights=torch.tensor([[0.5, 9.0, 0.0, 1.0]]))
    assert weighted.target_count == 1.5
    logits = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    each = cross_entropy(logits[0], targets[0], ignore_index=IGNORED, reduction="none")
    assert weighted.loss(logits).item() == pytest.approx((0.5 * each[0] + each[3]).item() / 1.5)


def test_positions_reach_the_model_where_there_are_some() -> None:
    engine, inputs = Engine(1), torch.zeros(1, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 0, 1]])
    MicroBatch(inputs, inputs).logits(engine)
    MicroBatch(inputs, inputs, positions).to(torch.device("cpu")).rows(1).logits(engine)
    assert [sorted(call) for call in engine.inputs] == [["input_ids"], ["input_ids", "position_ids"]]
    assert torch.equal(engine.inputs[1]["position_ids"], positions)


@pytest.mark.parametrize(("rows", "operators"), [(None, []), (3, []), (2, ["SliceBackward0"])])
def test_the_gradient_of_whole_logits_is_not_copied(rows: int | None, operators: list[str]) -> None:
    """What a slice of all rows is would be a tensor of zeros as large as the logits, and a copy into it."""
    batch = MicroBatch.of_windows(torch.arange(27).reshape(3, 9))
    logits = torch.zeros(3, 8, VOCABULARY, requires_grad=True)
    loss = batch.loss_by(lambda **_: SimpleNamespace(logits=logits * 1), rows=rows, reduction="sum")
    graph, seen = [loss.grad_fn], []
    while graph:
        node = graph.pop()
        seen += [node.name()]
        graph += [following for following, _ in node.next_functions if following is not None]
    assert [name for name in seen if "Slice" in name] == operators
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.any(dim=-1).sum() == 8 * (rows or 3)
