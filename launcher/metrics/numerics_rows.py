"""What `halfstep numerics` reads of a run, line by line, and what each may say."""

from dataclasses import dataclass
from typing import Any

from halfstep.launcher.metrics.record import EvaluationRecord
from halfstep.launcher.system.fields import Count, Finite, Flag, Measured, Positive, Text, checked


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the row of an optimizer step says of numerics."""

    step: Positive
    loss: Finite | None
    """None where it was not finite."""
    loss_scale: Measured | None
    """Of this step; None without loss scaling."""
    overflow: Flag
    """Whether the update was skipped."""
    skipped_steps: Count
    """Skipped updates so far."""
    grad_norm: Measured | None
    """Unscaled; None where it was not finite."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    rank: Count
    parameter: Text = ""
    module: Text = ""


@dataclass(frozen=True, kw_only=True)
class _Overflow:
    step: Count
    first: list[_Origin] | None = None


@dataclass(frozen=True, kw_only=True)
class _NotFinite:
    step: Count
    ranks: list[Count] | None = None
    first_activation: _Origin | None = None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    elements: Count
    grad_max: Measured | None = None
    zero: Measured | None = None
    underflow_unscaled: Measured | None = None
    underflow_scaled: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class _Reading:
    step: Count
    scale: Finite
    layers: dict[Text, _Layer]


@dataclass(frozen=True, kw_only=True)
class _Repaired:
    repairs: list[Text]


@dataclass(frozen=True, kw_only=True)
class _Event:
    event: Text


_EVENTS: dict[str, type[Any]] = {
    "overflow": _Overflow,
    "loss_not_finite": _NotFinite,
    "numerics": _Reading,
    "repaired": _Repaired,
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network, as far as its name goes."""

    name: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Described:
    """What plan.json or summary.json says of a run, as far as it is shown."""

    model: Model | Text | None = None
    precision: Text | None = None
    zero: Count | None = None
    steps: Count | None = None


def row_of(row: dict[str, Any]) -> Step | EvaluationRecord:
    """Return a row of metrics.jsonl; raises ValueError for one that was not written by us."""
    return checked(EvaluationRecord if "eval_loss" in row else Step, row)


def event_of(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event as it stands; raises ValueError for layer that was not written by us."""
    kind = checked(_Event, event).event
    if kind in _EVENTS:
        seen = checked(_EVENTS[kind], event)
        if isinstance(seen, _Reading) and (
            lost := [name for name, layer in seen.layers.items() if not _is_whole(layer)]
        ):
            raise ValueError(f"it does not say what fp16 loses of {lost[0]}")
    return event


def _is_whole(layer: _Layer) -> bool:
    return layer.grad_max is None or None not in (layer.zero, layer.underflow_unscaled, layer.underflow_scaled)
