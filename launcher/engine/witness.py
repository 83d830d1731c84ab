"""Rank 0's pen: every record goes to metrics.jsonl, the screen and the summary; the other ranks keep silent."""

import math
import time
from types import TracebackType
from typing import Any, Self

from launcher.files import write_json
from launcher.metrics import derive
from launcher.metrics.record import EvaluationRecord, StepRecord
from launcher.metrics.sinks import JsonLines, Screen
from launcher.plan.plan import Plan
from launcher.rundir import RunDir


class Witness:
    """Writes what a run does and, at the end, what came of it."""

    def __init__(self, where: RunDir, plan: Plan, *, writes: bool) -> None:
        self._where, self._plan, self._writes = where, plan, writes
        self.screen = Screen(plan.steps, plan.log_every, quiet=not writes)
        self._started = time.time()
        self._steps: list[StepRecord] = []
        self._evaluations: list[EvaluationRecord] = []
        self._repairs: list[str] = []

    def __enter__(self) -> Self:
        self.screen.__enter__()
        if self._writes:
            self._metrics, self._events = JsonLines(self._where.metrics), JsonLines(self._where.events)
            self.event("start", attempt=self._where.attempt.name, run_id=self._plan.run_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.screen.__exit__(kind, error, trace)
        if self._writes:
            self._metrics.close()
            self._events.close()

    def event(self, kind: str, **details: Any) -> None:
        """Write an event."""
        if self._writes:
            self._events.event(kind, **details)

    def repaired(self, names: tuple[str, ...]) -> None:
        """Take down what was mended in DeepSpeed."""
        if names:
            self._repairs = list(names)
            self.event("repaired", repairs=self._repairs)
            self.screen.say(f"mended in DeepSpeed at stage 0: {', '.join(names)} (docs/deepspeed.md)")

    def step(self, record: StepRecord) -> None:
        """Take down one optimizer step."""
        if not self._writes:
            return
        self._metrics.write(record)
        self.screen.step(record)
        self._steps.append(record)

    def evaluation(self, record: EvaluationRecord | None) -> None:
        """Take down one evaluation."""
        if not self._writes or record is None:
            return
        self._metrics.write(record)
        self.screen.evaluation(record)
        self._evaluations.append(record)
        if record.step == 0 and self._plan.model.weights is None:
            self._check_first_loss(record)

    def _check_first_loss(self, record: EvaluationRecord) -> None:
        """Warn of a fresh model that is far from a uniform guess: its initialisation was lost (T13)."""
        uniform = math.log(self._plan.model.vocabulary)
        if record.eval_loss is None or abs(record.eval_loss - uniform) > 1:
            self.event("odd_first_loss", loss=record.eval_loss, uniform=uniform)
            self.screen.say(
                f"WARNING: the untrained model's loss is {record.eval_loss}, a uniform guess has {uniform:.3f}: "
                "its initialisation is not what it should be"
            )

    def summarise(self, status: str) -> None:
        """Write summary.json and say how it went; `status` is `done` or `diverged`."""
        if not self._steps:
            return
        plan, last = self._plan, self._steps[-1]
        first_eval, last_eval = (self._evaluations[0], self._evaluations[-1]) if self._evaluations else (None, None)
        summary = {
            "status": status,
            "run_id": plan.run_id,
            "model": plan.model.name,
            "parameters": plan.model.parameters,
            "zero": plan.zero,
            "precision": plan.precision,
            "world_size": plan.topology.world_size,
            "seed": plan.seed,
            "steps": last.step,
            "tokens": last.tokens,
            "loss": last.loss,
            "eval_loss_first": first_eval and first_eval.eval_loss,
            "eval_loss": last_eval and last_eval.eval_loss,
            "perplexity_first": first_eval and first_eval.perplexity,
            "perplexity": last_eval and last_eval.perplexity,
            "skipped_steps": last.skipped_steps,
            "loss_scale": last.loss_scale,
            "tokens_per_second": derive.median_of_steady([one.tokens_per_second for one in self._steps]),
            "step_seconds": derive.median_of_steady([one.step_seconds for one in self._steps]),
            "mfu": derive.median_of_steady([one.mfu for one in self._steps if one.mfu is not None]),
            "peak_memory_bytes": max(one.peak_memory_bytes for one in self._steps),
            "wall_seconds": time.time() - self._started,
            "attempts": int(self._where.attempt.name),
            "repairs": self._repairs,
            "warnings": plan.warnings,
        }
        write_json(self._where.summary, summary)
        self.event(status, step=last.step)
        if last_eval and first_eval and last_eval.perplexity and first_eval.perplexity:
            self.screen.say(
                f"{status}: validation perplexity {first_eval.perplexity:,.1f} -> {last_eval.perplexity:,.1f} in "
                f"{summary['wall_seconds']:.0f} s; {self._where.summary}"
            )
        else:
            self.screen.say(f"{status} in {summary['wall_seconds']:.0f} s; {self._where.summary}")
