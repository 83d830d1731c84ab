"""The trainers of published runs: what is known of each besides what its rows say."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from halfstep.launcher.forecast.calibration import OWN_STACK


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What is known of a trainer besides what its rows say."""

    name: str
    collectives: str = "ddp"
    attention: str = "flash"
    sequence_parallel: bool = False
    compiled: bool = False
    network: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Bytes/s a device, by the beginning of a device's name, where the cluster is known."""
    ranks_per_node: Mapping[str, int] = dataclasses.field(default_factory=dict)


_MEGATRON_DEEPSPEED = Stack(
    name="megatron-deepspeed",
    collectives="deepspeed",
    attention="unfused",
    # Jean Zay: 4 x 100 Gb/s Omni-Path for 8 A100 (BigScience chronicles); its ZeRO-3 runs of different micro-batches
    # show no more than one such adapter at work for 4 V100.
    network={"a100": 6.25e9, "v100": 3.125e9},
    ranks_per_node={"v100": 4},  # Jean Zay again
)
_MEGATRON_CORE = Stack(
    name="megatron-core", collectives="megatron", attention="hopper", compiled=True, sequence_parallel=True
)
STACKS: tuple[tuple[str, Stack], ...] = (
    ("llm-foundry", Stack(name="llm-foundry", collectives="fsdp")),
    ("torchtitan", Stack(name="torchtitan", collectives="fsdp", compiled=True, sequence_parallel=True)),
    (
        "fms-fsdp",  # 800 Gb/s a node of 8 H100, 400 of 8 A100 (its README)
        Stack(name="fms-fsdp", collectives="fsdp", compiled=True, network={"h100": 12.5e9, "a100": 6.25e9}),
    ),
    ("bigscience", _MEGATRON_DEEPSPEED),
    ("Megatron-DeepSpeed", dataclasses.replace(_MEGATRON_DEEPSPEED, network={}, ranks_per_node={})),
    ("vTrain", Stack(name="vtrain", collectives="ddp", attention="unfused")),
    ("calculon", Stack(name="megatron-2021", attention="unfused")),
    ("NeMo", _MEGATRON_CORE),
    ("Megatron-Bridge", _MEGATRON_CORE),
    ("Megatron-LM", Stack(name="megatron-2021", attention="unfused")),
    ("ml-engineering", Stack(name=OWN_STACK, collectives="deepspeed", attention="hopper")),
    ("DeepSpeed issue", Stack(name=OWN_STACK, collectives="deepspeed", attention="hopper")),
    ("DeepSpeed", Stack(name="deepspeed-2020", collectives="deepspeed", attention="unfused")),
    ("nanotron", Stack(name="nanotron", sequence_parallel=True)),
    ("llm.c", Stack(name="llm.c", collectives="megatron", attention="hopper", compiled=True)),
    ("nanoGPT", Stack(name="nanogpt", compiled=True)),
    ("modded-nanogpt", Stack(name="nanogpt", compiled=True)),
    ("nanochat", Stack(name="nanogpt", compiled=True)),
    ("flash-attention", Stack(name="flash-attention", compiled=True)),
    ("litgpt", Stack(name="litgpt", collectives="fsdp")),
    ("picotron", Stack(name="picotron")),
)
UNKNOWN = Stack(name="unknown")


def stack_of(text: Mapping[str, str]) -> Stack:
    """Return the trainer of a published row by its source, and by what its notes say of it."""
    source, notes, place = (text.get(name, "") for name in ("source", "notes", "file_or_table"))
    stack = next((stack for word, stack in STACKS if word in source), UNKNOWN)
    if "deepcompile" in place:
        own = dict(STACKS)["ml-engineering"]
        return dataclasses.replace(own, name="deepcompile", compiled=True) if "DeepCompile" in notes else own
    if "azure" in place:
        return dict(STACKS)["Megatron-DeepSpeed"]
    if stack.name == "megatron-2021" and text.get("gpu", "").startswith(("H", "B", "GB")):
        return dict(STACKS)["NeMo"]
    if "llm.c" in notes:
        return dict(STACKS)["llm.c"]
    return stack
