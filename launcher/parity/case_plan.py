"""The plan of a case of the parity gate: the run keys that it stands for, without a corpus or a hub."""

import functools
import json

from halfstep.launcher.config import precisions
from halfstep.launcher.config.load import load
from halfstep.launcher.corpus.description import DataFacts
from halfstep.launcher.corpus.vocabulary import TokenizerFacts
from halfstep.launcher.parity.cases import GLOBAL_BATCH, OPTIMIZERS, STEPS, VOCABULARY, Case
from halfstep.launcher.plan.construct import Source, construct
from halfstep.launcher.plan.facts import Facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.pretrained import ModelFacts
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology

_SEQUENCE = 32
_SCHEDULES = {"muon": ["schedule.kind=cosine", "schedule.warmup=4"]}
"""Where it is not constant: Muon's two rates have to follow it, each from its own peak."""
# The scale grows twice and is halved once within the 20 steps.
_SCALING = ["fp16.initial_scale_power=10", "fp16.window=5", "fp16.hysteresis=1"]


def plan_of(case: Case, topology: Topology, *, repairs: bool, for_the_reference: bool = False) -> Plan:
    """Return the plan of a case: the same one that `halfstep run` would make of these run keys."""
    micro = GLOBAL_BATCH // (case.accumulation * case.world_size)
    preset = [f"model={case.family}-nano", "model.width=32", f"model.vocabulary={VOCABULARY}"]
    arguments = [
        *([f"model=hf:nano/{case.family}"] if case.config else preset),
        *([] if case.router_loss is None else [f"model.router_loss={case.router_loss}"]),
        "data=synthetic",
        f"sequence={_SEQUENCE}",
        f"steps={STEPS}",
        f"batch.global={GLOBAL_BATCH}",
        f"batch.micro={micro}",
        f"zero={case.zero}",
        f"precision={case.precision}",
        *OPTIMIZERS[case.optimizer],
        f"optimizer.clip={case.clip}",
        *_SCHEDULES.get(case.optimizer, ["schedule.kind=constant", "schedule.warmup=0"]),
        *(_SCALING if precisions.of(case.precision).scaled else []),
        f"activation_checkpointing={str(case.activation_checkpointing).lower()}",
        f"offload={case.offload}",
        f"compile={str(case.compile).lower()}",
        f"fused_head={str(case.fused_head).lower()}",
        *([f"keep_fp32={json.dumps(case.keep_fp32)}"] if case.keep_fp32 else []),
        f"documents={case.documents}",
        *(["train=lora", *case.lora] if case.lora else []),
        f"numerics.repairs={str(repairs).lower()}",
        *case.keys,
    ]
    request = load(arguments)
    tokens = 10**9
    data = DataFacts(
        path="synthetic",
        train_prefix="synthetic",
        validation_prefix=None,
        train_tokens=tokens,
        validation_tokens=0,
        vocabulary=VOCABULARY,
        has_tokenizer=False,
        digest="synthetic",
    )
    plan = resolve(request, topology, Facts(data=data, model=_nano(case.config), ds_config=None))
    if not for_the_reference:  # which steps optimizers that DeepSpeed has for some devices alone
        plan.require_allowed()
    return plan


@functools.cache
def _nano(config: str) -> ModelFacts | None:
    """Return what a plan has to know of a nano model; None where there is no config, as of a preset."""
    if not config:
        return None
    tree = json.loads(config)
    source = Source(name=f"nano/{tree['model_type']}", home="", weights=None, local=True)
    network = construct(source, tree, trust_remote_code=False)
    return ModelFacts(config=tree, network=network, weights=None, weights_digest=None, tokenizer=TokenizerFacts())
