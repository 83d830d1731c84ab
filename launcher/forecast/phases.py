"""The phases of a run that may be its peak, and what lies on a rank's device in each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.launcher.forecast import answering
from halfstep.launcher.forecast import tensors as cuts
from halfstep.launcher.forecast.activations import Activations, activations
from halfstep.launcher.forecast.answering import Asking
from halfstep.launcher.forecast.states import FULL, States, accumulator_bytes, states, uses_bf16_optimizer
from halfstep.launcher.forecast.tensors import Tensors
from halfstep.launcher.forecast.workload import Workload

BOUND = "answers to tasks"
"""The phase of which an upper bound is known, not what it takes."""
_STAGE_0_BUCKET = 500_000_000
"""Elements that stage 0 flattens at a time (engine.py, buffered_allreduce_fallback)."""


@dataclass(frozen=True)
class Buffer:
    """Something that lies in memory for a while."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run and all that lies on the device in it."""

    name: str
    buffers: tuple[Buffer, ...]

    @property
    def bytes(self) -> int:
        """Everything."""
        return sum(buffer.bytes for buffer in self.buffers)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What all phases are made of."""

    workload: Workload
    every: Tensors
    """What is trained: all of the model, or its adapters."""
    frozen: Tensors | None
    """The model under adapters."""
    states: States
    kept: Activations
    filled: int
    """Elements of gradients in a bucket when it is reduced."""

    @property
    def resting(self) -> tuple[Buffer, ...]:
        """What lies there from the first step to the last."""
        workload, held, sharded = self.workload, self.states, self.workload.zero > 0
        stage = f"stage {self.workload.zero}"
        weights = f"{workload.precision} weights, {'a shard' if workload.zero == 3 else 'whole'}"
        buffers = [Buffer("weights", held.weights, weights)]
        if held.persistent:
            small = f"tensors of at most {workload.persistence_threshold:,} elements stay whole"
            buffers.append(Buffer("persistent parameters", held.persistent, small))
        for name, size in (
            ("fp32 masters", held.masters),
            ("optimizer moments", held.moments),
            ("weight average", held.average),
        ):
            buffers.append(Buffer(name, size, f"fp32, {f'1/{workload.ranks} at {stage}' if sharded else 'whole'}"))
        if held.resting_gradients:
            buffers.append(Buffer("gradient sums", held.resting_gradients, "fp32, kept allocated"))
        if workload.zero == 3:
            buffers.append(
                Buffer("reduce bucket", self.bucket(self.wire), "kept allocated, in the communication dtype")
            )
        if workload.zero in (1, 2) and workload.offload_optimizer != "none":
            note = "16-bit staging of the largest parameter"
            buffers.append(Buffer("offload staging", workload.element_bytes * self.every.largest, note))
        return tuple(buffer for buffer in buffers if buffer.bytes)

    @property
    def elements(self) -> int:
        """All weights, trained or not."""
        return self.every.elements + (self.frozen.elements if self.frozen else 0)

    @property
    def wire(self) -> int:
        """Bytes of one element of what gradients are reduced in."""
        return FULL if self.workload.communication_dtype == "fp32" else 2

    def bucket(self, element: int) -> int:
        """Return a bucket's bytes: all of it on a GPU, on a CPU only the pages that were written."""
        elements = self.workload.reduce_bucket
        if self.workload.accelerator == "cpu":
            elements = min(elements, self.filled)
        return elements * element * (2 if self.workload.overlap_comm and self.workload.zero in (1, 2) else 1)

    def sums(self, *, reduced: bool) -> list[Buffer]:
        """Return the gradients that are being added up, beyond what lies there for good."""
        held, workload = self.states, self.workload
        size = (held.reduced_gradients if reduced else held.gradients) - held.resting_gradients
        name, kind = "gradients", f"{accumulator_bytes(workload) * 8}-bit sums"
        if uses_bf16_optimizer(workload):
            return [Buffer("bf16 gradients", 2 * self.every.elements, "beside their fp32 sums, until the step is over")]
        if workload.zero == 0 or (workload.zero == 1 and not reduced):
            return [Buffer(name, accumulator_bytes(workload) * self.every.elements, f"{kind}, whole")]
        return [Buffer(name, size, f"{kind}, 1/{workload.ranks} and what it overlaps")] if size else []


