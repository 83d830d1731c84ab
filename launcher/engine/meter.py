"""One optimizer step measured: how long it took and waited, who was slow, what was sent, and the record of it all."""

import contextlib
import time
from collections.abc import Iterator

from halfstep.launcher.engine.ranks.stragglers import Pace, Stragglers
from halfstep.launcher.engine.ranks.traffic import Traffic
from halfstep.launcher.engine.readings import StepReading
from halfstep.launcher.engine.training import Training
from halfstep.launcher.metrics import derive
from halfstep.launcher.rundir.metric_rows import StepRecord
from halfstep.launcher.system import clock

_COUNTED = 5
"""The step whose traffic is counted: its time is not averaged yet (metrics/derive.py), and by then stage 3 has learnt
the order of modules (engine/build.py)."""


class StepMeter:
    """A rank's clock for one step after another: `start`, the step within `traffic`, `stop`, `record`."""

    def __init__(self, run: Training) -> None:
        self._run, self._plan = run, run.plan
        self._pace = Pace(run.engine, run.plan)
        self._stragglers = Stragglers(run.plan.topology.world_size, run.plan.watch.slow)
        self._counted = min(run.done + _COUNTED, run.plan.steps)
        self._step, self._started, self._seconds = 0, 0.0, 0.0
        self.waited = 0.0
        """Seconds that this rank has waited for data in this step."""

    def start(self, step: int, rate: float, loss_scale: float | None, targets: float) -> None:
        """Begin a step with what is decided about it before."""
        self._step, self._rate, self._loss_scale, self._targets = step, rate, loss_scale, round(targets)
        self._started, self.waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def traffic(self) -> Iterator[None]:
        """Surround what the ranks send in a step; one step's is counted and told."""
        if self._step != self._counted or self._plan.compile:  # a compiler does not see through what counts
            yield
            return
        with Traffic() as sent:
            yield
        self._run.on_traffic(sent.bytes, sent.collectives)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Surround a wait for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Surround what is this rank's own work, without waiting for others."""
        return self._pace.forward()

    def computed(self) -> float:
        """Return how long this rank has computed in this step; 0 where that is not known."""
        return self._pace.seconds()

    def stop(self) -> None:
        """Note that the step is done on all ranks."""
        self._seconds = time.perf_counter() - self._started

    def record(self, reading: StepReading, *, skipped: bool, skipped_steps: int) -> StepRecord:
        """Tell the record of the step, and who is slow, and return the record."""
        plan, tokens = self._plan, self._plan.batch.global_ * self._plan.sequence
        throughput = derive.tokens_per_second(tokens, self._seconds)
        record = StepRecord(
            step=self._step,
            tokens=self._step * tokens,
            targets=self._targets,
            loss=derive.finite(reading.loss),
            router_loss=derive.finite(reading.router_loss),
            lr=self._rate,
            grad_norm=derive.finite(reading.grad_norm),
            loss_scale=self._loss_scale,
            overflow=skipped,
            skipped_steps=skipped_steps,
            step_seconds=self._seconds,
            data_seconds=reading.data_seconds,
            tokens_per_second=throughput,
            mfu=derive.mfu(throughput, plan.model.flops_per_token, plan.peak_flops, plan.topology.world_size),
            peak_memory_bytes=reading.peak_memory_bytes,
            time=clock.now(),
        )
        self._run.on_step(record)
        if slow := self._stragglers.see(self._step, reading.compute_seconds):
            self._run.on_event("slow_rank", step=self._step, **slow)
        return record
