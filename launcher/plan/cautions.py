"""What a Plan should be warned of: legal, and perhaps not what was meant."""

from collections.abc import Mapping

from halfstep.launcher.config import precisions
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.corpus.description import DataFacts
from halfstep.launcher.plan.batch import Batch
from halfstep.launcher.plan.data_plan import DataPlan, Division, lost_targets
from halfstep.launcher.plan.ds import effects
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.schedule import Schedule
from halfstep.models.presets import PRESETS

_GIB = 2**30


def warnings_of(spec: RunSpec, batch: Batch, data: DataPlan, curve: Schedule, sequence: int) -> list[str]:
    """Return the warnings, each a sentence or two."""
    said = []
    steps = curve.steps
    preset = PRESETS.get(spec.model.name)
    if preset is not None and preset.rope_theta is None and sequence > preset.context:
        said.append(
            f"sequence={sequence} is longer than {spec.model.name}'s {preset.context} positions: "
            "the model gets more of them"
        )
    if curve.warmup >= steps > 1:
        said.append(f"schedule.warmup={curve.warmup} is as long as the run: the learning rate only rises")
    if spec.zero == 0 and precisions.of(spec.precision).half_weights and not spec.numerics.repairs:
        fault = (
            "never scales the loss and starts Adam one step late"
            if spec.precision == "fp16"
            else "starts Adam one step late"
        )
        said.append(
            f"DO NOT TRUST numerics.repairs=false with zero=0 precision={spec.precision}: DeepSpeed 0.19.8 {fault} at "
            "stage 0, so this run does not train the same model as stages 1 to 3."
        )
    if not data.known:
        return said
    for corpus, epochs in zip(data.corpora, data.epochs(batch.global_ * steps), strict=True):
        if epochs > 1:
            said.append(f"the run reads {corpus.path if data.parts else 'the corpus'} {epochs:.1f} times over")
    idle = {"packing=false": not spec.packing, f"too_long={spec.too_long}": spec.too_long != "refuse"}
    said += [
        f"{key} does nothing: the data is no examples" for key, given in idle.items() if given and not data.has_examples
    ]
    if not data.validation_windows:
        said.append("the corpus has no validation split: no evaluation")
    return said


def of_beginnings(
    spec: RunSpec, weights: str | None, data: DataFacts | None, how: Division, peak: float | None
) -> list[str]:
    """Return what to say of trained weights that a run begins with, of documents that begin nowhere, of cut examples.

    `peak` is the learning rate where its default is taken, else None.
    """
    said = []
    if weights is not None and spec.train == "full" and peak is not None:
        said.append(
            f"optimizer.lr={peak:g}, the default by model size, is one to train from scratch with; it moves trained "
            "weights far: fine-tuning mostly takes 1e-5 to 5e-5"
        )
    for corpus in [part.corpus for part in data.parts] or [data] if data else ():
        if lost := lost_targets(corpus, how):
            said.append(
                f"too_long=cut leaves {lost:,} examples of {corpus.path} without a target, which stands behind "
                f"{how.sequence} tokens: nothing is learnt from them"
            )
        if spec.documents == "masked" and corpus.train_lengths is None and corpus.train_documents in (0, 1):
            said.append(f"documents=masked keeps nothing apart in {corpus.path}: its index knows no second document")
    return said


def without_effect(setting: effects.Setting, origins: Mapping[str, str]) -> list[str]:
    """Return what to say of DeepSpeed keys that somebody set and that do nothing in this run, once for a table."""
    idle = {
        effects.row_path(effect.path): f"from {origin} does nothing in this run: {effect.because}"
        for effect, origin, in_a_file in effects.said(setting, origins)
        if effect.kind == effects.INERT and effect.because and (in_a_file or not effect.always)
    }
    return [f"{path} {said}" for path, said in idle.items()]


def memory_warning(plan: Plan, capacity_bytes: int | None) -> str | None:
    """Return what a run that starts all the same says where its ranks may not have the memory; None where they do."""
    memory = plan.memory
    if capacity_bytes is None or "outside_bytes" not in memory:  # a plan that an older version wrote
        return None
    if memory["predicted_high_bytes"] + memory["outside_bytes"] <= capacity_bytes:
        return None
    least = memory["predicted_low_bytes"] + memory["outside_bytes"]
    risk = "does not fit" if least > capacity_bytes else "may not fit"
    need = "may need up to" if memory.get("peak_is_bound") else "is predicted to need"
    return (
        f"this run {risk}: a rank {need} {memory['predicted_peak_bytes'] / _GIB:.2f} GiB and has "
        f"{capacity_bytes / _GIB:.2f}; `halfstep plan` shows why and what to change"
    )
