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
    if spec.zero == 0 and spec.precision != "fp32":
        fault = (
            "never scales the loss and starts Adam one step late"
            if spec.precision == "fp16"
            else "starts Adam one step late"
        )
        said.append(
            f"DO NOT TRUST zero=0 precision={spec.precision}: DeepSpeed 0.19.8 {fault} at stage 0, so this run does "
            "not train the same model as stages 1 to 3. Take zero=1, which is the same mathematics, also on one rank."
        )
    if spec.precision == "fp16" and spec.fp16.scale == 0 and spec.fp16.window < 200:
        said.append(
            f"fp16.window={spec.fp16.window}: the step on which the scale doubles is half as large as it should be in "
            "DeepSpeed 0.19.8, and with so short a window that happens often. Take 200 or more."
        )
    if batch.global_ * steps > data.train_windows:
        epochs = batch.global_ * steps / data.train_windows
        said.append(f"the run reads the corpus {epochs:.1f} times over")
    if data.validation_prefix is None:
        said.append("the corpus has no validation split: no evaluation")
    return said
