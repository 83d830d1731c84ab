"""Judge one run by another: how far they are apart, in what, and whether that is rounding or another algorithm."""

import math
from dataclasses import dataclass

from halfstep.launcher.parity.cases import Case
from halfstep.launcher.parity.trial import Series

# Relative. Half precision: 2^-11 (fp16) and 2^-9 (bf16) of rounding in every operation, and 20 steps of it. fp32: sums
# in another order; two ranks add them in yet another.
_LOSS = {"fp32": 1e-5, "fp16": 3e-4, "bf16": 3e-4}
_LOSS_TWO_RANKS_FP32 = 1e-4
_GRAD_NORM = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 5e-3}
# Adam's first update is lr x gradient / |gradient|: elements near zero turn with their sign, which rounding decides.
_FIRST_UPDATE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 1e-2}
_ROUNDS_LIKE = {"bf16-autocast": "bf16", "fp16-autocast": "fp16", "tf32": "fp16"}
"""Precisions whose products have as many digits as another's; TF32 has fp16's ten bits."""
_COARSER = {
    # Gradients of fp32 weights that are reduced in 16 bits, weights that stage 3 gathers in them.
    "ds.torch_autocast.lower_precision_safe_modules": {"first_update": 0.1},
    # A sum of bf16 numbers that is bf16 itself, over micro-batches or ranks.
    "ds.data_types.grad_accum_dtype": {"first_update": 0.03},
    "ds.communication_data_type": {"first_update": 0.03},
}
"""Conditions in which the arithmetic is meant to be coarser than the cell's own, and how far apart it may be."""
_MUON_LOSS_FP32, _MUON_FIRST_UPDATE = 1e-4, 0.03
"""Of Muon, whose iteration makes a singular value of 1e-3 five hundred times as large, and its rounding with it.

Where the processor multiplies in fp16, DeepSpeed iterates in fp16, whatever the precision is: losses of fp32 are then
1.1e-5 apart and first updates 0.01. In fp16 they are 0.012 apart anyhow; else both are as AdamW's (1.2e-7, 6e-6).
"""
_FIRST_UPDATE_COMPILED = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.1}
"""What a compiler has made one kernel of is rounded once and not after every operator, which turns more signs. With
TORCHINDUCTOR_EMULATE_PRECISION_CASTS=1, which rounds where eager does, 0.012 became 0.0002 (fp16), 0.064 0.013 (bf16).
"""
_FIRST_UPDATE_DOCUMENTS = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.1}
"""The reference reads each document by itself, whose gradients it adds up in 16 bits; measured 0.029 and 0.058."""
ORACLE, STAGE_1 = "oracle", "stage 1"
_NOT_A_NUMBER = 1e9
"""Stands for a deviation that is no number, so that every result is JSON and fails."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far a run is from what it is compared with, in one measure."""

    measure: str
    """loss, grad_norm, first_update (relative); optimizer_steps, loss_scale, skipped (count of differences)."""
    against: str
    """ORACLE or STAGE_1."""
    value: float
    tolerance: float
    step: int | None
    """Where it is largest."""

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance."""
        return self.value <= self.tolerance

    @property
    def severity(self) -> float:
        """The value in tolerances, to find the worst of several; a count of differences is worth just a failure."""
        return self.value / self.tolerance if self.tolerance else min(self.value, 1.0) * 1.001


def deviations(case: Case, series: Series, reference: Series, against: str) -> list[Deviation]:
    """Return the deviation of `series` from `reference` in every measure."""
    coarser = next((_COARSER[word.partition("=")[0]] for word in case.keys if word.partition("=")[0] in _COARSER), {})
    precision = _ROUNDS_LIKE.get(case.precision, case.precision)
    loss = _LOSS_TWO_RANKS_FP32 if precision == "fp32" and case.world_size > 1 else _LOSS[precision]
    first_update = _FIRST_UPDATE[precision]
    if case.optimizer == "muon":
        loss, first_update = max(loss, _MUON_LOSS_FP32), _MUON_FIRST_UPDATE
    compared = [
        _largest("loss", against, series.loss, reference.loss, loss),
        _largest("grad_norm", against, series.grad_norm, reference.grad_norm, _GRAD_NORM[precision]),
        _differences("loss_scale", against, series.loss_scale, reference.loss_scale),
        _differences("skipped", against, series.skipped, reference.skipped),
        _differences("optimizer_steps", against, [series.optimizer_steps], [reference.optimizer_steps]),
    ]
    if series.first_update is None or reference.first_update is None:  # a run that ended before
        apart = math.nan
    else:
        apart = float((series.first_update - reference.first_update).norm() / reference.first_update.norm())
    allowed = coarser.get("first_update", first_update)
    if case.compile:
        allowed = max(allowed, _FIRST_UPDATE_COMPILED[precision])
    if case.documents == "masked" and against == ORACLE:
        allowed = max(allowed, _FIRST_UPDATE_DOCUMENTS[precision])
    return [*compared, _relative("first_update", against, [apart], allowed)]


def worst(compared: list[Deviation]) -> Deviation:
    """Return the deviation that is largest in tolerances."""
    return max(compared, key=lambda deviation: deviation.severity)


def _largest(
    measure: str, against: str, mine: list[float | None], theirs: list[float | None], tolerance: float
) -> Deviation:
    """Compare two series; where only one has a value, they are apart by all of it."""
    apart = [
        0.0 if a is None and b is None else 1.0 if a is None or b is None else abs(a - b) / max(abs(b), 1e-30)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return _relative(measure, against, apart, tolerance)


def _relative(measure: str, against: str, apart: list[float], tolerance: float) -> Deviation:
    values = [value if math.isfinite(value) else _NOT_A_NUMBER for value in apart]
    largest = max(values)
    step = values.index(largest) + 1
    return Deviation(measure=measure, against=against, value=largest, tolerance=tolerance, step=step)


def _differences(measure: str, against: str, mine: list, theirs: list) -> Deviation:
    places = [place for place, (a, b) in enumerate(zip(mine, theirs, strict=True), 1) if a != b]
    return Deviation(
        measure=measure,
        against=against,
        value=float(len(places)),
        tolerance=0.0,
        step=places[0] if places else None,
    )
