"""Decide whether a mixture of experts trains with its routers' auxiliary loss, and at which coefficient."""

from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.facts import Facts


def coefficient(spec: RunSpec, facts: Facts) -> float:
    """Return what the routers' loss is multiplied with: as asked, as the run in `out` began, or as the config says.

    0 is none at all. Raises RequestError for a model that has no such loss and is asked for it.
    """
    asked, network = spec.model.router_loss, facts.model.network if facts.model else None
    if network is not None and network.router_loss is not None:
        begun = network.router_loss if facts.router_loss is None else facts.router_loss
        return begun if asked is None else asked
    if asked:
        why = (
            "transformers computes no auxiliary loss for the routers of this family"
            if network and network.experts
            else "there are no routers in a dense model, and no loss of theirs"
        )
        raise RequestError(
            why, where=f"model.router_loss={asked:g} and model={spec.model.name}", fix="drop model.router_loss"
        )
    return 0.0


def warnings(spec: RunSpec, facts: Facts, decided: float) -> list[str]:
    """Return what to say of a mixture that trains without the loss, where nobody asked for that."""
    network = facts.model.network if facts.model else None
    if network is None or not network.experts or decided or spec.model.router_loss is not None:
        return []
    name = spec.model.name
    if network.router_loss is None:
        return [
            f"{name} has experts, and transformers computes no auxiliary loss for the routers of its family: nothing "
            "but what the model does by itself keeps its experts in use"
        ]
    if network.router_loss:
        return [f"the run in {spec.out} was begun without its routers' auxiliary loss, and goes on without it"]
    return [
        f"{name}'s config has no coefficient for its routers' auxiliary loss: it trains without (model.router_loss)"
    ]