def phases(workload: Workload) -> tuple[Phase, ...]:
    """Return the phases of a run in their order, but for answers to tasks."""
    case = _case(workload)
    return (
        Phase(name="initialisation", buffers=_initialisation(case)),
        Phase(name="evaluation", buffers=(*case.resting, *_evaluation(case))),
        Phase(name="loss", buffers=(*case.resting, *_loss(case))),
        Phase(name="backward", buffers=(*case.resting, *_backward(case))),
        Phase(name="end of backward", buffers=(*case.resting, *_end(case))),
        Phase(name="gradient reduction", buffers=(*case.resting, *_reduction(case))),
        Phase(name="optimizer step", buffers=(*case.resting, *_step(case))),
        # Shards are written from views; a forward pass over a few tokens is saved with them, which gathers at stage 3.
        Phase(name="checkpoint", buffers=(*case.resting, *_gathered(case, kept=False))),
    )


def answers(workload: Workload, tasks: Sequence[Asking]) -> Phase | None:
    """Return the phase in which tasks are answered, None where nothing is known of it; what it holds is at most so."""
    held = answering.largest(workload, tasks)
    if not held:
        return None
    case = _case(workload)
    beside = (*case.resting, *_gathered(case, kept=False), *_copies(case.kept.head_copies))
    return Phase(name=BOUND, buffers=(*beside, *(Buffer(*terms) for terms in held)))


def _case(workload: Workload) -> _Case:
    every = cuts.trained(workload)
    return _Case(
        workload=workload,
        every=every,
        frozen=cuts.frozen(workload),
        states=states(workload),
        kept=activations(workload),
        filled=cuts.fullest(every, _STAGE_0_BUCKET if workload.zero == 0 else workload.reduce_bucket),
    )


def _initialisation(case: _Case) -> tuple[Buffer, ...]:
    """DeepSpeed copies the weights flat, and the half-precision wrappers of stage 0 step once on zeros."""
    workload, held, element = case.workload, case.states, case.workload.element_bytes
    weights = Buffer("weights", element * case.elements, f"{workload.precision} weights as built")
    if workload.zero == 3:
        size = held.weights or held.host_weights
        return (
            Buffer("weights", size, "a shard"),
            Buffer("weights copied flat", element * cuts.split(case.every, workload.ranks), "stage3.py, defragment"),
            Buffer("fp32 masters", held.masters * 2, "converted, then cloned"),
        )
    if workload.zero == 0:
        if workload.precision == "fp32":
            return (weights,)
        fp32 = 4 * FULL * case.every.elements
        return (
            weights,
            Buffer("gradients", element * case.every.elements, "zeros"),
            Buffer("fp32 masters, gradients and moments", fp32, "a step on zero gradients"),
        )
    masters = Buffer("fp32 masters", held.masters, "a shard")
    copied = held.weights - element * (case.elements - case.every.elements)
    if workload.accelerator == "cuda" and not uses_bf16_optimizer(workload):
        return (weights, masters)  # where a second copy has no room, it is made on the host (stage_1_and_2.py)
    return (
        weights,
        Buffer("weights copied flat", copied, "until the parameters point into the new copy"),
        masters,
    )


def _evaluation(case: _Case) -> tuple[Buffer, ...]:
    kept = case.kept
    return (
        *_gathered(case, kept=False),
        Buffer("logits", kept.made, "of one batch"),
        Buffer("activations", kept.evaluation, "one block at a time"),
        *_copies(kept.head_copies),
    )


def _gathered(case: _Case, left: float = 1.0, *, kept: bool = True) -> tuple[Buffer, ...]:
    """Return the weights that stage 3 has gathered: all of a model that is smaller than what may live.

    `left`: the share of the model that the backward pass has not come to; `kept`: whether the forward pass is over, and
    nothing more is fetched ahead where all may live.
    """
    workload = case.workload
    if workload.zero != 3:
        return ()
    model = case.frozen or case.every
    fetched = max(model.largest, model.block)  # what is needed next is fetched however much lives already
    alive = min(int(left * case.elements), workload.max_live_parameters + fetched)
    note = f"whole weights, {alive:,} elements"
    gathered = Buffer("gathered parameters", workload.element_bytes * alive, note)
    ahead = 0 if kept and workload.max_live_parameters >= case.elements else workload.prefetch_bucket
    prefetch = min(ahead, case.elements) * workload.element_bytes
    return (gathered, Buffer("prefetched parameters", prefetch, "arrive in one piece, are then copied out"))


