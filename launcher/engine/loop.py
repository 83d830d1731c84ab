"""The training loop: one optimizer step after another, each leaving one record."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from halfstep.launcher import fault_injection
from halfstep.launcher.checkpoint.store import folder_name
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.ranks.distributed import gather_objects
from halfstep.launcher.engine.ranks.stragglers import Pace, Stragglers
from halfstep.launcher.engine.ranks.traffic import Traffic
from halfstep.launcher.engine.readings import Readings, StepReading, sum_over_ranks
from halfstep.launcher.engine.state.saving import Saver
from halfstep.launcher.errors import Stopped
from halfstep.launcher.metrics import derive
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.launcher.system import clock
from halfstep.models.loss import next_token_loss

_COUNTED = 5
"""The step whose traffic is counted: its time is not averaged yet (metrics/derive.py), and by then stage 3 has learnt
the order of modules again that the evaluation before the first step had made it forget."""


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who hears of each record; every rank calls them, rank 0's write."""

    step: Callable[[StepRecord], None]
    evaluation: Callable[[EvaluationRecord], None]
    event: Callable[..., None]
    traffic: Callable[[int, int], None] = lambda sent, collectives: None
    """Bytes and collectives of one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What a loop knows of the world around it: who watches it, who wants it to stop, where it saves."""

    mark: Callable[[str, int], None] = lambda phase, step: None
    """Called with the phase and the step whenever something has moved."""
    asked: Callable[[], str | None] = lambda: None
    """Why this rank was asked to stop, if it was."""
    saver: Saver | None = None
    pace: Pace | None = None


def train(
    engine: DeepSpeedEngine,
    plan: Plan,
    feed: Feed,
    tell: Listeners,
    guard: Guard,
    outside: Outside = Outside(),
    *,
    done: int = 0,
    evaluated: bool = False,
) -> None:
    """Train from the step after `done` to the plan's last, evaluating before, in between and at the end.

    `evaluated`: whether the evaluation that is due after `done` has been made. Raises NumericsError on every rank where
    the run can make no progress, Stopped on every rank after the same step where one was asked to stop.
    """
    readings = Readings(engine, plan)
    stragglers = Stragglers(plan.topology.world_size, plan.watch.slow)
    saver = outside.saver
    finished = evaluated or not _evaluation_due(plan, done) or _evaluate(engine, feed, tell, outside, done)
    if not finished or _agreed(outside, engine.device):
        raise _stopped(outside, done)
    for step in range(done + 1, plan.steps + 1):
        started = time.perf_counter()
        rate = plan.schedule.learning_rate(step)
        readings.set_learning_rate(rate)
        guard.start_step(step)
        scale = guard.loss_scale
        with _counting(plan, tell, step == min(done + _COUNTED, plan.steps)):
            own_loss, waited = _forward_and_backward(engine, plan, feed, guard, readings, outside, step)
        assert engine.global_steps == step, f"DeepSpeed counts {engine.global_steps} steps, the loop {step}"
        skipped = guard.after_step()
        computed = outside.pace.seconds() if outside.pace else 0.0
        reading = readings.after_step(own_loss, waited, computed, skipped=skipped, stop=outside.asked() is not None)
        seconds = time.perf_counter() - started
        if saver and saver.pending:
            outside.mark("save", step)
            saver.finish()  # before this step is written down: a resume never redoes more than an interval
        counts = {"loss_scale": scale, "overflow": skipped, "skipped_steps": guard.skipped_steps}
        record = _record(plan, step, rate, reading, seconds, **counts)
        tell.step(record)
        if slow := stragglers.see(step, reading.compute_seconds):
            tell.event("slow_rank", step=step, **slow)
        guard.judge(record, own_loss, feed.micro_batches(step))
        stopping, finished = reading.stop, True
        if _evaluation_due(plan, step):
            finished = not stopping and _evaluate(engine, feed, tell, outside, step)
            stopping = stopping or not finished
        if saver and (stopping or plan.checkpoint.due(step, plan.steps)):
            outside.mark("save", step)
            saver.begin(step, rate)
            stopping = stopping or _agreed(outside, engine.device)
            if stopping or step == plan.steps:
                saver.finish()
        if stopping and not (finished and step == plan.steps):
            raise _stopped(outside, step)


