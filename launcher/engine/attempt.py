"""One attempt at a run: build, go on from a checkpoint, train, and write down how it went."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from deepspeed.runtime.engine import DeepSpeedEngine

from halfstep.launcher import fault_injection
from halfstep.launcher.engine import loop, readings
from halfstep.launcher.engine.build import build
from halfstep.launcher.engine.causal_check import refuse_foresight
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.engine.loop import Listeners, Outside
from halfstep.launcher.engine.numerics.guard import Guard
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.ranks.stragglers import Pace
from halfstep.launcher.engine.recorder import Recorder
from halfstep.launcher.engine.state import restoring, rng, training_state
from halfstep.launcher.engine.state.restoring import Choice
from halfstep.launcher.engine.state.saving import Saver
from halfstep.launcher.errors import NumericsError, Stopped
from halfstep.launcher.plan import cautions, present
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.run_directory import RunDir
from halfstep.launcher.topology import Rank
from halfstep.launcher.watchdog.heartbeat import Heart
from halfstep.launcher.watchdog.stop import Stop
from halfstep.models.network import initial_statistics


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Everything that one rank of an attempt begins with."""

    where: RunDir
    plan: Plan
    rank: Rank
    choice: Choice
    stop: Stop
    heart: Heart

    def asked(self) -> str | None:
        """Return why this rank was asked to stop, if it was; rank 0 looks for the file STOP without delay."""
        if self.rank.rank == 0 and self.stop.asked is None and self.where.stop_file.exists():
            self.stop.ask("the file STOP")
        return self.stop.asked


def make(attempt: Attempt) -> None:
    """Build, restore and train; raises what ended it early. Every rank of the run calls this."""
    where, plan, rank = attempt.where, attempt.plan, attempt.rank.rank
    distributed.quiet_deepspeed(where.rank_log(rank))
    engine: DeepSpeedEngine | None = None
    with Recorder(where, plan, writes=rank == 0, steps_done=attempt.choice.step) as witness:
        try:
            _say_what_is_coming(witness, attempt)
            _stop_if_asked(attempt, "before the model was built")
            engine, guard, saver = _assemble(attempt, witness)
            _train(attempt, witness, engine, guard, saver)
        except (NumericsError, Stopped) as error:  # every rank raises it after the same step
            finite = None if engine is None else all(distributed.gather_objects(_weights_are_finite(engine)))
            witness.event("stopped", reason=error.what, where=error.where, weights_finite=finite)
            peak = max(distributed.gather_objects(readings.host_peak_bytes()))
            if rank == 0:
                witness.summarise("diverged" if isinstance(error, NumericsError) else "stopped", peak)
                with contextlib.suppress(OSError):
                    where.stop_file.unlink(missing_ok=True)  # it has been done; the next start is meant to go on
            distributed.gather_objects(None)  # a launcher ends everybody when one rank fails: let rank 0 write first
            raise
        peak = max(distributed.gather_objects(readings.host_peak_bytes()))
        if rank == 0:
            witness.summarise("done", peak)
            with contextlib.suppress(OSError):
                where.stop_file.unlink(missing_ok=True)  # it came too late to stop anything


def _stop_if_asked(attempt: Attempt, when: str) -> None:
    reasons = [reason for reason in distributed.gather_objects(attempt.asked()) if reason]
    if reasons:
        state = f"the newest checkpoint is of step {attempt.choice.step}" if attempt.choice.step else "nothing is lost"
        raise Stopped(f"{reasons[0]}, {when}", where=state, fix="start the same command again to go on")


