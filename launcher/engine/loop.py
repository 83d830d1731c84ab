"""The training loop: one optimizer step after another, each leaving one record."""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfstep.launcher.checkpoint.store import folder_name
from halfstep.launcher.engine.build import learn_gathering_anew
from halfstep.launcher.engine.feed import Lookahead
from halfstep.launcher.engine.meter import StepMeter
from halfstep.launcher.engine.ranks.distributed import gather_objects
from halfstep.launcher.engine.readings import LossSums, Readings, sum_over_ranks
from halfstep.launcher.engine.state import average
from halfstep.launcher.engine.training import Training
from halfstep.launcher.errors import Stopped
from halfstep.launcher.metrics import derive
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.metric_rows import EvaluationRecord
from halfstep.launcher.system import clock


def train(run: Training) -> None:
    """Train from the step after `run.done` to the plan's last, evaluating before, in between and at the end.

    Raises NumericsError on every rank where the run can make no progress, Stopped on every rank after the same step
    where one was asked to stop.
    """
    engine, plan, feed, guard, saver = run.engine, run.plan, run.feed, run.guard, run.saver
    readings, meter, accumulation = Readings(engine, plan), StepMeter(run), plan.batch.accumulation
    _begin(run)
    learn_gathering_anew(engine)
    batches = Lookahead(feed, range(run.done + 1, plan.steps + 1), engine.device)
    engine.train()
    for step in range(run.done + 1, plan.steps + 1):
        rate = plan.schedule.learning_rate(step)
        targets = feed.target_count(step)
        meter.start(step, rate, guard.loss_scale, targets)
        readings.set_learning_rate(rate)
        guard.start_step(step)
        losses = LossSums(engine.device)
        # Of a batch without targets the loss is 0, whatever divides it.
        mean_count = max(1, targets) / (accumulation * plan.batch.ranks)
        with meter.traffic():
            for micro_step in range(1, accumulation + 1):
                with meter.waiting():
                    run.phase("data", step)
                    batch = batches.take()
                with meter.computing():
                    run.phase("forward", step)
                    objective = run.objective(batch, engine, mean_count)
                run.phase("backward", step)
                losses.add(guard.backward(objective.total), objective)
                batches.look_ahead()  # while a GPU still has all of this to do
                if micro_step == accumulation:
                    run.phase("step", step)
                    guard.before_step(readings.before_step(guard.gradient_scale))
                engine.step()  # DeepSpeed counts micro-steps itself: it has to be called after each (T8)
        assert engine.global_steps == step, f"DeepSpeed counts {engine.global_steps} steps, the loop {step}"
        skipped, stop = guard.after_step(), run.stop_reason() is not None
        average.after_step(engine, skipped=skipped)
        reading = readings.after_step(
            losses.means(accumulation), meter.waited, meter.computed(), skipped=skipped, stop=stop
        )
        meter.stop()
        if saver and saver.pending:
            run.mark("save", step)
            saver.finish()  # before this step is written down: a resume never redoes more than an interval
        record = meter.record(reading, skipped=skipped, skipped_steps=guard.skipped_steps)
        guard.judge(record, reading.own_loss, partial(_losses, run, step, mean_count))
        _boundary(run, step, rate, stopping=reading.stop)


def _losses(run: Training, step: int, mean_count: float, model: Any) -> Iterator[Tensor]:
    """Yield the losses of a step's micro-batches once more, each with a mark: together they may take a step's time."""
    for batch in run.feed.micro_batches(step):
        run.mark("forward", step)
        yield run.objective(batch, model, mean_count).total


def _begin(run: Training) -> None:
    """Evaluate before the first step, unless that was done before the run was interrupted."""
    finished = run.evaluated or not _evaluation_due(run.plan, run.done) or _evaluate(run, run.done)
    if not finished or run.stopping_anywhere():
        raise _stopped(run, run.done)


