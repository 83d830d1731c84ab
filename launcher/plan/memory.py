"""Model states per rank, in bytes: what DeepSpeed holds for weights, gradients, masters and optimizer moments.

Activations, logits, buckets and temporaries are not in these figures, and the plan says so.
"""

_HALF, _FULL = 2, 4


def model_states(
    parameters: int, *, zero: int, precision: str, optimizer: str, momentum: float, ranks: int
) -> dict[str, int]:
    """Return the resident bytes of each model state on one rank without offload.

    Sharding as DeepSpeed 0.19.8 implements it: stage 1 shards masters and moments, stage 2 also gradients, stage 3 also
    weights. Gradients are accumulated in fp32: at stage 0 by Halfstep's doing (engine/repair.py), at stages 1-3 by
    `grad_accum_dtype`; stages 0 and 1 keep them whole.
    """
    compute = _FULL if precision == "fp32" else _HALF
    moments = 2 if optimizer == "adamw" else int(momentum > 0)
    shard = -(-parameters // ranks)
    sharded_states = shard if zero >= 1 else parameters
    gradients = _FULL * (parameters if zero <= 1 else shard)
    masters = 0 if precision == "fp32" and zero == 0 else _FULL * sharded_states
    return {
        "weights": compute * (shard if zero == 3 else parameters),
        "gradients": gradients,
        "fp32_masters": masters,
        "optimizer_moments": _FULL * moments * sharded_states,
    }
