"""The optimizers: one row for each, read by the composition, the forecast, the engine and the parity gate.

An optimizer without a row can still be asked for with `ds.optimizer.type`: it gets Adam's forecast and no promise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class State:
    """A tensor of a parameter's size that is kept beside its master."""

    name: str
    """Torch's and DeepSpeed's key in the optimizer's state."""
    bytes: int = 4
    """Of one element."""
    only_with: str | None = None
    """The parameter of the optimizer that has to be above 0 for it to be kept."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters of the network that are trained with the same options."""

    least_dimensions: int
    decayed: bool
    """Whether `weight_decay` applies."""


# Decaying a norm's gain towards zero is not regularisation; matrices and embeddings are what GPT-3 decays.
_MATRICES_AND_VECTORS = (Group(least_dimensions=2, decayed=True), Group(least_dimensions=0, decayed=False))
_TWO_MOMENTS = (State(name="exp_avg"), State(name="exp_avg_sq"))
_LARGEST = State(name="max_exp_avg_sq", only_with="amsgrad")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One row."""

    type: str
    """DeepSpeed's `optimizer.type`, in any case."""
    kind: str | None = None
    """The value of the run key `optimizer.kind`; None: it is asked for with `ds.optimizer.type` only."""
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Beside lr and weight_decay, which all have: DeepSpeed's name, and the run keys `optimizer.*` it is made of."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that follow from the kind alone."""
    states: tuple[State, ...]
    states_elsewhere: tuple[State, ...] | None = None
    """Of embeddings, the head and vectors, where those are stepped by another rule than hidden matrices."""
    groups: tuple[Group, ...] = _MATRICES_AND_VECTORS
    """Each parameter of the network is in the first that takes it."""
    operators: tuple[str, str] | None = None
    """DeepSpeed's builders of its own implementations, for a host and a device; `torch_adam` takes torch's instead."""
    tested_with_zero: bool = True
    """Whether stages 1 to 3 take it without `zero_allow_untested_optimizer` (engine.py, _do_sanity_check)."""
    counts_steps: bool = True
    """Whether its state holds a step count."""
    reference: str | None = None
    """What the parity gate trains with, of `parity.reference` or torch.optim; it takes `parameters` by those names."""

    def group_of(self, dimensions: int) -> Group:
        """Return the group of a parameter that has so many dimensions."""
        return next(group for group in self.groups if dimensions >= group.least_dimensions)


_ADAM_OPERATORS = ("CPUAdamBuilder", "FusedAdamBuilder")
_ROWS = (
    Optimizer(
        type="AdamW",
        kind="adamw",
        parameters={"betas": ("beta1", "beta2"), "eps": ("epsilon",)},
        fixed={"adam_w_mode": True},
        states=(*_TWO_MOMENTS, _LARGEST),
        operators=_ADAM_OPERATORS,
        reference="AdamW",
    ),
    Optimizer(
        type="SGD",
        kind="sgd",
        parameters={"momentum": ("momentum",)},
        states=(State(name="momentum_buffer", only_with="momentum"),),
        tested_with_zero=False,  # torch's works at stages 1 to 3 but is not on DeepSpeed's list
        counts_steps=False,
        reference="SGD",
    ),
    Optimizer(type="Adam", states=(*_TWO_MOMENTS, _LARGEST), operators=_ADAM_OPERATORS),
    Optimizer(type="Adagrad", states=(State(name="sum"),), reference="Adagrad"),
    Optimizer(type="Lamb", states=_TWO_MOMENTS, tested_with_zero=False),
    Optimizer(type="Lion", states=(State(name="exp_avg"),), reference="Lion"),
    Optimizer(type="Muon", states=(State(name="momentum_buffer"),), states_elsewhere=_TWO_MOMENTS, reference="Muon"),
    *(
        Optimizer(type=name, states=tuple(State(name=state) for state in states), tested_with_zero=False)
        for name, states in (
            ("Adadelta", ("square_avg", "acc_delta")),
            ("Adamax", ("exp_avg", "exp_inf")),
            ("ASGD", ("ax",)),
            ("NAdam", ("exp_avg", "exp_avg_sq")),
            ("RAdam", ("exp_avg", "exp_avg_sq")),
            ("Rprop", ("prev", "step_size")),
            # Of a matrix it keeps a row and a column; but a shard is flat, and has neither.
            ("Adafactor", ("variance",)),
        )
    ),
    Optimizer(
        type="RMSprop",
        states=(
            State(name="square_avg"),
            State(name="momentum_buffer", only_with="momentum"),
            State(name="grad_avg", only_with="centered"),
        ),
        tested_with_zero=False,
    ),
)
_BY_TYPE = {row.type.lower(): row for row in _ROWS}
BY_KIND = {row.kind: row for row in _ROWS if row.kind}
"""The rows that `optimizer.kind` names."""
_UNKNOWN = Optimizer(type="", states=_TWO_MOMENTS, tested_with_zero=False)


def of(type_: str) -> Optimizer:
    """Return the row of DeepSpeed's `optimizer.type`; of one without a row, what is assumed of it."""
    return _BY_TYPE.get(type_.lower(), _UNKNOWN)


def state_bytes(type_: str, parameters: Mapping[str, Any]) -> int:
    """Return the bytes that an optimizer with these parameters keeps beside each element of a hidden matrix."""
    return _bytes(of(type_).states, parameters)


def state_bytes_elsewhere(type_: str, parameters: Mapping[str, Any]) -> int:
    """Return the same for embeddings, the head and vectors."""
    row = of(type_)
    return _bytes(row.states if row.states_elsewhere is None else row.states_elsewhere, parameters)


def _bytes(states: tuple[State, ...], parameters: Mapping[str, Any]) -> int:
    kept = [state for state in states if state.only_with is None or (parameters.get(state.only_with) or 0) > 0]
    return sum(state.bytes for state in kept)
