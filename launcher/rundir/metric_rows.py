"""The rows of metrics.jsonl: the same fields, of the same type, in every (stage, precision) cell."""

import functools
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Optional, TypeVar

from pydantic import Field

from halfstep.launcher.system.fields import Count, Finite, Flag, Measured, Positive, Text, checked

_Record = TypeVar("_Record")
_ALWAYS = frozenset(
    (
        *("step", "tokens", "loss", "lr", "grad_norm", "loss_scale", "overflow", "skipped_steps", "step_seconds"),
        *("data_seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "time", "eval_loss", "perplexity"),
    )
)
"""In every row since the first release, so that a row without one of them is damaged; never add to these."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, applied or skipped; None where a value has no meaning or is not finite."""

    step: Positive
    """Counted from 1; a skipped step counts."""
    tokens: Count
    """Training tokens read so far, this step included; positions, with those of padding."""
    targets: Count | None = None
    """Tokens of this step's global batch that are predicted; None in runs that are older than this field."""
    loss: Finite | None
    """The language-model loss: mean over the global batch and all ranks, in nats per token, before the update."""
    router_loss: Finite | None = None
    """A mixture's auxiliary loss without its coefficient, mean over micro-batches and ranks; None where none is
    computed."""
    lr: Finite
    """Learning rate of this update."""
    grad_norm: Measured | None
    """Global gradient norm, unscaled, before clipping."""
    loss_scale: Measured | None
    """Loss scale that this step was computed with; None without loss scaling."""
    overflow: Flag
    """Whether the update was skipped for a non-finite gradient."""
    skipped_steps: Count
    """Skipped updates so far."""
    step_seconds: Measured
    """Wall time of the step, data included."""
    data_seconds: Measured
    """Of that, waiting for data."""
    tokens_per_second: Measured
    """Over all ranks."""
    mfu: Measured | None
    """Share of the devices' peak arithmetic, 0 to 1, causal FLOPs; None where the peak is not known."""
    peak_memory_bytes: Count
    """The largest over the ranks: most reserved on a GPU, high-water resident size on a CPU."""
    time: Finite
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One pass over the validation sequences; carries no `loss`, so that the two kinds of row cannot be confused."""

    step: Count
    """Optimizer steps done before it."""
    eval_loss: Finite | None
    """Mean over the validation tokens, in nats; of a mixture by the weights of its parts."""
    perplexity: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)] | None
    """exp(eval_loss), which soon is beyond what anything else may be."""
    eval_loss_by_part: dict[Text, Finite | None] | None = None
    """Of a mixture, each part's own by its path; `eval_loss` is their mean by weight. None for a single corpus."""
    tasks: dict[Text, dict[Text, Finite | None]] | None = None
    """By task, what its metrics are; None where the model was not judged."""
    time: Finite
    """Seconds since the epoch."""


def of_row(row: dict[str, Any]) -> StepRecord | EvaluationRecord:
    """Return a row of metrics.jsonl; raises ValueError for one that was not written by us."""
    return read_as(EvaluationRecord if "eval_loss" in row else StepRecord, row)


def read_as(kind: type[_Record], row: dict[str, Any]) -> _Record:
    """Return a row as one kind of record; raises ValueError for one that was not written by us.

    A field that was added later is its default in rows of older runs, and None where it has no default.
    """
    return kind(**vars(checked(_lenient(kind), row)))


@functools.cache
def _lenient(kind: Any) -> type[Any]:
    """Return a record's fields as they may be missing from a row."""
    return make_dataclass(
        kind.__name__,
        [
            (item.name, Optional[item.type], field(default=None))  # noqa: UP045 (a type at run time)
            if item.name not in _ALWAYS and item.default is MISSING
            else (item.name, item.type, field(default=item.default))
            for item in fields(kind)
        ],
        kw_only=True,
    )
