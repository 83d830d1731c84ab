"""A shape's parameters one by one, in the model's order, and how DeepSpeed cuts them into shards."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from halfstep.launcher.forecast.workload import Workload
from halfstep.models.lora import Linear, matrices
from halfstep.models.shapes import Shape, parameters

_PIECES_OF_AN_UNKNOWN_MODEL = 64
_ALIGNMENT = 2
"""Flat groups are padded to a multiple of this times the ranks (stage_1_and_2.py, nccl_start_alignment_factor)."""


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, or every cache below would hash the lists
class Tensors:
    """The elements of every parameter; matrices and vectors are the two groups of the optimizer (engine/build.py)."""

    sizes: tuple[int, ...]
    """Elements of each parameter, in the model's order."""
    matrices: tuple[int, ...]
    """Those of two and more dimensions, which weight decay is for."""
    vectors: tuple[int, ...]
    """Biases and gains of norms."""
    tables: int = 0
    """Elements of the embeddings, and of a head of its own."""
    block: int = 0
    """Elements of a block, which stage 3 fetches as a whole; 0 where that is not known."""

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The optimizer's parameter groups that are not empty."""
        return tuple(group for group in (self.matrices, self.vectors) if group)

    @cached_property
    def elements(self) -> int:
        """All parameters."""
        return sum(self.sizes)

    @cached_property
    def hidden(self) -> int:
        """Elements of the matrices that are no tables."""
        return sum(self.matrices) - self.tables

    @cached_property
    def largest(self) -> int:
        """The largest parameter."""
        return max(self.sizes)


@lru_cache(maxsize=256)
def of(shape: Shape | None, total: int) -> Tensors:
    """List the parameters of a shape; of an unknown one, `total` elements in equal pieces that stand for them."""
    if shape is None or parameters(shape) != total:
        piece = max(1, total // _PIECES_OF_AN_UNKNOWN_MODEL)
        sizes = (piece,) * (_PIECES_OF_AN_UNKNOWN_MODEL - 1)
        sizes = (*sizes, total - sum(sizes)) if total > sum(sizes) else (total,)
        return Tensors(sizes=sizes, matrices=sizes, vectors=())
    table = shape.vocabulary * shape.width
    block = _gpt2_block(shape) if shape.family == "gpt2" else _llama_block(shape)
    before = [(table, True)]
    after = [(shape.width, False)]
    if shape.family == "gpt2":
        before.append((shape.positions * shape.width, True))
        after.append((shape.width, False))
    if not shape.tied:
        after.append((table, True))
    every = [*before, *block * shape.layers, *after]
    return Tensors(
        sizes=tuple(size for size, _ in every),
        matrices=tuple(size for size, matrix in every if matrix),
        vectors=tuple(size for size, matrix in every if not matrix),
        tables=sum(size for size, _ in before) + (0 if shape.tied else table),
        block=sum(size for size, _ in block),
    )


@lru_cache(maxsize=256)
def of_adapters(layers: tuple[Linear, ...], rank: int) -> Tensors:
    """List the matrices of low-rank adapters."""
    sizes = matrices(layers, rank)
    return Tensors(sizes=sizes, matrices=sizes, vectors=())


def trained(workload: Workload) -> Tensors:
    """List what has gradients, masters and optimizer states: every parameter, or the adapters alone."""
    if workload.adapter_rank:
        return of_adapters(workload.adapted, workload.adapter_rank)
    return of(workload.shape, workload.parameters)


def frozen(workload: Workload) -> Tensors | None:
    """List what has none; None where every parameter is trained."""
    return of(workload.shape, workload.parameters) if workload.adapter_rank else None


def _gpt2_block(shape: Shape) -> list[tuple[int, bool]]:
    h, f = shape.width, shape.ffn
    norm = [(h, False), (h, False)]
    attention = [(3 * h * h, True), (3 * h, False), (h * h, True), (h, False)]
    return [*norm, *attention, *norm, (h * f, True), (f, False), (f * h, True), (h, False)]


def _llama_block(shape: Shape) -> list[tuple[int, bool]]:
    h, f, query, kv = shape.width, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = []
    for rows, columns, bias in ((query, h, shape.qkv_bias), (kv, h, shape.qkv_bias), (kv, h, shape.qkv_bias)):
        attention += [(rows * columns, True), *([(rows, False)] if bias else [])]
    attention += [(h * query, True), *([(h, False)] if shape.output_bias else [])]
    attention += [(shape.head_dim, False)] * (2 * shape.qk_norm)
    mlp = []
    for rows, columns in ((f, h), (f, h), (h, f)):
        mlp += [(rows * columns, True), *([(rows, False)] if shape.mlp_bias else [])]
    return [*attention, *mlp, (h, False), (h, False)]


@lru_cache(maxsize=1024)
def flat(tensors: Tensors, ranks: int) -> int:
    """Return the elements of the flat buffers of stages 1 and 2: each group padded to whole, aligned shards."""
    step = _ALIGNMENT * ranks
    return sum(-(-sum(group) // step) * step for group in tensors.groups)


@lru_cache(maxsize=1024)
def split(tensors: Tensors, ranks: int) -> int:
    """Return the elements of one rank's part at stage 3, where every tensor is cut and padded by itself."""
    return sum(-(-size // ranks) for size in tensors.sizes)


@lru_cache(maxsize=1024)
def persistent(tensors: Tensors, threshold: int) -> int:
    """Return the elements in tensors of at most a threshold: at stage 3, those that stay whole on every rank."""
    return sum(size for size in tensors.sizes if size <= threshold)


@lru_cache(maxsize=1024)
def touched(tensors: Tensors, ranks: int) -> tuple[int, ...]:
    """Return for each rank the elements of all parameters of which its shard at stages 1 and 2 has a part.

    In fp32 those stages keep whole gradients for them (stage_1_and_2.py, copy_grads_in_partition).
    """
    counted = [0] * ranks
    for group in tensors.groups:
        share = -(-sum(group) // (_ALIGNMENT * ranks)) * _ALIGNMENT
        start = 0
        for size in group:
            for rank in range(start // share, min(ranks - 1, (start + size - 1) // share) + 1):
                counted[rank] += size
            start += size
    return tuple(counted)


@lru_cache(maxsize=1024)
def fullest(tensors: Tensors, bucket: int) -> int:
    """Return the elements in a bucket when it is fullest: gradients come from the last parameter to the first."""
    most = filled = 0
    for size in reversed(tensors.sizes):
        if filled and filled + size > bucket:
            filled = 0
        filled += size
        most = max(most, filled)
    return most
