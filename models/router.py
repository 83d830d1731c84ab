"""The routers of a mixture of experts: their auxiliary loss, which transformers computes, and what one token uses."""

import inspect
import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

_COEFFICIENTS = (("", "router_aux_loss_coef"), ("", "aux_loss_coef"), ("ffn_config", "moe_loss_weight"))
"""Where a configuration has the auxiliary loss's coefficient: most families, JetMoE, DBRX."""
_EXPERTS_PER_TOKEN = (("", "num_experts_per_tok"), ("ffn_config", "moe_top_k"), ("", "moe_topk"), ("", "top_k_experts"))
"""The same of the experts that a router chooses for a token: most families, DBRX, Aria, Gemma 4."""
_PLAIN_ATTENTION = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "phimoe", "granitemoe")
"""Mixtures in which every layer has attention over the whole sequence, as wide as its `q_proj`."""


class Objective(NamedTuple):
    """What a micro-batch is trained by, all scalars."""

    total: Tensor
    """What is differentiated."""
    language: Tensor
    """The language-model loss; the same tensor where there is nothing else."""
    router: Tensor | None = None
    """The routers' auxiliary loss without its coefficient; None: none is computed."""

    @classmethod
    def of(cls, language: Tensor, router: Tensor | None, coefficient: float) -> "Objective":
        """Return the sum of a language-model loss and of an auxiliary one at its coefficient."""
        if router is None:
            return cls(language, language)
        return cls(language + coefficient * router, language, router)


class WithRouterLoss:
    """A model, or the engine around it, that is asked for its routers' auxiliary loss at every call.

    It is transformers' own: of one call, over all its layers and tokens (load_balancing_loss_func of each family, after
    Fedus et al. 2021, equations 4 to 6).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.router_loss: Tensor | None = None
        """Of the last call, a scalar."""

    def __call__(self, **inputs: Any) -> Any:
        made = self._model(output_router_logits=True, **inputs)
        loss = made.aux_loss
        assert isinstance(loss, Tensor), "the plan has a coefficient for families alone that compute the loss"
        self.router_loss = loss
        return made


def coefficient(model: PreTrainedModel) -> float | None:
    """Return the coefficient that a configuration has for the auxiliary loss, None where no such loss is computed.

    0 where the configuration says null.
    """
    if not _computes_loss(model):
        return None
    value = _of_config(model, _COEFFICIENTS)
    return float(value) if isinstance(value, int | float) else 0.0


def has_experts(model: PreTrainedModel) -> bool:
    """Tell whether a model is a mixture of experts."""
    return bool(_experts(model)) or _computes_loss(model)


def active_parameters(model: PreTrainedModel) -> int | None:
    """Count the parameters that a token goes through, tied ones once; None where it is not known which.

    Of each layer's experts they are those that its router chooses for one token; all else is used by every token: the
    router, shared experts, attention, norms, embedding and head.
    """
    total = sum(math.prod(parameter.shape) for parameter in model.parameters())
    if not has_experts(model):
        return total
    chosen, containers = _of_config(model, _EXPERTS_PER_TOKEN), _experts(model)
    if not containers or not isinstance(chosen, int):
        return None
    for experts in containers:
        count = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", None)
        routes = any(name in ("router", "gate") for name, _ in experts.named_children())  # JetMoE's do, themselves
        elements = sum(math.prod(parameter.shape) for parameter in experts.parameters())
        if not isinstance(count, int) or routes or chosen > count or elements % count:
            return None
        total -= elements // count * (count - chosen)
    return total


def multiplied_parameters(model: PreTrainedModel, active: int) -> int:
    """Return how many of a token's active parameters it is multiplied with: all but the input embedding, a gather.

    A tied embedding is multiplied once, as the head.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return active - (0 if tied else math.prod(embedding.weight.shape))


def attention_width(model: PreTrainedModel) -> int | None:
    """Return heads x head_dim summed over all layers, None for families whose attention may cost something else."""
    if model.config.model_type not in _PLAIN_ATTENTION:
        return None
    queries = [module for name, module in model.named_modules() if name.endswith(".q_proj")]
    return sum(module.out_features for module in queries if isinstance(module, nn.Linear))


def _computes_loss(model: PreTrainedModel) -> bool:
    """Tell whether a forward pass computes an auxiliary loss, and there is a router whose logits it is made of."""
    forward: Any = inspect.unwrap(type(model).forward)
    return "load_balancing_loss_func" in forward.__code__.co_names and any(
        _records(module, spec)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for spec in _recorders(part)
        for module in part.modules()
    )


def _experts(model: PreTrainedModel) -> list[nn.Module]:
    """Return what holds a layer's experts, by the name that it has in all of transformers."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]


def _recorders(part: PreTrainedModel) -> list[Any]:
    specs = (part._can_record_outputs or {}).get("router_logits", [])
    return specs if isinstance(specs, list) else [specs]


def _records(module: nn.Module, spec: Any) -> bool:
    """Tell whether transformers takes a router's logits from a module (utils/output_capturing.py)."""
    kind = spec.target_class if isinstance(spec, OutputRecorder) else spec
    return isinstance(kind, type) and isinstance(module, kind)


def _of_config(model: PreTrainedModel, places: tuple[tuple[str, str], ...]) -> Any:
    """Return the first value that a model's configuration has in one of some (section, name)."""
    text = model.config.get_text_config(decoder=True)
    for section, name in places:
        owner = getattr(text, section, None) if section else text
        if hasattr(owner, name):
            return getattr(owner, name)
    return None
