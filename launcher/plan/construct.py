"""Construct the model of a request before anything is started: torch and transformers, and none of DeepSpeed."""

from dataclasses import dataclass
from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.models import shapes
from halfstep.models.lora import Linear, shortest_names


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is known of an `hf:` model once it has been constructed, on the meta device."""

    parameters: int
    """Distinct ones; a tied head counts once."""
    vocabulary: int
    """Token ids that it reads and predicts."""
    positions: int | None
    """The most tokens that it can look at; None where there is no limit."""
    width: int
    """Columns of the embedding."""
    experts: bool = False
    """Whether it is a mixture of experts."""
    router_loss: float | None = None
    """What its config multiplies its routers' auxiliary loss with; None where transformers computes none."""
    active_parameters: int | None = None
    """Parameters that a token goes through; None where that is not known."""
    multiplied_parameters: int | None = None
    """Of those, what it is multiplied with."""
    attention_width: int | None = None
    """Heads x head_dim, summed over the layers of a mixture; None where attention may cost something else."""
    linear_layers: tuple[Linear, ...] = ()
    """What may have an adapter, in the model's order."""
    head: str | None = None
    """Which of them is the output head."""
    tied: bool = False
    """Whether that one's weights are the input embedding's as well."""
    short_names: tuple[str, ...] = ()
    """The fewest ends of names that mean the linear layers but the head, and no other module."""

    def flops_per_token(self, sequence: int) -> float | None:
        """Return what `shapes.flops_per_token` does, for a mixture of experts; None where it is not known."""
        if self.multiplied_parameters is None or self.attention_width is None:
            return None
        return shapes.causal_flops(self.multiplied_parameters, self.attention_width * sequence)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an `hf:` model lies."""

    name: str
    """As the request names it, without its prefix."""
    home: str
    """The folder, or the hub id: where weights and the model's own code are."""
    weights: str | None
    """Where trained weights are loaded from; None for a bare config."""
    local: bool
    prefix: str = "hf:"
    """What stands before the name."""

    @property
    def where(self) -> str:
        """What an error names as the place."""
        return f"model={self.prefix}{self.name}"


def construct(
    source: Source,
    config: dict[str, Any],
    trust_remote_code: bool,
    *,
    fused_head: bool = False,
    documents_apart: str = "",
) -> Network:
    """Construct a model on the meta device, and compare it with the weights where they lie here.

    Raises RequestError for what cannot be constructed, for weights of another model, for a head that cannot be fused
    where `fused_head` asks for that, and for attention that cannot be kept inside documents where
    something asks for that, whose name is `documents_apart`.
    """
    # These load torch, which other plans do without.
    from halfstep.models import adapters, hf_config, hf_weights, network, observe, router

    try:
        model = network.skeleton(config, source=source.home, trust_remote_code=trust_remote_code)
        if source.weights is not None and source.local:
            made = hf_config.configuration(config, source=source.home, trust_remote_code=trust_remote_code)
            hf_weights.check(source.weights, made, {"trust_remote_code": trust_remote_code})
    except (ValueError, OSError, KeyError) as error:
        raise unfit(error, source.where, "the model cannot be constructed") from error
    active = router.active_parameters(model)
    head = next((name for name, part in model.named_modules() if part is model.get_output_embeddings()), None)
    layers = adapters.linear_layers(model)
    inner = [layer for layer in layers if layer.name != head]
    others = {name for name, _ in model.named_modules() if name} - {layer.name for layer in inner}
    made = Network(
        parameters=network.count_parameters(model),
        vocabulary=hf_config.vocabulary(model),
        positions=hf_config.positions(model),
        width=hf_config.width(model),
        experts=router.has_experts(model),
        router_loss=router.coefficient(model),
        active_parameters=active,
        multiplied_parameters=None if active is None else router.multiplied_parameters(model, active),
        attention_width=router.attention_width(model),
        linear_layers=layers,
        head=head,
        tied=head is not None and f"{head}.weight" in hf_weights.ties(model),
        short_names=shortest_names(inner, others),
    )
    if fused_head or documents_apart:
        seen, positions = observe.observe(model), observe.takes_positions(model)
        if fused_head and not seen.plain_head:
            raise no_plain_head(source.where)
        if documents_apart and not (seen.common_attention and positions):
            raise _no_documents(f"{documents_apart} and {source.where}", positions)
    return made


def no_plain_head(where: str) -> RequestError:
    """Return what to say of a model whose loss cannot be made in its head."""
    return RequestError(
        "the loss cannot be made in this model's head: its logits are not a plain product of the head's weights",
        where=f"fused_head=true and {where}",
        fix="take fused_head=false; activation_checkpointing=true saves memory in every model",
    )


def _no_documents(where: str, positions: bool) -> RequestError:
    reason = "its attention is not transformers' common one" if positions else "it takes no positions"
    return RequestError(
        f"attention cannot be kept inside documents in this model: {reason}",
        where=where,
        fix="take documents=plain, or another model" if where.startswith("documents=") else "take another model",
    )


def unfit(error: Exception, where: str, heading: str) -> RequestError:
    """Return what to say of a model that cannot be made."""
    what = " ".join(str(error).split()) or type(error).__name__
    fix = getattr(error, "fix", None) or "correct its config.json, or take another causal language model"
    return RequestError(f"{heading}: {what}", where=where, fix=fix)
