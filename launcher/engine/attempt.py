"""One attempt at a run: build, restore from a checkpoint, and write down how it went."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from halfstep.launcher import fault_injection
from halfstep.launcher.engine import readings
from halfstep.launcher.engine.build import build, is_compiled
from halfstep.launcher.engine.causal_check import refuse_crossing, refuse_foresight
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.recorder import Recorder
from halfstep.launcher.engine.state import restoring, rng, training_state
from halfstep.launcher.engine.state.restoring import Choice
from halfstep.launcher.engine.state.saving import Saver
from halfstep.launcher.engine.task_evaluation import Judges
from halfstep.launcher.engine.training import Training
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import NumericsError, Stopped
from halfstep.launcher.plan import cautions, present
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.records import Proof
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.topology import Rank
from halfstep.launcher.watchdog.heartbeat import Heartbeat
from halfstep.launcher.watchdog.stop import Stop
from halfstep.models.loss import implementation
from halfstep.models.network import initial_statistics


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Everything that one rank of an attempt begins with."""

    where: RunDir
    plan: Plan
    rank: Rank
    choice: Choice
    stop: Stop
    heartbeat: Heartbeat
    proof: Proof | None = None
    """What the parity gate knew of the run as it began; rank 0's."""

    def stop_reason(self) -> str | None:
        """Return why this rank was asked to stop, if it was; rank 0 looks for the file STOP without delay."""
        if self.rank.rank == 0 and self.stop.asked is None and self.where.stop_file.exists():
            self.stop.ask("the file STOP")
        return self.stop.asked


@contextlib.contextmanager
def prepared(attempt: Attempt) -> Iterator[Training]:
    """Build and restore what is to be trained, and write down how the training within ended. Every rank calls this."""
    where, plan, rank = attempt.where, attempt.plan, attempt.rank.rank
    distributed.quiet_deepspeed(where.rank_log(rank))
    training: Training | None = None
    steps_done = attempt.choice.step
    with Recorder(where, plan, writes=rank == 0, steps_done=steps_done, proof=attempt.proof) as recorder:
        try:
            _say_what_is_coming(recorder, attempt)
            _stop_if_asked(attempt, "before the model was built")
            training = _assemble(attempt, recorder)
            yield training
        except (NumericsError, Stopped) as error:  # every rank raises it after the same step
            finite = None if training is None else all(distributed.gather_objects(_weights_are_finite(training.engine)))
            recorder.event("stopped", reason=error.what, where=error.where, weights_finite=finite)
            _summarise(attempt, recorder, "diverged" if isinstance(error, NumericsError) else "stopped")
            distributed.gather_objects(None)  # a launcher ends everybody when one rank fails: let rank 0 write first
            raise
        _summarise(attempt, recorder, "done")


def _summarise(attempt: Attempt, recorder: Recorder, status: str) -> None:
    """Write the summary; a stop that was asked for has been obeyed, or came too late: the next start resumes."""
    kind = attempt.plan.topology.accelerator
    peaks = distributed.gather_objects((readings.peak_memory_bytes(kind), readings.host_peak_bytes()))
    if attempt.rank.rank == 0:
        recorder.summarise(status, *map(max, zip(*peaks, strict=True)))
        with contextlib.suppress(OSError):
            attempt.where.stop_file.unlink(missing_ok=True)


def _stop_if_asked(attempt: Attempt, when: str) -> None:
    reasons = [reason for reason in distributed.gather_objects(attempt.stop_reason()) if reason]
    if reasons:
        state = f"the newest checkpoint is of step {attempt.choice.step}" if attempt.choice.step else "nothing is lost"
        raise Stopped(f"{reasons[0]}, {when}", where=state, fix="start the same command again to resume")


