"""The moments of a run that may be its peak, and what lies on a rank's device in each of them."""

from dataclasses import dataclass

from halfstep.launcher.forecast import tensors as cuts
from halfstep.launcher.forecast.activations import Activations, activations
from halfstep.launcher.forecast.buffers import Buffer, Moment, one
from halfstep.launcher.forecast.states import FULL, States, accumulator_bytes, states, uses_bf16_optimizer
from halfstep.launcher.forecast.tensors import Tensors
from halfstep.launcher.forecast.workload import Setting

_STAGE_0_BUCKET = 500_000_000
"""Elements that stage 0 flattens at a time (engine.py, buffered_allreduce_fallback)."""


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What all moments are made of."""

    setting: Setting
    every: Tensors
    states: States
    kept: Activations
    filled: int
    """Elements of gradients in a bucket when it is reduced."""

    @property
    def resting(self) -> tuple[Buffer, ...]:
        """What lies there from the first step to the last."""
        setting, held, sharded = self.setting, self.states, self.setting.zero > 0
        stage = f"stage {self.setting.zero}"
        weights = f"{setting.precision} weights, {'a shard' if setting.zero == 3 else 'whole'}"
        found = [one("weights", held.weights, weights)]
        if held.persistent:
            small = f"tensors of at most {setting.persistence_threshold:,} elements stay whole"
            found.append(one("persistent parameters", held.persistent, small))
        for name, size in (("fp32 masters", held.masters), ("optimizer moments", held.moments)):
            found.append(one(name, size, f"fp32, {f'1/{setting.ranks} at {stage}' if sharded else 'whole'}"))
        if held.resting_gradients:
            found.append(one("gradient sums", held.resting_gradients, "fp32, kept allocated"))
        if setting.zero == 3:
            found.append(one("reduce bucket", self.bucket(self.wire), "kept allocated, in the communication dtype"))
        if setting.zero in (1, 2) and setting.offload_optimizer != "none":
            note = "16-bit staging of the largest parameter"
            found.append(one("offload staging", setting.element_bytes * self.every.largest, note))
        return tuple(buffer for buffer in found if buffer.bytes)

    @property
    def wire(self) -> int:
        """Bytes of one element of what gradients are reduced in."""
        return FULL if self.setting.communication_dtype == "fp32" else 2

    def bucket(self, element: int) -> int:
        """Return a bucket's bytes: all of it on a GPU, on a CPU only the pages that were written."""
        elements = self.setting.reduce_bucket
        if self.setting.accelerator == "cpu":
            elements = min(elements, self.filled)
        return elements * element * (2 if self.setting.overlap_comm and self.setting.zero in (1, 2) else 1)

    def sums(self, *, reduced: bool) -> list[Buffer]:
        """Return the gradients that are being added up, beyond what lies there for good."""
        held, setting = self.states, self.setting
        size = (held.reduced_gradients if reduced else held.gradients) - held.resting_gradients
        name, kind = "gradients", f"{accumulator_bytes(setting) * 8}-bit sums"
        if uses_bf16_optimizer(setting):
            return [one("bf16 gradients", 2 * self.every.elements, "beside their fp32 sums, until the step is over")]
        if setting.zero == 0 or (setting.zero == 1 and not reduced):
            return [one(name, accumulator_bytes(setting) * self.every.elements, f"{kind}, whole")]
        return [one(name, size, f"{kind}, 1/{setting.ranks} and what it overlaps")] if size else []


def moments(setting: Setting) -> tuple[Moment, ...]:
    """Return the moments of a run in their order."""
    every = cuts.of(setting.shape, setting.parameters)
    case = _Case(
        setting=setting,
        every=every,
        states=states(setting),
        kept=activations(setting),
        filled=cuts.fullest(every, _STAGE_0_BUCKET if setting.zero == 0 else setting.reduce_bucket),
    )
    found = [
        Moment(name="initialisation", buffers=_initialisation(case)),
        Moment(name="evaluation", buffers=(*case.resting, *_evaluation(case))),
        Moment(name="loss", buffers=(*case.resting, *_loss(case))),
        Moment(name="backward", buffers=(*case.resting, *_backward(case))),
        Moment(name="end of backward", buffers=(*case.resting, *_end(case))),
        Moment(name="gradient reduction", buffers=(*case.resting, *_reduction(case))),
        Moment(name="optimizer step", buffers=(*case.resting, *_step(case))),
        # Shards are written from views; a forward pass over a few tokens is saved with them, which gathers at stage 3.
        Moment(name="checkpoint", buffers=(*case.resting, *_gathered(case, kept=False))),
    ]
    return tuple(found)