def _assemble(attempt: Attempt, witness: Recorder) -> tuple[DeepSpeedEngine, Guard, Saver | None]:
    """Build the engine and fill it from the checkpoint, if there is one."""
    plan, rank, choice, heart = attempt.plan, attempt.rank.rank, attempt.choice, attempt.heart
    heart.mark("build")
    fault_injection.hit("init", rank=rank)
    heart.mark("build")
    engine, repairs = build(plan)
    distributed.set_timeouts(max(plan.watch.startup, plan.watch.timeout))
    rng.seed(plan, rank, 0)
    witness.event(
        "built",
        optimizer=type(engine.optimizer).__name__,
        compiled=engine.is_compiled,
        activation_checkpointing=engine.module.is_activation_checkpointing,
    )
    witness.repaired(repairs.active)
    guard = Guard(engine, plan, repairs, witness.event, rank)
    _stop_if_asked(attempt, "before the first step")
    saver = Saver(
        engine,
        plan,
        attempt.where,
        guard,
        event=witness.event,
        sync_records=witness.sync,
        beat=heart.touch,
        mark=lambda step: heart.mark("save", step),
        damaged=frozenset(one.step for one in choice.damaged),
        last_step=choice.step,
    )
    if choice.checkpoint is not None:
        heart.mark("load", choice.step)
        witness.resumed(restoring.restore(engine, plan, choice, guard, rank, heart))
    else:
        drawn = initial_statistics(engine.module) if plan.model.weights is None else None
        witness.event("initialised", mean_and_std=drawn, checksum=_checksum(engine, plan))
    heart.mark("build")
    witness.event("causal", **refuse_foresight(engine, plan))
    return engine, guard, saver if plan.can_save else None


def _train(attempt: Attempt, witness: Recorder, engine: DeepSpeedEngine, guard: Guard, saver: Saver | None) -> None:
    plan, rank, done = attempt.plan, attempt.rank, attempt.choice.step
    evaluated = all(distributed.gather_objects(witness.evaluated(done)))
    witness.event("training", first_step=done + 1)
    outside = Outside(mark=_mark_of(attempt), asked=attempt.asked, saver=saver, pace=Pace(engine, plan))
    tell = Listeners(step=witness.step, evaluation=witness.evaluation, event=witness.event, traffic=witness.traffic)
    feed = Feed(plan, rank, distributed.device(rank, plan))
    loop.train(engine, plan, feed, tell, guard, outside, done=done, evaluated=evaluated)


def _mark_of(attempt: Attempt) -> Callable[[str, int], None]:
    """Return how the loop marks its progress; from the second step on, when all is compiled, `watch.timeout` counts."""
    heart, watch, first = attempt.heart, attempt.plan.watch, attempt.choice.step + 1
    starting = True

    def mark(phase: str, step: int) -> None:
        nonlocal starting
        if starting and step > first:
            starting = False
            heart.set_timeout(watch.timeout)
            distributed.set_timeouts(watch.timeout)
        heart.mark(phase, step)

    return mark


def _say_what_is_coming(witness: Recorder, attempt: Attempt) -> None:
    plan, choice = attempt.plan, attempt.choice
    for line in [*present.headline(plan), f"run directory {attempt.where.path}", *present.warnings(plan)]:
        witness.say(line)
    if risk := cautions.memory_warning(plan, readings.capacity_bytes(plan)):
        witness.say(f"WARNING: {risk}")
    if choice.step:
        witness.take_over()
    for one in choice.damaged:
        witness.event("checkpoint_damaged", folder=one.folder.name, reason=one.reason)
        witness.say(f"WARNING: checkpoint {one.folder.name} is damaged and passed over: {one.reason}")
    if fault := fault_injection.set_here():
        witness.event("fault_set", fault=fault)
        witness.say(f"WARNING: {fault_injection.VARIABLE}={fault}: this run is being broken on purpose")


def _checksum(engine: DeepSpeedEngine, plan: Plan) -> str | None:
    """Return a checksum of the initial masters, equal at all stages and world sizes; None where they lie on NVMe."""
    if not plan.can_save:
        return None
    return f"{sum(distributed.gather_objects(training_state.checksum(engine))) % 2**64:016x}"


def _weights_are_finite(engine: DeepSpeedEngine) -> bool:
    # At stage 3 a rank holds its part of a parameter beside it.
    return all(bool(getattr(one, "ds_tensor", one).isfinite().all()) for one in engine.module.parameters())
