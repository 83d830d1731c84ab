"""Decide which layers of a run have low-rank adapters, how many parameters those are, and what a token costs."""

from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.facts import Facts
from halfstep.launcher.plan.plan import ModelPlan
from halfstep.models import lora, shapes
from halfstep.models.lora import Linear, Lora

_SHOWN = 8
"""Names of layers in an error."""


def decide(spec: RunSpec, facts: Facts, model: ModelPlan) -> Lora | None:
    """Return the adapters of a run, None where all of its parameters are trained.

    Raises RequestError for targets that match nothing, and for a head whose weights are the embedding's as well.
    """
    if spec.train == "full":
        return None
    layers, head, tied, short = _layers(facts, model)
    targets = spec.lora.targets or short
    where = f"lora.targets={','.join(targets)} and model={spec.model.name}"
    for target in targets:
        if not any(lora.is_named(layer.name, [target]) for layer in layers):
            names = ", ".join(short[:_SHOWN]) + (", ..." if len(short) > _SHOWN else "")
            raise RequestError(
                f"no linear layer of {spec.model.name} is called {target!r}",
                where=where,
                fix=f"take some of {names}" if names else "take train=full, or another model",
            )
    chosen = [layer for layer in layers if lora.is_named(layer.name, targets)]
    if not chosen:
        raise RequestError(
            f"{spec.model.name} has no linear layers that could have adapters",
            where=f"train=lora and model={spec.model.name}",
            fix="take train=full, or another model",
        )
    if head in [layer.name for layer in chosen] and (tied or spec.fused_head):
        why = "its weights are the input embedding's as well" if tied else "its loss is made in it"
        raise RequestError(
            f"the head {head} can have no adapter: {why}",
            where=where if tied else f"fused_head=true, {where}",
            fix=f"leave {head} out of lora.targets" + ("" if tied else ", or take fused_head=false"),
        )
    return Lora(
        rank=spec.lora.rank,
        alpha=spec.lora.alpha,
        dropout=spec.lora.dropout,
        targets=tuple(targets),
        layers=len(chosen),
        parameters=sum(lora.matrices(chosen, spec.lora.rank)),
    )


def flops_per_token(model: ModelPlan, facts: Facts, decided: Lora, sequence: int) -> float | None:
    """Return the FLOPs of a token with frozen weights; None where the family is not known."""
    shape, network = shapes.from_hf_config(model.config), facts.model.network if facts.model else None
    if shape is not None:
        multiplied, attention = shapes.multiplied_parameters(shape), shapes.attention_width(shape)
    elif network and network.multiplied_parameters is not None and network.attention_width is not None:
        multiplied, attention = network.multiplied_parameters, network.attention_width
    else:
        return None
    return lora.flops_per_token(multiplied, decided.parameters, attention * sequence)


def _layers(facts: Facts, model: ModelPlan) -> tuple[tuple[Linear, ...], str | None, bool, tuple[str, ...]]:
    """Return the linear layers, which of them is the head, whether that is tied, and what names all but the head."""
    if facts.model is not None:
        network = facts.model.network
        return network.linear_layers, network.head, network.tied, network.short_names
    shape = shapes.from_hf_config(model.config)
    assert shape is not None, "presets are of families that the formulas know"
    layers = lora.linear_layers(shape)
    return layers, layers[-1].name, shape.tied, lora.shortest_names(layers[:-1], [layers[-1].name])
