"""What a Plan should be warned of: legal, and perhaps not what was meant."""

from launcher.plan.batch import Batch
from launcher.plan.plan import DataPlan
from launcher.plan.schedule import Schedule
from launcher.spec.schema import RunSpec
from models.presets import PRESETS


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
    if spec.zero == 0 and spec.precision != "fp32" and not spec.numerics.repairs:
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
    if batch.global_ * steps > data.train_windows:
        epochs = batch.global_ * steps / data.train_windows
        said.append(f"the run reads the corpus {epochs:.1f} times over")
    if data.validation_prefix is None:
        said.append("the corpus has no validation split: no evaluation")
    return said
