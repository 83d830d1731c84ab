"""Export a checkpoint: a folder that transformers, and every tool that reads its format, loads as it is."""

import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from halfstep.launcher.checkpoint.manifest import Damaged, Manifest
from halfstep.launcher.checkpoint.merged import Merged, adapters_of
from halfstep.launcher.checkpoint.shards import Averaged, Shards, has_average
from halfstep.launcher.config.digest import digest
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.export import chat_template, compare, source, target, tokenizer_files, weights
from halfstep.launcher.export.chat_template import ChatTemplate
from halfstep.launcher.export.compare import Comparison
from halfstep.launcher.export.exported import KIND, NOTE
from halfstep.launcher.export.source import Source
from halfstep.launcher.rundir import environment, records
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system.files import write_json

_SPARE = 1 << 24
"""Bytes besides the weights: the tokenizer and the configuration."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was exported."""

    folder: Path
    step: int
    files: dict[str, int]
    """Name -> bytes."""
    parameters: int
    dtype: str
    tokenizer: dict[str, Any] | None
    template: str | None = None
    """The chat template of the examples that were trained on."""
    compare: dict[str, Any] | None
    warnings: tuple[str, ...]
    sentence: str | None
    """The comparison in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as programs read it."""
        return {**asdict(self), "folder": str(self.folder)}


def export(
    run: Path,
    to: Path,
    *,
    step: int | None = None,
    dtype: str = "fp32",
    max_shard_bytes: int = 5 * 10**9,
    data: Path | None = None,
    comparing: bool = True,
    ema: bool = False,
) -> Outcome:
    """Write the weights, configuration and tokenizer of a checkpoint as a folder for transformers.

    `data` is where the run's corpus lies now, if it was moved. With `ema`, the average of the weights is written, of
    which the training engine has no logits. Otherwise the export is loaded and compared with the training
    engine before it appears. Raises RequestError for a damaged checkpoint, RefusedError for an export that computes
    something else; then nothing is written.
    """
    folder = target.absolute(to)
    chosen = source.choose(run, step, f"halfstep checkpoint export {shlex.join([str(run), '--to', str(to)])}")
    files = whole(chosen, ema=ema)
    manifest = files.manifest
    content = weights.content(manifest, dtype)
    parts = weights.divide(content.entries, max_shard_bytes)
    with target.filling(folder, sum(part.bytes for part in parts) + _SPARE) as partial:
        tokenizer, warnings = _tokenizer(manifest, data, partial, content.context)
        corpora = [data] if data else _corpora(manifest)
        template = chat_template.write(corpora, _digests(manifest), partial) if tokenizer else None
        if template and template.differs:
            warnings.append(f"transformers cuts a prompt of the template {template.name} otherwise than training did")
        _configure(partial, content.config, tokenizer, template)
        try:
            weights.write(partial, files, parts)
        except Damaged as damage:
            raise source.incomplete(chosen, damage) from None
        comparison = _compare(partial, manifest, files, dtype) if comparing and not ema else None
        write_json(partial / NOTE, note_of(chosen, dtype, tokenizer, comparison, ema=ema))
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    if comparing and comparison is None and not ema:
        warnings.append("the checkpoint holds no logits of the training engine: there was nothing to compare with")
    return Outcome(
        folder=folder,
        step=manifest.step,
        files=sizes,
        parameters=sum(math.prod(shape) for shape in manifest.model["parameters"].values()),
        dtype=dtype,
        tokenizer=tokenizer.to_dict() if tokenizer else None,
        template=template.name if template else None,
        compare=comparison.to_dict() if comparison else None,
        warnings=tuple(warnings),
        sentence=comparison.sentence if comparison else None,
    )


def opened(chosen: Source, *, ema: bool) -> Shards:
    """Return the masters of what a run trained, or their average; raises RequestError where there is none."""
    if ema and not has_average(chosen.manifest):
        raise RequestError(
            "the run kept no average of its weights",
            where=f"--ema and the checkpoint of step {chosen.manifest.step}",
            fix="leave --ema out; ema.decay=0.999 keeps one, in a run that begins with it",
        )
    return (Averaged if ema else Shards)(chosen.folder, chosen.manifest)


def whole(chosen: Source, *, ema: bool) -> Shards:
    """Return the masters of the whole model, with adapters merged where a run trained those, or their average."""
    files, about = opened(chosen, ema=ema), adapters_of(chosen.manifest)
    return files if about is None else Merged(files, about)


