"""What a micro-batch keeps for its backward pass, in bytes: blocks, checkpoints, logits and the loss.

Coefficients are of transformers' GPT-2 (with the fused tanh GELU) and Llama, with torch's scaled-dot-product attention;
a test holds them against the tensors that autograd really saves.
"""

from dataclasses import dataclass

from halfstep.launcher.forecast.states import FULL
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.system.heap import MAPPED
from halfstep.models import shapes
from halfstep.models.shapes import Shape

_CPU_CHUNK = 4 << 18
"""Bytes in fp32 that our loss works on at a time on a CPU (models/loss.py)."""
_KERNEL_ROW = 20
"""Bytes a token of our loss on a GPU (models/loss_kernels.py): its factor, log-sum-exp and loss, its target again."""
_HF_LOSS_KEPT, _HF_LOSS_PEAK = 4, 14
"""Bytes a logit of transformers' ForCausalLMLoss with 16-bit logits: fp32 copies (planner facts, section 4)."""
_UNKNOWN_BLOCK = 16
"""Elements a token and hidden element of a block that is not known: GPT-2's."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    block: int
    """Kept by one block for its backward pass."""
    kept: int
    """Kept by all blocks when the forward pass is over: everything, or the blocks' inputs where they are recomputed."""
    ends: int
    """Kept outside the blocks: the last norm, dropout of the embedding."""
    working: int
    """What one block's backward pass holds beside what was kept."""
    logits: int
    """The logits, which live until the next forward pass has made new ones; none where the head is fused."""
    made: int
    """The logits that the head makes at a time."""
    loss: int
    """What the loss holds more, at its worst."""
    head_copies: int
    """Where products are made of fp32 copies: those of the head's weights, input and output."""
    block_copies: int
    """The same of a block's widest layer."""
    heap: int
    """Of what a block's two passes hold at most, what lies in tensors that a CPU's C library does not map."""
    evaluation: int
    """A forward pass that keeps nothing: one block's largest moment."""


def activations(workload: Workload) -> Activations:
    """Return the activations of a workload; of a family that is not known, GPT-2's of its width or nothing at all."""
    shape = workload.shape
    if shape is None:
        return Activations(
            block=0,
            kept=0,
            ends=0,
            working=0,
            logits=0,
            made=0,
            loss=0,
            head_copies=0,
            block_copies=0,
            heap=0,
            evaluation=0,
        )
    tokens, element, low = workload.micro * workload.sequence, workload.element_bytes, workload.product_bytes
    unmasked = _block(workload, shape) * tokens
    # A boolean for each pair of tokens, and what every attention makes of them and keeps: a number to add to a score.
    pairs = workload.micro * workload.sequence**2 if workload.documents_apart else 0
    block = unmasked + low * pairs
    hidden = element * shape.width * tokens
    norm = hidden if shape.family == "gpt2" else _rms_norm(workload, shape) * tokens
    norm += low * shape.width * tokens if shape.family == "gpt2" or workload.autocast else 0
    headed = shapes.head_tokens(tokens, shape.vocabulary, on_cpu=workload.accelerator == "cpu")
    headed = headed if workload.fused_head else tokens
    made = low * shape.vocabulary * headed
    loss = made + _loss_work(workload, shape, headed) if workload.fused_loss else _hf_loss(workload, made)
    if workload.fused_head:  # the logits beside their gradient, that of the hidden states, of the weights with its sums
        loss += made + hidden + 2 * FULL * shape.vocabulary * shape.width
    widest = max(2 * shape.ffn, 4 * shape.width)
    copied = _weight_copies(workload, shape)
    return Activations(
        block=block,
        kept=_adapters(workload, tokens)
        + shape.layers * (hidden if workload.activation_checkpointing else block)
        + (copied.head + copied.block * (1 if workload.activation_checkpointing else shape.layers)),
        ends=pairs + norm + (_dropped(workload, shape) * shape.width * tokens if shape.family == "gpt2" else 0),
        working=(low * widest + element * 2 * shape.width) * tokens,
        logits=0 if workload.fused_head else made,
        made=made,
        loss=loss,
        head_copies=_copies(workload, headed, shape.width, shape.vocabulary),
        block_copies=_copies(workload, tokens, shape.width, max(shape.ffn, 3 * shape.width)),
        heap=_heap(workload, shape, unmasked),
        evaluation=(low * widest + element * 3 * shape.width) * tokens
        + (1 + low) * pairs
        + copied.head
        + copied.block * shape.layers,
    )


