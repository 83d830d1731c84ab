"""A small plan without a corpus, for a program of one rank that makes its batches itself (the gate's feed)."""

from typing import Any


def plan_of(*keys: str) -> Any:
    """Return the plan of a tiny GPT-2 on one rank, with more run keys, which win."""
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.corpus.description import DataFacts
    from halfstep.launcher.plan.facts import Facts
    from halfstep.launcher.plan.resolve import resolve

    small = ["model=gpt2-nano", "model.width=32", "model.vocabulary=64", "sequence=32", "data=synthetic"]
    request = load([*small, "batch.global=4", "batch.micro=2", *keys])
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
    return resolve(request, topology.describe(1, 1), Facts(data=data, model=None, ds_config=None))
