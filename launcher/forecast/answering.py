"""What a rank holds while the model answers a task: keys and values, logits and one block's activations, in bytes.

Upper bounds: a prompt is as long as the longest row of the task's data can make it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.launcher.forecast.states import FULL
from halfstep.launcher.forecast.workload import Workload
from halfstep.models.shapes import Shape

_BYTES_PER_TOKEN = 2
"""Of text; few tokenizers cut it finer. This library's Python has 3.2 at 4,096 tokens, natural text 4 and more."""
_SCORES = {True: 4, False: 1}
"""Numbers in fp32 of each token of the vocabulary: of a beam search its log-softmax and sums, else the logits alone
(transformers' generation/utils.py, _beam_search and _sample)."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a task asks."""

    name: str
    rows: int
    """Sequences at a time."""
    longest: int
    """Bytes of the longest prompt, with what is scored behind it, at most."""
    context: int
    """Tokens that the model looks at."""
    new_tokens: int = 0
    """Tokens that an answer may have; 0: nothing is generated."""
    beams: int = 1
    scored: bool = False
    """Whether the likelihood of given texts is asked for."""

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt that is continued, at most."""
        return self._tokens(self.context - self.new_tokens)

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence that is scored, at most."""
        return self._tokens(self.context)

    def _tokens(self, room: int) -> int:
        return max(1, min(room, -(-self.longest // _BYTES_PER_TOKEN)))


def largest(workload: Workload, tasks: Sequence[Asking]) -> list[tuple[str, int, str]]:
    """Return name, bytes and note of all that the largest answers of some tasks take; nothing of an unknown family."""
    shape = workload.shape
    if shape is None:
        return []
    ways = [_generated(workload, shape, task) for task in tasks if task.new_tokens]
    ways += [_scored(workload, shape, task) for task in tasks if task.scored]
    return max(ways, key=lambda terms: sum(size for _, size, _ in terms), default=[])


def _generated(workload: Workload, shape: Shape, task: Asking) -> list[tuple[str, int, str]]:
    rows, low = task.rows * task.beams, workload.product_bytes
    tokens = task.prompt + task.new_tokens
    cache = 2 * low * shape.layers * shape.kv_heads * shape.head_dim * rows * tokens
    pairs = (1 + low) * rows * task.prompt**2  # prompts of different lengths are padded, and a mask says so
    scores = (low + FULL * _SCORES[task.beams > 1]) * rows * shape.vocabulary
    return [
        ("keys and values", cache, f"of {rows:,} sequences of up to {tokens:,} tokens, task {task.name}"),
        ("cache being lengthened", cache // (2 * shape.layers), "a layer's keys or values, copied at each token"),
        ("logits", scores, "of one token"),
        ("activations", _block(workload, shape) * rows * task.prompt + pairs, "of the prompts, one block at a time"),
    ]


def _scored(workload: Workload, shape: Shape, task: Asking) -> list[tuple[str, int, str]]:
    tokens, low = task.rows * task.sequence, workload.product_bytes
    likelihoods = 2 * FULL * shape.vocabulary * task.sequence
    return [
        ("logits", low * shape.vocabulary * tokens, f"of {task.rows:,} sequences, task {task.name}"),
        ("likelihoods", likelihoods, "fp32, of one sequence at a time"),
        ("activations", _block(workload, shape) * tokens, "one block at a time"),
    ]


def _block(workload: Workload, shape: Shape) -> int:
    """Return the bytes a token of a block's largest moment in a pass that keeps nothing (activations.py)."""
    wide = max(2 * shape.ffn, 4 * shape.width)
    return workload.product_bytes * wide + workload.element_bytes * 3 * shape.width