def _initialisation(case: _Case) -> tuple[Buffer, ...]:
    """DeepSpeed copies the weights flat, and the half-precision wrappers of stage 0 step once on zeros."""
    setting, held, element = case.setting, case.states, case.setting.element_bytes
    weights = one("weights", element * case.every.elements, f"{setting.precision} weights as built")
    if setting.zero == 3:
        size = held.weights or held.host_weights
        return (
            one("weights", size, "a shard"),
            one("weights copied flat", size, "stage3.py, defragment"),
            one("fp32 masters", held.masters * 2, "converted, then cloned"),
        )
    if setting.zero == 0:
        if setting.precision == "fp32":
            return (weights,)
        fp32 = 4 * FULL * case.every.elements
        return (
            weights,
            one("gradients", element * case.every.elements, "zeros"),
            one("fp32 masters, gradients and moments", fp32, "a step on zero gradients"),
        )
    masters = one("fp32 masters", held.masters, "a shard")
    if setting.accelerator == "cuda" and not uses_bf16_optimizer(setting):
        return (weights, masters)  # where a second copy has no room, it is made on the host (stage_1_and_2.py)
    return (weights, one("weights copied flat", held.weights, "until the parameters point into the new copy"), masters)


def _evaluation(case: _Case) -> tuple[Buffer, ...]:
    kept = case.kept
    return (
        *_gathered(case, kept=False),
        one("logits", kept.logits, "of one batch"),
        one("activations", kept.evaluation, "one block at a time"),
        *_copies(kept.head_copies),
    )


def _gathered(case: _Case, left: float = 1.0, *, kept: bool = True) -> tuple[Buffer, ...]:
    """Return the weights that stage 3 has gathered: all of a model that is smaller than what may live.

    `left`: the share of the model that the backward pass has not come to; `kept`: whether the forward pass is over, and
    nothing more is fetched ahead where all may live.
    """
    setting = case.setting
    if setting.zero != 3:
        return ()
    alive = min(int(left * case.every.elements), setting.max_live_parameters + case.every.largest)
    note = f"whole weights, {alive:,} elements"
    gathered = one("gathered parameters", setting.element_bytes * alive, note)
    ahead = 0 if kept and setting.max_live_parameters >= case.every.elements else setting.prefetch_bucket
    prefetch = min(ahead, case.every.elements) * setting.element_bytes
    return (gathered, one("prefetched parameters", prefetch, "arrive in one piece, are then copied out"))


def _activations(case: _Case, share: float = 1.0) -> Buffer:
    kept, setting = case.kept, case.setting
    note = "the blocks' inputs, recomputed" if setting.activation_checkpointing else "kept by the blocks for backward"
    return one("activations", int((kept.kept + kept.ends) * share), note)


def _before(case: _Case) -> list[Buffer]:
    """Return the sums of earlier micro-batches, which lie there while the next one runs."""
    return case.sums(reduced=case.setting.zero >= 2) if case.setting.accumulation > 1 else []


def _loss(case: _Case) -> tuple[Buffer, ...]:
    """The end of the forward pass: everything is kept, and the logits are about to have a gradient."""
    kept, note = case.kept, "their gradient and the chunk in work" if case.setting.fused_loss else "transformers' fp32"
    return (
        *_before(case),
        *_gathered(case),
        _activations(case),
        one("logits", kept.logits, f"{case.setting.precision}"),
        one("loss", kept.loss, note),
        *_copies(kept.head_copies),
    )


def _copies(size: int) -> tuple[Buffer, ...]:
    """Return the copies of one product, which are let go with it."""
    return (one("fp32 copies", size, "of one product: this CPU does not multiply fp16"),) if size else ()


def _head(case: _Case) -> list[Buffer]:
    """Return the gradient of a tied head, which waits for the embedding's at the other end of the backward pass."""
    shape = case.setting.shape
    if shape is None:
        return []
    size = shape.vocabulary * shape.width * case.setting.element_bytes
    return [one("head gradient", size, "of the embedding's matrix" if shape.tied else "of the head")]


def _backward(case: _Case) -> tuple[Buffer, ...]:
    """The last block's backward pass; where blocks are recomputed, all of that block is there."""
    kept, setting = case.kept, case.setting
    block = kept.block if setting.activation_checkpointing else 0
    return (
        *_before(case),
        *_gathered(case),
        _activations(case),
        *_waiting_bucket(case),
        *([one("recomputed block", block, "one block's activations")] if block else []),
        one("logits", kept.logits, "live until the next forward pass"),
        *_head(case),
        one("backward workspace", kept.working, "gradients inside one block"),
        *_copies(kept.block_copies),
    )


