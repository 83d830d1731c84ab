"""Read what a checkpoint of an earlier run says of itself, where a run begins with its weights: `model=run:DIR`."""

from pathlib import Path

from halfstep.launcher.checkpoint import start
from halfstep.launcher.checkpoint.manifest import Manifest
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.corpus.vocabulary import TokenizerFacts
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.construct import Source
from halfstep.launcher.plan.pretrained import ModelFacts, constructed, overridden, refuse_skipped_layers


def read_run(spec: RunSpec, *, examples: bool = False) -> ModelFacts:
    """Read the manifest of a checkpoint and construct its model once; its content is read where the ranks load it.

    Raises RequestError for a run without checkpoints, a damaged one, and a model that cannot be constructed.
    """
    where = f"model={spec.model.name}"
    name, manifest = start.chosen(spec.model.name, where)
    folder = start.split(name)[0]
    config = overridden(dict(manifest.model["config"]), spec, Path(folder), has_weights=True)
    source = Source(name=folder, home=folder, weights=None, local=True, prefix=start.PREFIX)
    refuse_skipped_layers(config, spec, where)
    tokenizer, place = _tokenizer(manifest)
    return ModelFacts(
        config=config,
        network=constructed(source, config, spec, examples=examples),
        weights=name,
        weights_digest=start.weights_digest(manifest),
        tokenizer=tokenizer,
        tokenizer_place=place,
    )


def _tokenizer(manifest: Manifest) -> tuple[TokenizerFacts, str | None]:
    """Return the tokenizer of what the earlier run was trained on; of a corpus that has gone, nothing is known."""
    for corpus in manifest.data.get("parts") or [manifest.data]:
        try:
            data = read_data(corpus["path"])
        except RequestError:
            continue
        if data.digest == corpus["digest"] and data.has_tokenizer:
            return data.tokenizer, corpus["path"]
    return TokenizerFacts(), None
