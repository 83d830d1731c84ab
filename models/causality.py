"""Tells whether a model sees the future, or another document: what it may not see must move no logit by a bit."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 29
"""Tokens of a probe. It and `CHANGED` are odd, so that no block or window of a model ends where the change begins."""
CHANGED = 13
"""The first token that is changed: with half of the sequence, a change is plain to see in half precision too."""


_NOISES = 8.0
"""Two noises are seldom further from each other than so many times."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a change of later tokens did to the logits."""

    tokens: int
    first_changed: int
    earlier: float
    """The largest change of a logit before the changed tokens."""
    later: float
    """The same from the first changed token on."""
    rows: bool
    """Whether matrices had to be multiplied row by row for the earlier logits to stay what they are to the bit."""
    noise: float = 0.0
    """How far the same tokens move the earlier logits, where kernels add up in another order at each call."""

    @property
    def causal(self) -> bool:
        """Whether no earlier logit moved by more than noise explains, of which there is none on a CPU."""
        return self.earlier <= _NOISES * self.noise


def look(
    forward: Callable[[Tensor], Tensor],
    *,
    vocabulary: int,
    longest: int,
    device: torch.device,
    anywhere: Callable[[bool], bool] = lambda here: here,
) -> Sight:
    """Compare the logits of two sequences that differ from some token on; of `longest` tokens at most.

    `forward` takes token ids (1, length) and returns logits (1, length, vocabulary), without dropout. Both sequences go
    through the same kernels, which give a row the same bits whatever later rows hold. Only a mixture of experts
    multiplies as many rows as its router deals to an expert, and another number of rows may be added up in another
    order: where anything moved, it is done again row by row. Every rank must call; `anywhere` tells whether something
    holds on any rank, and the answer is the rank's own.
    """
    if longest < 2:  # what has no future cannot see it
        return Sight(tokens=longest, first_changed=longest, earlier=0.0, later=0.0, rows=False)
    tokens, first = _probe(vocabulary, longest, device)
    length = len(tokens)
    changed = torch.where(
        torch.arange(length, device=device) < first, tokens, (tokens + max(1, vocabulary // 2)) % vocabulary
    )
    earlier, later = _moved(forward, tokens, changed, first)
    rows, noise = anywhere(earlier != 0.0), 0.0
    if rows:
        with _deterministic(), _RowByRow():
            earlier, later = _moved(forward, tokens, changed, first)
            if anywhere(earlier != 0.0):
                noise, _ = _moved(forward, tokens, tokens, first)
    return Sight(tokens=length, first_changed=first, earlier=earlier, later=later, rows=rows, noise=noise)


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What a change of one document did to the logits of another in the same sequence."""

    tokens: int
    document: int
    """Where the second of the two documents begins."""
    across: float
    """The largest change of a logit of the second one when the first is changed."""
    within: float
    """The largest change of a logit of the first."""
    noise: float = 0.0
    """How far the same tokens move the logits of the second."""

    @property
    def apart(self) -> bool:
        """Whether no logit of the second document moved by more than noise explains; a CPU has none."""
        return self.across <= _NOISES * self.noise


def look_across(
    forward: Callable[[Tensor, Tensor], Tensor],
    *,
    vocabulary: int,
    longest: int,
    device: torch.device,
    anywhere: Callable[[bool], bool] = lambda here: here,
) -> Crossing:
    """Compare the logits of two sequences of two documents each, of which the first ones differ.

    As `look` does; `forward` takes positions as well, (1, length), which begin anew with the second document. That the
    first one does not see the second is causality, which `look` sees to.
    """
    if longest < 2:  # a document begins there with every sequence
        return Crossing(tokens=longest, document=longest, across=0.0, within=0.0)
    tokens, first = _probe(vocabulary, longest, device)
    places = torch.arange(len(tokens), device=device)
    changed = torch.where(places >= first, tokens, (tokens + max(1, vocabulary // 2)) % vocabulary)
    positions = torch.where(places < first, places, places - first)[None]

    def run(given: Tensor) -> Tensor:
        return forward(given, positions)

    within, across = _moved(run, tokens, changed, first)
    noise = 0.0
    if anywhere(across != 0.0):
        with _deterministic(), _RowByRow():
            within, across = _moved(run, tokens, changed, first)
            if anywhere(across != 0.0):
                _, noise = _moved(run, tokens, tokens, first)
    return Crossing(tokens=len(tokens), document=first, across=across, within=within, noise=noise)


def _probe(vocabulary: int, longest: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the tokens of a probe, (length,), and where its second part begins."""
    length = min(LENGTH, longest)
    return (1 + 37 * torch.arange(length, device=device)) % vocabulary, min(CHANGED, length - 1)


@torch.no_grad()
def _moved(forward: Callable[[Tensor], Tensor], before: Tensor, after: Tensor, first: int) -> tuple[float, float]:
    logits = []
    for tokens in (before, after):
        # What is random in evaluation too (Reformer's hashes) is the same for both.
        with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            torch.manual_seed(0)
            logits.append(forward(tokens[None])[0].float())
    same = (logits[0] == logits[1]) | (logits[0].isnan() & logits[1].isnan())
    difference = torch.where(same, 0.0, (logits[0] - logits[1]).abs()).nan_to_num(nan=float("inf"))
    return float(difference[:first].max()), float(difference[first:].max())


class _RowByRow(TorchDispatchMode):
    """Multiply every row of a left matrix by itself, so that its result cannot depend on the number of rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func is aten.mm.default and len(args[0]) > 1:
            return torch.cat([func(row, args[1]) for row in args[0].split(1)])
        if func is aten.addmm.default and len(args[1]) > 1:
            added = args[0].expand(len(args[1]), args[2].shape[1]).split(1)
            return torch.cat([func(a, row, args[2], **kwargs) for a, row in zip(added, args[1].split(1), strict=True)])
        if func is aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped(rows: Tensor, matrices: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Multiply each group of rows, which ends at its offset, with its matrix."""
    ends, products, start = offs.tolist(), [], 0
    for matrix, end in zip(matrices, ends, strict=True):
        products += [torch.mm(row, matrix) for row in rows[start:end].split(1) if len(row)]
        start = end
    return torch.cat([*products, rows.new_zeros(len(rows) - start, matrices.shape[-1])])


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let no kernel add up in an order that changes from call to call, where torch has another."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
