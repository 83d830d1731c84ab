"""Rank 0's records: every step, evaluation and event goes to the sinks, and the summary to the run directory."""

import contextlib
import json
import math
import os
from types import TracebackType
from typing import Any, Self

from halfstep.launcher.metrics import derive, sinks
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import goodput, records
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system import clock


class Recorder:
    """Records what a run does and, at the end, what came of it; on ranks that do not write it does nothing."""

    def __init__(
        self, where: RunDir, plan: Plan, *, writes: bool, steps_done: int = 0, proof: records.Proof | None = None
    ) -> None:
        self._where, self._plan, self._writes, self._steps_done = where, plan, writes, steps_done
        self._proof = proof
        self._sinks: list[sinks.Sink] = []
        self._open = contextlib.ExitStack()
        self._steps: list[StepRecord] = []
        self._evaluations: list[EvaluationRecord] = []
        self._repairs: list[str] = []
        self._sent: int | None = None

    def __enter__(self) -> Self:
        if self._writes:
            self._sinks = sinks.of_run(self._where, steps=self._plan.steps, every=self._plan.log_every)
            for sink in self._sinks:
                self._open.callback(sink.close)
        attempt, run_id = self._where.attempt.name, self._plan.run_id
        self.event("start", attempt=attempt, run_id=run_id, steps_done=self._steps_done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def take_over(self) -> None:
        """Read what earlier attempts wrote about the steps that stand, so that the summary is of the whole run."""
        run = Run(self._where.path)
        self._steps += run.steps()
        self._evaluations += run.evaluations()

    def evaluated(self, step: int) -> bool:
        """Tell whether a step's evaluation has been written; True on ranks that do not write."""
        return not self._writes or any(record.step == step for record in self._evaluations)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        for sink in self._sinks:
            sink.sync()

    def say(self, text: str) -> None:
        """Say a sentence to people."""
        for sink in self._sinks:
            sink.say(text)

    def event(self, kind: str, **details: Any) -> None:
        """Record an event."""
        row = {"event": kind, **details, "time": clock.now()}
        for sink in self._sinks:
            sink.event(row)

    def traffic(self, sent: int, collectives: int) -> None:
        """Record what an optimizer step sent."""
        self._sent = sent
        self.event("sent", bytes=sent, collectives=collectives)

    def repaired(self, names: tuple[str, ...]) -> None:
        """Record what was repaired in DeepSpeed."""
        if names:
            self._repairs = list(names)
            self.event("repaired", repairs=self._repairs)
            self.say(f"repaired in DeepSpeed at stage 0: {', '.join(names)} (docs/deepspeed.md)")

    def resumed(self, restored: dict[str, Any]) -> None:
        """Record which checkpoint the run resumes from."""
        self.event("resumed", **restored)
        self.say(f"resumes after step {restored['step']}, from {restored['folder']}")
        before = restored["from"]
        now = {"world_size": self._plan.topology.world_size, "zero": self._plan.zero, "precision": self._plan.precision}
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            differ = f"the logits differ by {restored['logits_differ_by']:.2g}"
            self.say(f"reshaped: {', '.join(changed)}; {differ}; random states {restored['random_states']}")
        elif restored["logits_differ_by"] and not restored["other_versions"]:
            differ = f"this machine computes other logits from it, by {restored['logits_differ_by']:.2g}"
            self.say(f"WARNING: {differ}: the numbers will part from those of an undisturbed run")
        if restored["other_versions"]:
            versions = ", ".join(f"{name} {versions}" for name, versions in restored["other_versions"].items())
            self.say(f"WARNING: saved with other versions, so the numbers may part: {versions}")

    def step(self, record: StepRecord) -> None:
        """Record an optimizer step."""
        for sink in self._sinks:
            sink.record(record)
        if self._writes:
            self._steps.append(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation."""
        for sink in self._sinks:
            sink.record(record)
        if self._writes:
            self._evaluations.append(record)
            if record.step == 0 and self._plan.model.weights is None and self._plan.data.validation_windows:
                self._check_first_loss(record)

    def _check_first_loss(self, record: EvaluationRecord) -> None:
        """Warn of a fresh model that is far from a uniform guess: its initialisation was lost (T13)."""
        uniform = math.log(self._plan.model.vocabulary)
        if record.eval_loss is None or abs(record.eval_loss - uniform) > 1:
            self.event("odd_first_loss", loss=record.eval_loss, uniform=uniform)
            self.say(
                f"WARNING: the untrained model's loss is {record.eval_loss}, a uniform guess has {uniform:.3f}: "
                "its initialisation is not what it should be"
            )

    def _all_reduce(self) -> dict[str, float]:
        """Return what the ranks' messages took when this attempt began; empty for one rank alone."""
        try:
            return json.loads((self._where.attempt / "preflight.json").read_text("utf-8")).get("all_reduce", {})
        except (OSError, ValueError):
            return {}

    def _proved(self) -> dict[str, Any]:
        """Return whether the run's cell is proved, as its study was told or, of a run by itself, as it began."""
        with contextlib.suppress(records.Damaged):
            self._proof = Run(self._where.path).proof or self._proof
        proof = self._proof or records.Proof(reason="the parity gate was not asked")
        return {"proved": proof.proved, "unproved_because": proof.reason}

    def summarise(self, status: str, peak_memory_bytes: int, peak_host_bytes: int) -> None:
        """Record the result and say how it went; `status` is `done`, `diverged` or `stopped`.

        The peaks are those of this attempt up to now: an evaluation or a checkpoint may need more than any step did.
        """
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
            **({"eval_loss_by_part": last_eval.eval_loss_by_part} if last_eval and last_eval.eval_loss_by_part else {}),
            **({"tasks": last_eval.tasks} if last_eval and last_eval.tasks else {}),
            "perplexity_first": first_eval and first_eval.perplexity,
            "perplexity": last_eval and last_eval.perplexity,
            "skipped_steps": last.skipped_steps,
            "loss_scale": last.loss_scale,
            "tokens_per_second": derive.median_of_steady([record.tokens_per_second for record in self._steps]),
            "predicted_step_seconds": plan.time.get("step_seconds"),
            "step_seconds": derive.median_of_steady([record.step_seconds for record in self._steps]),
            "mfu": derive.median_of_steady([record.mfu for record in self._steps if record.mfu is not None]),
            "predicted_peak_bytes": plan.memory.get("predicted_peak_bytes"),
            "peak_memory_bytes": max(peak_memory_bytes, *(record.peak_memory_bytes for record in self._steps)),
            "peak_host_bytes": peak_host_bytes,
            "predicted_communication_bytes": plan.time.get("communication_bytes_per_rank"),
            "communication_bytes": self._sent,
            "all_reduce": self._all_reduce(),
            **goodput.of(self._where.path, now=clock.now()).to_dict(),
            "attempts": int(self._where.attempt.name),
            "load_average": os.getloadavg(),
            "repairs": self._repairs,
            **self._proved(),
            "warnings": plan.warnings,
        }
        for sink in self._sinks:
            sink.summary(summary)
        if status != "stopped":  # which is an event of its own, with its reason
            self.event(status, step=last.step)
        if last_eval and first_eval and last_eval.perplexity and first_eval.perplexity:
            self.say(
                f"{status}: validation perplexity {first_eval.perplexity:,.1f} -> {last_eval.perplexity:,.1f} in "
                f"{summary['wall_seconds']:.0f} s; {self._where.summary}"
            )
        else:
            self.say(f"{status} in {summary['wall_seconds']:.0f} s; {self._where.summary}")