def _adapters(workload: Workload, tokens: int) -> int:
    """Return what adapters keep: A's products, and with dropout its inputs once more, and what dropout keeps."""
    inputs = sum(layer.inputs for layer in workload.adapted)
    dropped = (2 if workload.accelerator == "cpu" else 1.5) * inputs if workload.adapter_dropout else 0
    blocks = workload.shape.layers if workload.shape and workload.activation_checkpointing else 1
    return int(workload.product_bytes * tokens * (workload.adapter_rank * len(workload.adapted) + dropped) / blocks)


def _heap(workload: Workload, shape: Shape, block: int) -> int:
    tokens, element = workload.micro * workload.sequence, workload.element_bytes
    hidden, wide = element * shape.width * tokens, workload.product_bytes * shape.ffn * tokens
    if hidden >= MAPPED:
        return 0
    if wide >= MAPPED:  # what is as wide as the feed-forward layer is mapped
        block -= (2 if shape.family == "gpt2" else 4) * wide
        working = 4 * hidden
    else:
        working = max(2 * wide, 4 * hidden) + 2 * hidden
    kept = hidden * shape.layers + block if workload.activation_checkpointing else block * shape.layers
    return kept + working


def _copies(workload: Workload, tokens: int, width: int, out: int) -> int:
    return 4 * (tokens * (width + out) + width * out) if workload.widened else 0


def _block(workload: Workload, shape: Shape) -> int:
    """Return the bytes a token that one block keeps."""
    element, low, h, f = workload.element_bytes, workload.product_bytes, shape.width, shape.ffn
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.family == "gpt2":
        # Two norms' inputs and outputs, query, key and value, the attention's output; the wide layer before and after.
        size = element * 2 * h + low * (6 * h + 2 * f) + 2 * _dropped(workload, shape) * h
    else:
        # Two norms; query, key, value and the output; gate, its SiLU, up and their product.
        # With a mask keys and values are copied for every head (transformers, use_gqa_in_sdpa).
        attended = query if workload.documents_apart else kv
        size = 2 * _rms_norm(workload, shape) + low * (2 * query + 2 * attended + 4 * f)
        # Autocast makes a copy for each of the five layers that read what a norm has made.
        size += low * 5 * h if workload.autocast else 0
        if shape.qk_norm:
            size += (8 if element == 4 else 6) * (query + kv)
    if shape.dropout and workload.accelerator == "cpu":
        # No fused kernel has dropout there: queries, keys and values of every head in fp32, and three fp32 matrices of
        # the scores (softmax, noise, product).
        return size - low * (query + 2 * kv) + 12 * query + 12 * shape.heads * workload.sequence
    return size + 4 * shape.heads


def _rms_norm(workload: Workload, shape: Shape) -> int:
    """Return the bytes a token that Llama's norm keeps: in 16 bits an fp32 copy of its input, normed, and scaled.

    What autocast multiplies is a copy of what is scaled, which then goes.
    """
    return shape.width * (12 if workload.product_bytes == 4 else 8)


@dataclass(frozen=True)
class _Copies:
    """Bytes of autocast's 16-bit copies of weights, which live until the backward pass has used them."""

    block: int = 0
    head: int = 0


def _weight_copies(workload: Workload, shape: Shape) -> _Copies:
    """Return the copies of one block and of the head; none where the weights are what is multiplied."""
    if not workload.autocast:
        return _Copies()
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    feed = (2 if shape.family == "gpt2" else 3) * shape.ffn
    low = workload.product_bytes
    return _Copies(block=low * shape.width * (2 * query + 2 * kv + feed), head=low * shape.width * shape.vocabulary)


def _dropped(workload: Workload, shape: Shape) -> int:
    """Return the bytes an element that one dropout keeps: on a CPU the noise itself, elsewhere a mask."""
    if shape.dropout == 0:
        return 0
    return workload.product_bytes if workload.accelerator == "cpu" else 1


def _loss_work(workload: Workload, shape: Shape, tokens: int) -> int:
    """Return what our loss holds beside the gradient of the logits: a few numbers a row, on a CPU a chunk in fp32."""
    return _KERNEL_ROW * tokens if workload.accelerator == "cuda" else min(_CPU_CHUNK, 4 * shape.vocabulary * tokens)


def _hf_loss(workload: Workload, logits: int) -> int:
    elements = logits // workload.product_bytes
    return (_HF_LOSS_PEAK + (2 if workload.product_bytes == 4 else 0)) * elements - logits
