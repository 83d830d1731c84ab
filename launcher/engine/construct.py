"""Construct the model of a request before anything is started: torch and transformers, and none of DeepSpeed."""

from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.pretrained import Network, Source
from halfstep.models import hf_config as model_config
from halfstep.models import hf_weights as pretrained
from halfstep.models import network as model_build


def construct(source: Source, config: dict[str, Any], trust_remote_code: bool) -> Network:
    """Construct a model on the meta device, and compare it with the weights where they lie here.

    Raises RequestError for what cannot be constructed, and for weights of another model.
    """
    try:
        model = model_build.skeleton(config, source=source.home, trust_remote_code=trust_remote_code)
        if source.weights is not None and source.local:
            made = model_config.configuration(config, source=source.home, trust_remote_code=trust_remote_code)
            pretrained.check(source.weights, made, {"trust_remote_code": trust_remote_code})
    except (ValueError, OSError, KeyError) as error:
        raise unfit(error, source.where, "the model cannot be constructed") from error
    return Network(
        parameters=model_build.count_parameters(model),
        vocabulary=model_config.vocabulary(model),
        positions=model_config.positions(model),
        width=model_config.width(model),
    )


def unfit(error: Exception, where: str, heading: str) -> RequestError:
    """Return what to say of a model that cannot be made."""
    what = " ".join(str(error).split()) or type(error).__name__
    fix = getattr(error, "fix", None) or "correct its config.json, or take another causal language model"
    return RequestError(f"{heading}: {what}", where=where, fix=fix)