def _boundary(run: Training, step: int, rate: float, *, stopping: bool) -> None:
    """Evaluate and save after a step where that is due, and leave where a rank was asked to stop. A collective call."""
    finished = True
    if _evaluation_due(run.plan, step):
        finished = not stopping and _evaluate(run, step)
        stopping = stopping or not finished
    if run.saver and (stopping or run.plan.checkpoint.due(step, run.plan.steps)):
        run.mark("save", step)
        run.saver.begin(step, rate)
        stopping = stopping or run.stopping_anywhere()
        if stopping or step == run.plan.steps:
            run.saver.finish()
    if stopping and not (finished and step == run.plan.steps):
        raise _stopped(run, step)


def _evaluation_due(plan: Plan, step: int) -> bool:
    return step in (0, plan.steps) or (plan.eval_every > 0 and step % plan.eval_every == 0)


@torch.no_grad()
def _evaluate(run: Training, step: int) -> bool:
    """Tell the mean loss over the validation sequences of all ranks; False where a rank was asked to stop meanwhile.

    Of a mixture it is the mean over its parts by their weights, however many sequences each has here.
    """
    began, data = time.perf_counter(), run.plan.data
    loss_sums = torch.zeros(len(data.corpora), dtype=torch.float64, device=run.engine.device)
    target_counts = [0.0] * len(data.corpora)
    run.engine.eval()
    for part in range(len(data.corpora)):
        for batch, rows in run.feed.validation_batches(part):
            run.phase("evaluate", step)
            if run.stopping_anywhere():
                return False
            loss_sums[part] += run.loss_of(batch, run.engine, rows=rows, reduction="sum")
            target_counts[part] += batch.rows(rows).target_count if rows else 0
    run.engine.train()
    judged = _judged(run, step)
    if judged is None:
        return False
    totals = sum_over_ranks([*loss_sums, *target_counts], run.engine.device)
    losses, counts = totals[: len(data.corpora)], totals[len(data.corpora) :]
    if all(counts) or judged:
        losses = [total / count if count else math.nan for total, count in zip(losses, counts, strict=True)]
        mean = sum(weight * loss for weight, loss in zip(data.weights, losses, strict=True))
        by_part = {corpus.path: derive.finite(loss) for corpus, loss in zip(data.corpora, losses, strict=True)}
        loss, perplexity = derive.finite(mean), derive.perplexity(mean)
        run.on_evaluation(
            EvaluationRecord(
                step=step,
                eval_loss=loss,
                perplexity=perplexity,
                eval_loss_by_part=by_part if data.parts else None,
                tasks=judged or None,
                time=clock.now(),
            )
        )
        run.on_event("evaluated", step=step, seconds=round(time.perf_counter() - began, 6))
    return True


def _judged(run: Training, step: int) -> dict[str, dict[str, float | None]] | None:
    """Return the metrics of each task that is due, none where none is; None where a rank was asked to stop."""
    if run.judges is None or not run.plan.judges(step):
        return {}

    def go_on() -> bool:
        run.phase("evaluate", step)
        return not run.stopping_anywhere()

    results = run.judges.judge(go_on)
    if results is None:
        return None
    for result in results:
        about = {"examples": result.examples, "cut": result.cut, "skipped": result.skipped}
        about |= {"seconds": round(result.seconds, 6), "tokens_per_second": result.tokens_per_second}
        run.on_event("judged", step=step, task=result.name, **about)
    return {result.name: result.metrics for result in results}


def _stopped(run: Training, step: int) -> Stopped:
    """Return the error that every rank leaves with. A collective call."""
    reason = next(filter(None, gather_objects(run.stop_reason())), "another rank")
    last = run.saver.last_step if run.saver else 0
    if step == 0:
        state = "no step was trained"
    elif last == step:
        state = f"its checkpoint is {folder_name(step)}"
    elif last:
        state = f"it could not be saved: {step - last} steps will be done again, from {folder_name(last)}"
    else:
        state = "it could not be saved: the next start begins from scratch"
    return Stopped(f"{reason} after step {step}", where=state, fix="start the same command again to resume")
