"""Refuse, before the first step, a model that sees what it may not, or that cannot be run on tokens alone."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from halfstep.launcher.config import precisions
from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.plan.plan import Plan
from halfstep.models.causality import Crossing, Sight, look, look_across
from halfstep.models.hf_config import one_line

_TRANSPORT = re.compile(r"gloo|NCCL|Connection|DefaultCPUAllocator")
_WAYS_OUT = {"is_decoder": "true", "is_causal": "true", "causal": "true", "attn_type": '"uni"'}
"""What makes a model causal that need not be, in the families of transformers, as config.json spells it."""


def refuse_foresight(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Run the engine on two short sequences that differ at the end, and return what was measured for an event.

    A collective call. Raises RefusedError on every rank for a model whose earlier logits know the difference.
    """
    sight = _looked(look, engine, plan)
    sights = [Sight(**fields) for fields in distributed.gather_objects(asdict(sight))]
    for seen in sights:
        if not seen.causal:
            raise _seen(engine.module, plan, seen)
    return asdict(max(sights, key=lambda seen: seen.earlier))


def refuse_crossing(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Run the engine on two short sequences of two documents whose first ones differ, as `refuse_foresight` does.

    A collective call. Raises RefusedError on every rank for a model whose second document knows the difference.
    """
    crossing = _looked(look_across, engine, plan)
    crossings = [Crossing(**fields) for fields in distributed.gather_objects(asdict(crossing))]
    masked = plan.documents == "masked"
    asking = "documents=masked" if masked else "data of examples"
    for seen in crossings:
        if not seen.apart:
            raise RefusedError(
                f"the model does not keep documents apart: changing the first {seen.document} of {seen.tokens} tokens, "
                f"a document, moves what it makes of the next document by up to {seen.across:.3g}",
                where=f"{asking} and model={plan.model.name}, model_type {plan.model.config.get('model_type')!r}",
                fix="take documents=plain, or another model" if masked else "take another model",
            )
    return asdict(max(crossings, key=lambda seen: seen.across))


def _looked(probe: Callable[..., Any], engine: Engine, plan: Plan) -> Any:
    """Return what a look at the engine shows, in evaluation mode and not compiled."""
    was_training = engine.module.training
    engine.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling for another shape would take longer than it all
            return probe(
                _forward(engine, plan),
                vocabulary=plan.model.vocabulary,
                longest=plan.sequence,
                device=engine.device,
                anywhere=lambda here: any(distributed.gather_objects(here)),
            )
    finally:
        engine.train(was_training)


def _forward(engine: Engine, plan: Plan) -> Any:
    """Return a function from token ids to logits, beside what the head makes them of: a fresh one may be all zeros."""
    head, seen = engine.module.get_output_embeddings(), []
    watched = isinstance(head, nn.Module)

    def run(tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        seen.clear()
        hook = head.register_forward_pre_hook(lambda _, given: seen.extend(given[:1])) if watched else None
        try:
            logits = engine(input_ids=tokens, **({} if positions is None else {"position_ids": positions})).logits
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise _unusable(plan, f"it cannot be run on token ids alone: {one_line(error)}") from error
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError | dist.DistError) or _TRANSPORT.search(str(error)):
                raise  # another rank's death is no fault of the model
            raise _unusable(plan, f"it cannot be run in {plan.precision}: {one_line(error)}") from error
        finally:
            if hook:
                hook.remove()
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] < plan.model.vocabulary:
            expected = (*tokens.shape, plan.model.vocabulary)
            raise _unusable(plan, f"its logits have the shape {tuple(logits.shape)}, and {expected} is needed")
        states = [state.float() for state in seen if state.shape[:2] == tokens.shape]
        return torch.cat([logits.float(), *states], dim=-1)

    return run


def _unusable(plan: Plan, reason: str) -> RefusedError:
    half = precisions.of(plan.precision).products in ("fp16", "bf16") and "dtype" in reason
    return RefusedError(
        f"the model cannot be trained on next tokens: {reason}",
        where=f"model={plan.model.name}, model_type {plan.model.config.get('model_type')!r}",
        fix="take precision=fp32: it computes a part in fp32 whatever its weights are"
        if half
        else "take another causal language model, or correct this one's config",
    )


def _seen(model: PreTrainedModel, plan: Plan, sight: Sight) -> RefusedError:
    return RefusedError(
        f"the model sees the future: changing the last {sight.tokens - sight.first_changed} of {sight.tokens} tokens "
        f"moves what it makes of earlier ones by up to {sight.earlier:.3g} (of later ones by {sight.later:.3g})",
        where=f"model={plan.model.name}, model_type {plan.model.config.get('model_type')!r}",
        fix=_way_out(model.config),
    )


def _way_out(config: PreTrainedConfig) -> str:
    given = config.to_dict()
    if given.get("use_bidirectional_attention"):
        return "remove use_bidirectional_attention from its config.json"
    for key, wanted in _WAYS_OUT.items():
        if key in given and json.dumps(given[key]) != wanted:
            return f"set {key} to {wanted} in its config.json"
    return "take a causal language model: nothing in the config of this one makes it causal"
