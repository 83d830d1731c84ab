"""Export the adapters of a run by themselves: the two files that peft and transformers load beside their base model."""

import math
import shlex
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from halfstep.launcher.checkpoint.manifest import Damaged
from halfstep.launcher.checkpoint.merged import adapters_of, base_of, lora_of
from halfstep.launcher.checkpoint.shards import MASTER
from halfstep.launcher.checkpoint.start import PREFIX
from halfstep.launcher.config import precisions
from halfstep.launcher.errors import RequestError
from halfstep.launcher.export import compare, source, target
from halfstep.launcher.export.exported import NOTE
from halfstep.launcher.export.weights import DTYPES
from halfstep.launcher.export.write_export import Outcome, note_of, opened, refuse_another
from halfstep.launcher.system.files import write_json
from halfstep.models import adapters
from halfstep.models.hf_config import Unfit
from halfstep.models.network import skeleton

WEIGHTS = "adapter_model.safetensors"
_SPARE = 1 << 20
"""Bytes besides the weights."""


def export(
    run: Path, to: Path, *, step: int | None = None, dtype: str = "fp32", comparing: bool = True, ema: bool = False
) -> Outcome:
    """Write `adapter_config.json` and `adapter_model.safetensors` of a checkpoint into a new folder.

    They are loaded with peft upon the run's base and compared with the training engine before the folder appears.
    Raises RequestError for a run that trained no adapters and for a damaged checkpoint, RefusedError where the base has
    gone, and for adapters that compute something else.
    """
    folder = target.absolute(to)
    chosen = source.choose(run, step, f"halfstep checkpoint export {shlex.join([str(run), '--to', str(to)])} --adapter")
    manifest, about = chosen.manifest, adapters_of(chosen.manifest)
    if about is None:
        raise RequestError(
            "the run trained every parameter, and has no adapter",
            where=f"--adapter and {run}",
            fix="leave --adapter out to export the whole model",
        )
    files, lora = opened(chosen, ema=ema), lora_of(about)
    base = None if (about["weights"] or "").startswith(PREFIX) else about["weights"]
    tensors = {}
    for name in files.parameters():
        try:
            values = files.read(name, MASTER)
        except Damaged as damage:
            raise source.incomplete(chosen, damage) from None
        whole = torch.from_numpy(values).view(files.shape(name)).to(DTYPES[dtype])
        tensors[f"base_model.model.{name.replace(f'.{adapters.NAME}.', '.')}"] = whole
    with target.filling(folder, sum(tensor.nbytes for tensor in tensors.values()) + _SPARE) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        try:
            configuration = adapters.configuration(skeleton(manifest.model["config"]), lora, list(lora.targets))
        except Unfit as error:
            raise RequestError(
                str(error), where=f"the model {manifest.model['name']} of the checkpoint", fix=error.fix or "check it"
            ) from None
        configuration.base_model_name_or_path, configuration.inference_mode = base, True
        configuration.save_pretrained(partial)
        comparison = None
        if comparing and not ema and files.probe() is not None:
            kind = DTYPES[precisions.of(manifest.precision).weights]
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks by an old name
                loaded = PeftModel.from_pretrained(base_of(manifest, about), str(partial), autocast_adapter_dtype=False)
            comparison = compare.judged(loaded.to(kind).eval(), manifest, files)
            refuse_another(manifest, comparison)
        write_json(partial / NOTE, {**note_of(chosen, dtype, None, comparison, ema=ema), "adapter": True})
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    alone = ()
    if base is None:
        origin = about["weights"] or f"drawn from seed {about['seed']}"
        alone = (f"its base is no folder that peft could load ({origin}): it fits upon that model alone",)
    return Outcome(
        folder=folder,
        step=manifest.step,
        files=sizes,
        parameters=sum(math.prod(shape) for shape in manifest.model["parameters"].values()),
        dtype=dtype,
        tokenizer=None,
        compare=comparison.to_dict() if comparison else None,
        warnings=alone,
        sentence=comparison.sentence if comparison else None,
    )
