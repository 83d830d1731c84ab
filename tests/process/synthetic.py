"""A small plan without a corpus, for programs of ranks that make their batches themselves (the gate's feed)."""

from typing import Any

BATCH = ("batch.global=4", "batch.micro=2")


def plan_of(*keys: str, ranks: int = 1, batch: tuple[str, ...] = BATCH) -> Any:
    """Return the plan of a tiny GPT-2 on ranks of this host, with more run keys, which win."""
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.corpus.description import DataFacts
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve

    small = ["model=gpt2-nano", "model.width=32", "model.vocabulary=64", "sequence=32", "data=synthetic"]
    request = load([*small, *batch, *keys])
    data = DataFacts(
        path="synthetic",
        train_prefix="synthetic",
        validation_prefix=None,
        train_tokens=10**9,
        validation_tokens=0,
        vocabulary=64,
        has_tokenizer=False,
        digest="synthetic",
    )
    known = facts.Facts(data=data, model=None, ds_config=facts.ds_config(request.spec))
    return resolve(request, topology.describe(ranks, ranks), known)