def _assemble(attempt: Attempt, recorder: Recorder) -> Training:
    """Build the engine and fill it from the checkpoint, if there is one."""
    plan, rank, choice, heartbeat = attempt.plan, attempt.rank.rank, attempt.choice, attempt.heartbeat
    heartbeat.mark("build")
    fault_injection.hit("init", rank=rank)
    heartbeat.mark("build")
    engine, repairs = build(plan)
    distributed.set_timeouts(max(plan.watch.startup, plan.watch.timeout))
    rng.seed(plan, rank, 0)
    recorder.event(
        "built",
        optimizer=type(engine.optimizer).__name__,
        compiled=is_compiled(engine),
        activation_checkpointing=engine.module.is_activation_checkpointing,
        loss=implementation(distributed.device(attempt.rank, plan)),
    )
    recorder.repaired(repairs.active)
    guard = Guard(engine, plan, repairs, recorder.event, rank)
    _stop_if_asked(attempt, "before the first step")
    saver = Saver(
        engine,
        plan,
        attempt.where,
        guard,
        event=recorder.event,
        sync_records=recorder.sync,
        beat=heartbeat.touch,
        mark=lambda step: heartbeat.mark("save", step),
        damaged=frozenset(candidate.step for candidate in choice.damaged),
        last_step=choice.step,
    )
    if choice.checkpoint is not None:
        heartbeat.mark("load", choice.step)
        recorder.resumed(restoring.restore(engine, plan, choice, guard, rank, heartbeat))
    else:
        drawn = initial_statistics(engine.module) if plan.model.weights is None else None
        recorder.event("initialised", mean_and_std=drawn, checksum=_checksum(engine, plan))
    heartbeat.mark("build")
    recorder.event("causal", **refuse_foresight(engine, plan))
    if plan.documents_apart:
        recorder.event("documents_apart", **refuse_crossing(engine, plan))
    judges = Judges(engine, plan, rank) if plan.tasks else None
    evaluated = all(distributed.gather_objects(recorder.evaluated(choice.step)))
    recorder.event("training", first_step=choice.step + 1)
    return Training(
        engine=engine,
        plan=plan,
        feed=Feed(plan, attempt.rank, distributed.device(attempt.rank, plan)),
        guard=guard,
        saver=saver if plan.can_save else None,
        judges=judges,
        done=choice.step,
        evaluated=evaluated,
        on_step=recorder.step,
        on_evaluation=recorder.evaluation,
        on_event=recorder.event,
        on_traffic=recorder.traffic,
        mark=_mark_of(attempt),
        stop_reason=attempt.stop_reason,
    )


def _mark_of(attempt: Attempt) -> Callable[[str, int], None]:
    """Return how the loop marks its progress; from the second step on, when all is compiled, `watch.timeout` counts."""
    heartbeat, watch, first = attempt.heartbeat, attempt.plan.watch, attempt.choice.step + 1
    starting = True

    def mark(phase: str, step: int) -> None:
        nonlocal starting
        if starting and step > first:
            starting = False
            heartbeat.set_timeout(watch.timeout)
            distributed.set_timeouts(watch.timeout)
        heartbeat.mark(phase, step)

    return mark


def _say_what_is_coming(recorder: Recorder, attempt: Attempt) -> None:
    plan, choice = attempt.plan, attempt.choice
    for line in [*present.headline(plan), f"run directory {attempt.where.path}", *present.warnings(plan)]:
        recorder.say(line)
    if risk := cautions.memory_warning(plan, readings.capacity_bytes(plan)):
        recorder.say(f"WARNING: {risk}")
    for corpus in plan.data.corpora:
        if corpus.examples is not None:
            recorder.event("examples", path=corpus.path, **dataclasses.asdict(corpus.examples))
    for line in present.examples(plan.data):
        recorder.say(f"examples: {line}")
    if choice.step:
        recorder.take_over()
    for candidate in choice.damaged:
        recorder.event("checkpoint_damaged", folder=candidate.folder.name, reason=candidate.reason)
        recorder.say(f"WARNING: checkpoint {candidate.folder.name} is damaged and passed over: {candidate.reason}")
    if fault := fault_injection.set_here():
        recorder.event("fault_set", fault=fault)
        recorder.say(f"WARNING: {fault_injection.VARIABLE}={fault}: this run is being broken on purpose")


def _checksum(engine: Engine, plan: Plan) -> str | None:
    """Return a checksum of the initial masters, equal at all stages and world sizes; None where they lie on NVMe."""
    if not plan.can_save:
        return None
    return f"{sum(distributed.gather_objects(training_state.checksum(engine))) % 2**64:016x}"


def _weights_are_finite(engine: Engine) -> bool:
    # At stage 3 a rank holds its part of a parameter beside it.
    return all(
        bool(getattr(parameter, "ds_tensor", parameter).isfinite().all()) for parameter in engine.module.parameters()
    )