@contextlib.contextmanager
def _counting(plan: Plan, tell: Listeners, due: bool) -> Iterator[None]:
    """Tell what one step sends."""
    if not due or plan.compile:  # a compiler does not see through what counts
        yield
        return
    with Traffic() as sent:
        yield
    tell.traffic(sent.bytes, sent.collectives)


def _forward_and_backward(
    engine: DeepSpeedEngine, plan: Plan, feed: Feed, guard: Guard, readings: Readings, outside: Outside, step: int
) -> tuple[float, float]:
    """Run the micro-steps of one optimizer step and the step; return this rank's mean loss and its wait for data."""
    engine.train()
    mark, waited = outside.mark, 0.0
    total = torch.zeros((), device=engine.device)
    batches = feed.micro_batches(step)
    for micro_step in range(1, plan.batch.accumulation + 1):
        mark("data", step)
        asked = time.perf_counter()
        fault_injection.hit("data", rank=feed.rank, step=step)
        tokens = next(batches)
        waited += time.perf_counter() - asked
        mark("forward", step)
        with outside.pace.forward() if outside.pace else contextlib.nullcontext():
            fault_injection.hit("fwd", rank=feed.rank, step=step)
            logits = engine(input_ids=tokens[:, :-1]).logits
        loss = next_token_loss(logits, tokens[:, 1:])
        mark("backward", step)
        fault_injection.hit("bwd", rank=feed.rank, step=step)
        total += guard.backward(loss)
        mark("step", step)
        if micro_step == plan.batch.accumulation:
            fault_injection.hit("step", rank=feed.rank, step=step)
            mark("step", step)
            guard.before_step(readings.before_step(guard.gradient_scale))
        engine.step()  # DeepSpeed counts micro-steps itself: it has to be called after each (T8)
    return float(total / plan.batch.accumulation), waited


def _evaluation_due(plan: Plan, step: int) -> bool:
    return step in (0, plan.steps) or (plan.eval_every > 0 and step % plan.eval_every == 0)


@torch.no_grad()
def _evaluate(engine: DeepSpeedEngine, feed: Feed, tell: Listeners, outside: Outside, step: int) -> bool:
    """Tell the mean loss over the validation sequences of all ranks; False where a rank was asked to stop meanwhile.

    A collective call.
    """
    began = time.perf_counter()
    engine.eval()
    loss_sum, tokens_seen = 0.0, 0
    for tokens, counted in feed.validation_batches():
        outside.mark("evaluate", step)
        fault_injection.hit("eval", rank=feed.rank, step=step)
        outside.mark("evaluate", step)  # again before the ranks wait for each other
        if _agreed(outside, engine.device):
            return False
        logits = engine(input_ids=tokens[:, :-1]).logits
        if counted:
            loss_sum += float(next_token_loss(logits[:counted], tokens[:counted, 1:], reduction="sum"))
            tokens_seen += counted * (tokens.shape[1] - 1)
    total, count = sum_over_ranks([loss_sum, tokens_seen], engine.device)
    if count:
        loss = derive.finite(total / count)
        perplexity = derive.perplexity(total / count)
        tell.evaluation(EvaluationRecord(step=step, eval_loss=loss, perplexity=perplexity, time=clock.now()))
        tell.event("evaluated", step=step, seconds=round(time.perf_counter() - began, 6))
    return True


def _agreed(outside: Outside, device: torch.device) -> bool:
    """Tell whether any rank was asked to stop. A collective call."""
    return sum_over_ranks([float(outside.asked() is not None)], device)[0] > 0


def _stopped(outside: Outside, step: int) -> Stopped:
    """Return the error that every rank leaves with. A collective call."""
    reasons = gather_objects(outside.asked())
    reason = next((one for one in reasons if one), "another rank")
    last = outside.saver.last_step if outside.saver else 0
    if step == 0:
        state = "no step was trained"
    elif last == step:
        state = f"its checkpoint is {folder_name(step)}"
    elif last:
        state = f"it could not be saved: {step - last} steps will be done again, from {folder_name(last)}"
    else:
        state = "it could not be saved: the next start begins anew"
    return Stopped(f"{reason} after step {step}", where=state, fix="start the same command again to go on")


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
        time=clock.now(),
    )