def _waiting_bucket(case: _Case) -> tuple[Buffer, ...]:
    """Return the bucket of stages 1 and 2, made with the first gradient; on a CPU its pages come as it fills."""
    setting = case.setting
    if setting.zero not in (1, 2) or uses_bf16_optimizer(setting) or setting.accelerator == "cpu":
        return ()
    element = accumulator_bytes(setting) if setting.zero == 1 else setting.element_bytes
    return (one("reduce bucket", case.bucket(element), f"{setting.reduce_bucket:,} elements"),)


def _end(case: _Case) -> tuple[Buffer, ...]:
    """Where nothing is reduced before the backward pass is over: all gradients, and no activations any more."""
    if case.setting.zero >= 2:
        return ()
    return (*case.sums(reduced=False), one("logits", case.kept.logits, "live until the next forward pass"))


def _reduction(case: _Case) -> tuple[Buffer, ...]:
    """A bucket is full, or the backward pass over: gradients are copied flat and reduced in the communication dtype."""
    setting, every, filled, element = case.setting, case.every, case.filled, case.setting.element_bytes
    logits = one("logits", case.kept.logits, "live until the next forward pass")
    wire = case.wire
    if setting.zero == 0 or uses_bf16_optimizer(setting):
        size = FULL * every.elements if setting.zero else accumulator_bytes(setting) * filled
        return (*case.sums(reduced=False), one("flattened gradients", size, "one bucket, all-reduced"), logits)
    left = 1 - filled / every.elements
    if setting.zero == 1:
        size, (sums,) = accumulator_bytes(setting) * filled, case.sums(reduced=False)
        rest = one(sums.name, int(sums.bytes * left), "not in the bucket")
        bucket = one("reduce bucket", case.bucket(accumulator_bytes(setting)), "takes the gradients over")
        flat = one("flattened gradients", size, "the bucket's content, all-reduced")
        # gloo's threads let go of what they reduced only when the shard has been copied from it.
        shard = case.sums(reduced=True) if setting.precision != "fp32" or setting.accelerator == "cpu" else []
        return (rest, bucket, flat, *shard, logits)
    # The backward pass has come down to where the bucket was full: what it has passed is gone.
    behind = (*_gathered(case, left), *_head(case)) if left else ()
    sums = case.sums(reduced=True)
    if setting.zero == 2 and setting.precision == "fp32" and setting.accumulation == 1:
        # Copied out of the buckets one by one; 16-bit gradients go into a shard that is made at once.
        sums = [one(sum.name, int(sum.bytes * (1 - left)), sum.note) for sum in sums]
    common = (*behind, *sums, _activations(case, left), logits)
    if setting.zero == 3:
        flat = one("flattened gradients", wire * filled, "interleaved for the reduce-scatter")
        if setting.accelerator != "cpu":
            return (*common, flat)
        copy = one("gloo's copy", wire * filled, "of what is reduced")
        return (*common, flat, copy, one("reduced gradients", wire * filled // setting.ranks, "a shard of the bucket"))
    bucket = one("reduce bucket", case.bucket(element), f"{setting.reduce_bucket:,} elements")
    flat = one("flattened gradients", element * filled, "the bucket's content")
    cast = (one("gradients in fp32", wire * filled, "the communication dtype"),) if wire != element else ()
    more = case.sums(reduced=True) if setting.precision == "fp32" and setting.accumulation > 1 else ()
    return (*common, bucket, flat, *cast, *more)


def _step(case: _Case) -> tuple[Buffer, ...]:
    """The update: the shard's gradients flat, and temporaries of torch's Adam that DeepSpeed's fused one has not."""
    setting, held = case.setting, case.states
    if setting.offload_optimizer != "none" and setting.zero > 0:
        return tuple(case.sums(reduced=True))
    shard = held.masters or FULL * case.every.elements
    found = list(case.sums(reduced=True))
    if setting.zero and not uses_bf16_optimizer(setting):
        found.append(one("gradients copied flat", shard, "of the shard"))
    if setting.zero == 1 and setting.precision == "fp16":
        bucket = case.bucket(accumulator_bytes(setting))
        found.append(one("reduce bucket", bucket, "the gradients that other ranks step with are views of it"))
    if setting.accelerator == "cuda":
        if setting.zero == 0 and setting.precision != "fp32":
            found.append(one("gradients copied flat", shard, "fp16/fused_optimizer.py, step"))
    elif held.moments:
        if setting.zero == 0:
            found.append(one("update", 2 * FULL * case.every.largest, "temporaries of the largest tensor"))
        else:
            found += [one("update", shard, "temporaries of torch's Adam")] * 2
    return tuple(found)
