"""Rank 0's pen: every record goes to metrics.jsonl, the screen and the summary; the other ranks keep silent."""

import json
import math
import os
from types import TracebackType
from typing import Any, Self

from halfstep.launcher.metrics import derive
from halfstep.launcher.metrics.record import EvaluationRecord, StepRecord, of_row
from halfstep.launcher.metrics.sinks import JsonLines, Screen
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import goodput
from halfstep.launcher.rundir.json_lines import parse
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.system import clock
from halfstep.launcher.system.files import write_json


class Witness:
    """Writes what a run does and, at the end, what came of it."""

    def __init__(self, where: RunDir, plan: Plan, *, writes: bool, steps_done: int = 0) -> None:
        self._where, self._plan, self._writes, self._steps_done = where, plan, writes, steps_done
        self.screen = Screen(plan.steps, plan.log_every, quiet=not writes)
        self._steps: list[StepRecord] = []
        self._evaluations: list[EvaluationRecord] = []
        self._repairs: list[str] = []
        self._sent: int | None = None

    def __enter__(self) -> Self:
        self.screen.__enter__()
        if self._writes:
            self._metrics, self._events = JsonLines(self._where.metrics), JsonLines(self._where.events)
            attempt, run_id = self._where.attempt.name, self._plan.run_id
            self.event("start", attempt=attempt, run_id=run_id, steps_done=self._steps_done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.screen.__exit__(kind, error, trace)
        if self._writes:
            self._metrics.close()
            self._events.close()

    def take_over(self) -> None:
        """Read what earlier attempts wrote about the steps that stand, so that the summary is of the whole run."""
        for row in parse(self._where.metrics, of_row) if self._where.metrics.exists() else []:
            if isinstance(row, StepRecord):
                self._steps.append(row)
            else:
                self._evaluations.append(row)

    def evaluated(self, step: int) -> bool:
        """Tell whether a step's evaluation has been written; True on ranks that do not write."""
        return not self._writes or any(one.step == step for one in self._evaluations)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        if self._writes:
            self._metrics.sync()
            self._events.sync()

    def event(self, kind: str, **details: Any) -> None:
        """Write an event."""
        if self._writes:
            self._events.event(kind, **details)

    def traffic(self, sent: int, collectives: int) -> None:
        """Take down what one optimizer step sent."""
        self._sent = sent
        self.event("sent", bytes=sent, collectives=collectives)

    def repaired(self, names: tuple[str, ...]) -> None:
        """Take down what was mended in DeepSpeed."""
        if names:
            self._repairs = list(names)
            self.event("repaired", repairs=self._repairs)
            self.screen.say(f"mended in DeepSpeed at stage 0: {', '.join(names)} (docs/deepspeed.md)")

    def resumed(self, found: dict[str, Any]) -> None:
        """Take down what the run goes on from."""
        self.event("resumed", **found)
        self.screen.say(f"goes on after step {found['step']}, from {found['folder']}")
        before = found["from"]
        now = {"world_size": self._plan.topology.world_size, "zero": self._plan.zero, "precision": self._plan.precision}
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            differ = f"the logits differ by {found['logits_differ_by']:.2g}"
            self.screen.say(f"reshaped: {', '.join(changed)}; {differ}; random states {found['random_states']}")
        elif found["logits_differ_by"] and not found["other_versions"]:
            told = f"this machine computes other logits from it, by {found['logits_differ_by']:.2g}"
            self.screen.say(f"WARNING: {told}: the numbers will part from those of an undisturbed run")
        if found["other_versions"]:
            told = ", ".join(f"{name} {versions}" for name, versions in found["other_versions"].items())
            self.screen.say(f"WARNING: saved with other versions, so the numbers may part: {told}")

    def step(self, record: StepRecord) -> None:
        """Take down one optimizer step."""
        if not self._writes:
            return
        self._metrics.write(record)
        self.screen.step(record)
        self._steps.append(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Take down one evaluation."""
        if not self._writes:
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

    def _all_reduce(self) -> dict[str, float]:
        """Return what the ranks' messages took when this attempt began; empty for one rank alone."""
        try:
            return json.loads((self._where.attempt / "preflight.json").read_text("utf-8")).get("all_reduce", {})
        except (OSError, ValueError):
            return {}

    def summarise(self, status: str, peak_host_bytes: int) -> None:
        """Write summary.json and say how it went; `status` is `done`, `diverged` or `stopped`."""
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
            "predicted_step_seconds": plan.time.get("step_seconds"),
            "step_seconds": derive.median_of_steady([one.step_seconds for one in self._steps]),
            "mfu": derive.median_of_steady([one.mfu for one in self._steps if one.mfu is not None]),
            "predicted_peak_bytes": plan.memory.get("predicted_peak_bytes"),
            "peak_memory_bytes": max(one.peak_memory_bytes for one in self._steps),
            "peak_host_bytes": peak_host_bytes,
            "predicted_communication_bytes": plan.time.get("communication_bytes_per_rank"),
            "communication_bytes": self._sent,
            "all_reduce": self._all_reduce(),
            **goodput.of(self._where.path, now=clock.now()).to_dict(),
            "attempts": int(self._where.attempt.name),
            "load_average": os.getloadavg(),
            "repairs": self._repairs,
            "warnings": plan.warnings,
        }
        write_json(self._where.summary, summary)
        if status != "stopped":  # which is an event of its own, with its reason
            self.event(status, step=last.step)
        if last_eval and first_eval and last_eval.perplexity and first_eval.perplexity:
            self.screen.say(
                f"{status}: validation perplexity {first_eval.perplexity:,.1f} -> {last_eval.perplexity:,.1f} in "
                f"{summary['wall_seconds']:.0f} s; {self._where.summary}"
            )
        else:
            self.screen.say(f"{status} in {summary['wall_seconds']:.0f} s; {self._where.summary}")
