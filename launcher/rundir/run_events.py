"""The lines of events.jsonl: what happened besides optimizer steps, and what each kind has to say."""

from dataclasses import dataclass
from typing import Any

from halfstep.launcher.system.fields import Count, Finite, Flag, Measured, Text, checked


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event."""

    kind: str
    row: dict[str, Any]
    """As it was written."""

    @property
    def step(self) -> int | None:
        """The optimizer step that it is about; None for events that are about none."""
        return self.row.get("step")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    rank: Count
    parameter: Text = ""
    module: Text = ""


@dataclass(frozen=True, kw_only=True)
class _Overflow:
    step: Count
    first: list[_Origin] | None = None
    repeated: Flag = True


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
class _Kind:
    event: Text


_READ: dict[str, type[Any]] = {
    "overflow": _Overflow,
    "loss_not_finite": _NotFinite,
    "numerics": _Reading,
    "repaired": _Repaired,
}
"""The kinds whose content somebody reads, and what has to be in it."""


def of_line(row: dict[str, Any]) -> Event:
    """Return a line of events.jsonl; raises ValueError for one that was not written by us."""
    kind = checked(_Kind, row).event
    if kind in _READ:
        content = checked(_READ[kind], row)
        if isinstance(content, _Reading):
            _require_shares(content)
    return Event(kind=kind, row=row)


def _require_shares(reading: _Reading) -> None:
    """Raise ValueError where a layer has gradients, and nothing says what fp16 loses of them."""
    for name, layer in reading.layers.items():
        if layer.grad_max is not None and None in (layer.zero, layer.underflow_unscaled, layer.underflow_scaled):
            raise ValueError(f"it does not say what fp16 loses of {name}")