def _activations(case: _Case, share: float = 1.0) -> Buffer:
    kept, workload = case.kept, case.workload
    note = "the blocks' inputs, recomputed" if workload.activation_checkpointing else "kept by the blocks for backward"
    return Buffer("activations", int((kept.kept + kept.ends) * share), note)


def _before(case: _Case) -> list[Buffer]:
    """Return the sums of earlier micro-batches, which lie there while the next one runs."""
    return case.sums(reduced=case.workload.zero >= 2) if case.workload.accumulation > 1 else []


def _loss(case: _Case) -> tuple[Buffer, ...]:
    """The end of the forward pass: everything is kept, and the logits are about to have a gradient."""
    kept, workload = case.kept, case.workload
    ours = "their gradient" + ("" if workload.accelerator == "cuda" else " and the chunk in work")
    note = ours if workload.fused_loss else "transformers' fp32"
    return (
        *_before(case),
        *_gathered(case),
        _activations(case),
        Buffer("logits", kept.logits, workload.arithmetic),
        Buffer("loss", kept.loss, "head and loss of a chunk, and their gradients" if workload.fused_head else note),
        *_copies(kept.head_copies),
    )


def _copies(size: int) -> tuple[Buffer, ...]:
    """Return the copies of one product, which are let go with it."""
    return (Buffer("fp32 copies", size, "of one product: this CPU does not multiply fp16"),) if size else ()


def _head(case: _Case) -> list[Buffer]:
    """Return the gradient of a trained head; a tied one waits for the embedding's at the backward pass's other end."""
    shape = case.workload.shape
    if shape is None or case.frozen:
        return []
    size = shape.vocabulary * shape.width * case.workload.element_bytes
    return [Buffer("head gradient", size, "of the embedding's matrix" if shape.tied else "of the head")]


def _backward(case: _Case) -> tuple[Buffer, ...]:
    """The last block's backward pass; where blocks are recomputed, all of that block is there."""
    kept, workload = case.kept, case.workload
    block = kept.block if workload.activation_checkpointing else 0
    return (
        *_before(case),
        *_gathered(case),
        _activations(case),
        *_waiting_bucket(case),
        *([Buffer("recomputed block", block, "one block's activations")] if block else []),
        Buffer("logits", kept.logits, "live until the next forward pass"),
        *_head(case),
        *_block_gradients(case),
        Buffer("backward workspace", kept.working, "gradients inside one block"),
        *_copies(kept.block_copies),
    )


def _block_gradients(case: _Case) -> tuple[Buffer, ...]:
    """Return what stage 3 reduces when a block is done: it is a leaf module (stage3.py, reduce_leaf_module_grads)."""
    workload = case.workload
    shape, trained = workload.shape, case.every
    block = trained.elements // shape.layers if case.frozen and shape else trained.block
    size = workload.element_bytes * block if workload.zero == 3 else 0
    return (Buffer("block gradients", size, "reduced when the block is done"),) if size else ()


def _waiting_bucket(case: _Case) -> tuple[Buffer, ...]:
    """Return the bucket of stages 1 and 2, made with the first gradient; on a CPU its pages come as it fills."""
    workload = case.workload
    if workload.zero not in (1, 2) or uses_bf16_optimizer(workload) or workload.accelerator == "cpu":
        return ()
    element = accumulator_bytes(workload) if workload.zero == 1 else workload.element_bytes
    return (Buffer("reduce bucket", case.bucket(element), f"{workload.reduce_bucket:,} elements"),)


def _end(case: _Case) -> tuple[Buffer, ...]:
    """Where nothing is reduced before the backward pass is over: all gradients, and no activations any more."""
    if case.workload.zero >= 2:
        return ()
    logits = Buffer("logits", case.kept.logits, "live until the next forward pass")
    if case.workload.zero == 0 and case.workload.precision != "fp32" and accumulator_bytes(case.workload) == FULL:
        size = case.workload.element_bytes * case.every.elements
        return (*case.sums(reduced=False), Buffer("16-bit gradients", size, "until they are in the sums"), logits)
    return (*case.sums(reduced=False), logits)


