"""The training loop: one optimizer step after another, each leaving one record."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from launcher.engine.feed import Feed
from launcher.engine.guard import Guard
from launcher.engine.readings import Readings, StepReading, sum_over_ranks
from launcher.engine.repair import Repairs
from launcher.metrics import derive
from launcher.metrics.record import EvaluationRecord, StepRecord
from launcher.plan.plan import Plan
from models.loss import next_token_loss


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who hears of each record; every rank calls them, rank 0's write."""

    step: Callable[[StepRecord], None]
    evaluation: Callable[[EvaluationRecord | None], None]
    event: Callable[..., None]


def train(engine: DeepSpeedEngine, plan: Plan, feed: Feed, tell: Listeners, repairs: Repairs) -> StepRecord:
    """Train from step 1 to the plan's last, evaluating before, in between and at the end; return the last record.

    Raises NumericsError on every rank where the run can make no progress.
    """
    readings = Readings(engine, plan)
    guard = Guard(engine, plan, repairs, tell.event, feed.rank)
    tell.evaluation(evaluate(engine, feed, step=0))
    for step in range(1, plan.steps + 1):
        engine.train()
        started = time.perf_counter()
        waited = 0.0
        total = torch.zeros((), device=engine.device)
        rate = plan.schedule.learning_rate(step)
        readings.set_learning_rate(rate)
        guard.start_step(step)
        scale = guard.loss_scale
        batches = feed.micro_batches(step)
        for micro_step in range(1, plan.batch.accumulation + 1):
            asked = time.perf_counter()
            tokens = next(batches)
            waited += time.perf_counter() - asked
            logits = engine(input_ids=tokens[:, :-1]).logits
            total += guard.backward(next_token_loss(logits, tokens[:, 1:]))
            if micro_step == plan.batch.accumulation:
                guard.before_step(readings.before_step(guard.gradient_scale))
            engine.step()  # DeepSpeed counts micro-steps itself: it has to be called after each (T8)
        assert engine.global_steps == step, f"DeepSpeed counts {engine.global_steps} steps, the loop {step}"
        skipped = guard.after_step()
        own_loss = float(total / plan.batch.accumulation)
        reading = readings.after_step(own_loss, waited, skipped=skipped)
        seconds = time.perf_counter() - started
        counts = {"loss_scale": scale, "overflow": skipped, "skipped_steps": guard.skipped_steps}
        record = _record(plan, step, rate, reading, seconds, **counts)
        tell.step(record)
        guard.judge(record, own_loss, feed.micro_batches(step))
        if (plan.eval_every and step % plan.eval_every == 0) or step == plan.steps:
            tell.evaluation(evaluate(engine, feed, step=step))
    return record


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, feed: Feed, *, step: int) -> EvaluationRecord | None:
    """Return the mean loss over the validation sequences of all ranks, or None without any. A collective call."""
    engine.eval()
    loss_sum, tokens_seen = 0.0, 0
    for tokens, counted in feed.validation_batches():
        logits = engine(input_ids=tokens[:, :-1]).logits
        if counted:
            loss_sum += float(next_token_loss(logits[:counted], tokens[:counted, 1:], reduction="sum"))
            tokens_seen += counted * (tokens.shape[1] - 1)
    total, count = sum_over_ranks([loss_sum, tokens_seen], engine.device)
    if count == 0:
        return None
    loss = total / count
    return EvaluationRecord(
        step=step, eval_loss=derive.finite(loss), perplexity=derive.perplexity(loss), time=time.time()
    )


def _record(
    plan: Plan,
    step: int,
    rate: float,
    reading: StepReading,
    seconds: float,
    *,
    loss_scale: float | None,
    overflow: bool,
    skipped_steps: int,
) -> StepRecord:
    tokens = plan.batch.global_ * plan.sequence
    throughput = derive.tokens_per_second(tokens, seconds)
    return StepRecord(
        step=step,
        tokens=step * tokens,
        loss=derive.finite(reading.loss),
        lr=rate,
        grad_norm=derive.finite(reading.grad_norm),
        loss_scale=loss_scale,
        overflow=overflow,
        skipped_steps=skipped_steps,
        step_seconds=seconds,
        data_seconds=reading.data_seconds,
        tokens_per_second=throughput,
        mfu=derive.mfu(throughput, plan.model.flops_per_token, plan.peak_flops, plan.topology.world_size),
        peak_memory_bytes=reading.peak_memory_bytes,
        time=time.time(),
    )