def _tokenizer(
    manifest: Manifest, data: Path | None, folder: Path, context: int | None
) -> tuple[tokenizer_files.Exported | None, list[str]]:
    """Write the tokenizer where the corpus is still there; otherwise say in a warning that there is none."""
    places = _corpora(manifest)
    corpus = data or next((place for place in places if place.exists()), places[0])
    if data is None and not corpus.exists():
        return None, [
            f"no tokenizer: the corpus {corpus} has gone; --data DIR says where it is now, and the weights are complete"
        ]
    try:
        tokenizer = tokenizer_files.export(corpus, _digests(manifest), folder, context)
    except RequestError as error:
        if data is not None:
            raise
        return None, [f"no tokenizer: {error.what}; {error.fix}"]
    if tokenizer.differs:
        return tokenizer, [
            f"the tokenizer of the export gives other ids than the corpus's own, first at {tokenizer.differs}"
        ]
    return tokenizer, []


def _corpora(manifest: Manifest) -> list[Path]:
    """Return where the corpora lay that were trained on."""
    return [Path(part["path"]) for part in manifest.data.get("parts") or [manifest.data]]


def _digests(manifest: Manifest) -> list[str]:
    return [part["digest"] for part in manifest.data.get("parts") or [manifest.data]]


def _configure(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: tokenizer_files.Exported | None,
    template: ChatTemplate | None,
) -> None:
    """Write config.json and generation_config.json; what ends a document also begins one and pads.

    What ends a turn of a chat template ends a generation.

    The padding stands in the latter alone: a Llama whose config.json names it would never train that token again
    (`padding_idx`), and here it is the one that ends a document.
    """
    if tokenizer:
        for key in ("bos_token_id", "eos_token_id"):
            if getattr(config, key, None) is None:
                setattr(config, key, tokenizer.end_of_text)
    config.save_pretrained(folder)
    special = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokenizer and special["pad_token_id"] is None:
        special["pad_token_id"] = tokenizer.end_of_text
    if template:
        ends = special["eos_token_id"]
        stops = {*template.stops, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        special["eos_token_id"] = sorted(stops) if len(stops) > 1 else next(iter(stops))
    GenerationConfig(**{key: value for key, value in special.items() if value is not None}).save_pretrained(folder)


def _compare(folder: Path, manifest: Manifest, files: Shards, dtype: str) -> Comparison | None:
    comparison = compare.compare(folder, manifest, files, dtype)
    refuse_another(manifest, comparison)
    return comparison


def refuse_another(manifest: Manifest, comparison: Comparison | None) -> None:
    """Raise RefusedError for an export that computes something else than the training engine did."""
    if comparison is not None and comparison.ok is False:
        raise RefusedError(
            f"the export computes something else than the training engine did: {comparison.sentence}",
            where=f"the checkpoint of step {manifest.step}, loaded by transformers on {comparison.device}",
            fix="export with the versions of the run (attempts/NNNN/env.json); --no-compare writes it all the same",
        )


def note_of(
    chosen: Source,
    dtype: str,
    tokenizer: tokenizer_files.Exported | None,
    comparison: Comparison | None,
    *,
    ema: bool,
) -> dict[str, Any]:
    """Return what is written down about an export."""
    manifest = chosen.manifest
    return {
        "kind": KIND,
        **({"ema": True} if ema else {}),
        "format": FORMAT,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "tokens": manifest.tokens,
        "model": manifest.model["name"],
        "identity": digest(manifest.identity),
        "data": manifest.data,
        "sequence": manifest.sequence,
        "documents": manifest.identity.get("documents", "plain"),
        "too_long": manifest.identity.get("too_long", "refuse"),
        "evaluation_sequences": _evaluation_sequences(chosen.run),
        "loss": source.losses(chosen.run).get(manifest.step),
        "trained": {"zero": manifest.zero, "precision": manifest.precision, "world_size": manifest.world_size},
        "dtype": dtype,
        "tokenizer": tokenizer.to_dict() if tokenizer else None,
        "compare": comparison.to_dict() if comparison else None,
        "versions": {"trained": manifest.versions, "exported": environment.versions()},
        "time": time.time(),
    }


def _evaluation_sequences(run: Path) -> int | None:
    """Return how many validation sequences the run's own evaluations read; None where its plan has gone."""
    try:
        planned = Run(run).planned
    except records.Damaged:
        return None
    return planned.data.validation_windows if planned else None