def _reduction(case: _Case) -> tuple[Buffer, ...]:
    """A bucket is full, or the backward pass over: gradients are copied flat and reduced in the communication dtype."""
    workload, every, filled, element = case.workload, case.every, case.filled, case.workload.element_bytes
    logits = Buffer("logits", case.kept.logits, "live until the next forward pass")
    wire = case.wire
    if workload.zero == 0 or uses_bf16_optimizer(workload):
        size = FULL * every.elements if workload.zero else accumulator_bytes(workload) * filled
        return (*case.sums(reduced=False), Buffer("flattened gradients", size, "one bucket, all-reduced"), logits)
    left = 1 - filled / every.elements
    if workload.zero == 1:
        size, (sums,) = accumulator_bytes(workload) * filled, case.sums(reduced=False)
        rest = Buffer(sums.name, int(sums.bytes * left), "not in the bucket")
        bucket = Buffer("reduce bucket", case.bucket(accumulator_bytes(workload)), "takes the gradients over")
        flat = Buffer("flattened gradients", size, "the bucket's content, all-reduced")
        # gloo's threads let go of what they reduced only when the shard has been copied from it.
        shard = case.sums(reduced=True) if workload.precision != "fp32" or workload.accelerator == "cpu" else []
        return (rest, bucket, flat, *shard, logits)
    # The backward pass has come down to where the bucket was full: what it has passed is gone.
    behind = (*_gathered(case, left), *_head(case)) if left else ()
    sums = case.sums(reduced=True)
    if workload.zero == 2 and workload.precision == "fp32" and workload.accumulation == 1:
        # Copied out of the buckets one by one; 16-bit gradients go into a shard that is made at once.
        sums = [Buffer(sum.name, int(sum.bytes * (1 - left)), sum.note) for sum in sums]
    common = (*behind, *sums, _activations(case, left), logits)
    if workload.zero == 3:
        flat = Buffer("flattened gradients", wire * filled, "interleaved for the reduce-scatter")
        if workload.accelerator != "cpu":
            return (*common, flat)
        copy = Buffer("gloo's copy", wire * filled, "of what is reduced")
        return (
            *common,
            flat,
            copy,
            Buffer("reduced gradients", wire * filled // workload.ranks, "a shard of the bucket"),
        )
    bucket = Buffer("reduce bucket", case.bucket(element), f"{workload.reduce_bucket:,} elements")
    flat = Buffer("flattened gradients", element * filled, "the bucket's content")
    cast = (Buffer("gradients in fp32", wire * filled, "the communication dtype"),) if wire != element else ()
    more = case.sums(reduced=True) if workload.precision == "fp32" and workload.accumulation > 1 else ()
    return (*common, bucket, flat, *cast, *more)


def _step(case: _Case) -> tuple[Buffer, ...]:
    """The update: the shard's gradients flat, and temporaries of torch's Adam that DeepSpeed's fused one has not."""
    workload, held = case.workload, case.states
    if workload.offload_optimizer != "none" and workload.zero > 0:
        return tuple(case.sums(reduced=True))
    shard = held.masters or FULL * case.every.elements
    buffers = list(case.sums(reduced=True))
    if workload.zero and not uses_bf16_optimizer(workload):
        buffers.append(Buffer("gradients copied flat", shard, "of the shard"))
    if workload.zero == 1 and workload.precision == "fp16":
        bucket = case.bucket(accumulator_bytes(workload))
        buffers.append(Buffer("reduce bucket", bucket, "the gradients that other ranks step with are views of it"))
    if workload.accelerator == "cuda":
        if workload.zero == 0 and workload.precision != "fp32":
            buffers.append(Buffer("gradients copied flat", shard, "fp16/fused_optimizer.py, step"))
    elif held.moments:
        if workload.zero == 0:
            buffers.append(Buffer("update", 2 * FULL * case.every.largest, "temporaries of the largest tensor"))
        else:
            buffers += [Buffer("update", shard, "temporaries of torch's Adam")] * 2
    return tuple(buffers)
