"""What the parity gate runs: every legal (stage, precision) cell under varied conditions."""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

from halfstep.launcher.config.digest import canonical, digest
from halfstep.launcher.errors import RequestError, nearest

STEPS = 20
POISONED_STEP = 7
"""The step whose loss is made NaN on rank 0: every cell has to skip it, and fp16 to halve its scale."""
POISON = f"fwd:0:{POISONED_STEP}:nan"
"""The value of HALFSTEP_FAULT that does it."""
BINDING_CLIP = 0.05
"""A largest gradient norm that binds on every step: these models' norms are near 1."""
GLOBAL_BATCH = 8
VOCABULARY = 64
"""Tokens of every model here."""
MOST_RANKS = GLOBAL_BATCH
"""Each has a sequence of its own."""
# A constant lr of 1e-3 is the largest at which a tiny AdamW model does not amplify rounding by itself.
OPTIMIZERS = {
    "adamw": ["optimizer.kind=adamw", "optimizer.lr=1e-3"],
    "sgd": ["optimizer.kind=sgd", "optimizer.lr=0.02", "optimizer.momentum=0.9"],
    "adagrad": ["ds.optimizer.type=Adagrad", "optimizer.lr=3e-3"],
    # Jordan's rate for matrices is twenty times this: 20 steps of a tiny model show no more, and amplify rounding.
    "muon": [
        "ds.optimizer.type=Muon",
        "ds.optimizer.params.torch_adam=true",
        "ds.optimizer.params.momentum=0.95",
        "ds.optimizer.params.muon_lr=2e-3",
        "ds.optimizer.params.adam_lr=5e-4",
        "optimizer.lr=1e-3",
    ],
    "lion": ["ds.optimizer.type=Lion", "ds.optimizer.params.betas=[0.9,0.99]", "optimizer.lr=3e-4"],
}
"""The run keys that each optimizer of the table is tried with."""
GRID = ("fp32", "fp16", "bf16")
"""The precisions that are tried under every condition; autocast is the same arithmetic as theirs, in other places."""
_STAGE_1_FIRST = (1, 0, 2, 3)
"""The others are compared with it."""
KNOWN_TO_THE_REFERENCE = ("ds.bf16.bf16_",)
"""What the reference does, too; the rest of `Case.keys` is another way to the same, within the tolerances."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small run."""

    zero: int
    precision: str
    accumulation: int
    clip: float
    world_size: int
    optimizer: str
    family: str
    activation_checkpointing: bool = False
    offload: str = "none"
    compile: bool = False
    fused_head: bool = False
    keep_fp32: tuple[str, ...] = ()
    documents: str = "plain"
    """masked: sequences of several documents, and micro-batches with unequal numbers of targets."""
    lora: tuple[str, ...] = ()
    """The run keys of adapters that are trained beside frozen weights; none: every parameter is."""
    keys: tuple[str, ...] = ()
    """DeepSpeed keys that change the arithmetic, as words of a command line, in their order."""
    config: str = ""
    """Of a family of `hf:` models, the transformers config of a nano model as JSON; empty for a preset's family."""
    router_loss: float | None = None
    """What such a mixture's auxiliary loss is multiplied with; None: what its config says."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))  # JSON has lists
        object.__setattr__(self, "lora", tuple(self.lora))
        object.__setattr__(self, "keep_fp32", tuple(self.keep_fp32))

    def at_stage_1(self) -> "Case":
        """Return the same run at stage 1, uncompiled, its head apart, all on the device: what it is compared with."""
        return replace(self, zero=1, offload="none", compile=False, fused_head=False)

    @property
    def has_twin_at_stage_1(self) -> bool:
        """Whether stage 1 can run it at all, to be compared with."""
        return not self.keys and self.optimizer in ("adamw", "sgd")

    def plain(self) -> "Case":
        """Return the case of the reference, which depends neither on the stage nor on how the same is computed."""
        kept = tuple(word for word in self.keys if word.startswith(KNOWN_TO_THE_REFERENCE))
        return replace(self.at_stage_1(), zero=0, activation_checkpointing=False, keys=kept)

    def __str__(self) -> str:
        extra = ", activation checkpointing" if self.activation_checkpointing else ""
        extra += "" if self.offload == "none" else f", offload {self.offload}"
        extra += ", compiled" if self.compile else ""
        extra += ", fused head" if self.fused_head else ""
        extra += f", fp32 in {' '.join(self.keep_fp32)}" if self.keep_fp32 else ""
        extra += "" if self.documents == "plain" else f", documents {self.documents}"
        extra += f", {' '.join(self.lora)}" if self.lora else ""
        extra += "".join(f", {word.removeprefix('ds.')}" for word in self.keys)
        clip = f"clip {self.clip:g}" if self.clip else "no clip"
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        family = f"hf:{self.family} {digest(self.config, 6)}" if self.config else self.family
        return f"{family} {self.optimizer}, accumulation {self.accumulation}, {clip}, {ranks}{extra}"


def every_case() -> list[Case]:
    """Return every combination, and once in every cell what computes the same in another way."""
    cases = [
        Case(
            zero=zero,
            precision=precision,
            accumulation=accumulation,
            clip=clip,
            world_size=world_size,
            optimizer=optimizer,
            family=family,
        )
        for family, optimizer, clip, accumulation, world_size, precision, zero in itertools.product(
            ("gpt2", "llama"),
            ("adamw", "sgd"),
            (BINDING_CLIP, 0.0),
            (1, 2),
            (1, 2),
            GRID,
            _STAGE_1_FIRST,
        )
    ]
    once = _cells(_CHECKPOINTED) + _cells(_COMPILED) + _cells(_FUSED_HEAD)
    return [*cases, *once, *autocast_cases(), *conditional_cases(), *document_cases(), *lora_cases(), *family_cases()]


def autocast_cases() -> list[Case]:
    """Return the cells in which torch.autocast computes, on one rank and on two."""
    return [
        Case(zero=zero, precision=precision, **row)
        for row in VARIED
        for precision in ("bf16-autocast", "fp16-autocast")
        for zero in _STAGE_1_FIRST
    ]


def conditional_cases() -> list[Case]:
    """Return the cases of what some cells alone can have: keys that change the arithmetic, and other optimizers.

    Lion is not among them. On a CPU DeepSpeed has it for offloaded states only, and that one moves, by the learning
    rate, what has no gradient: a study that asks for it is told that it trains another model.
    """
    masters = "ds.bf16.bf16_master_weights_and_grads=true"
    on_host = {"offload": "optimizer-cpu", "keys": (masters, "ds.optimizer.params.torch_adam=false")}
    asked: list[tuple[list[int], tuple[str, ...], dict[str, Any]]] = [
        ([1, 3], ("bf16-autocast",), {"keys": ('ds.torch_autocast.lower_precision_safe_modules=["torch.nn.Linear"]',)}),
        ([0, 3], ("bf16-autocast", "fp16-autocast"), {"keep_fp32": ("ln_1", "ln_2", "lm_head")}),
        ([1, 2, 3], ("bf16",), {"keys": ("ds.data_types.grad_accum_dtype=bf16",)}),
        ([0, 1, 2, 3], ("bf16",), {"keys": ("ds.communication_data_type=bf16",)}),
        ([3], ("fp32", "fp16", "bf16"), {"keys": ("ds.zero_optimization.zero_hpz_partition_size=2",)}),
        ([0], ("fp32", "fp16", "bf16"), {"optimizer": "adagrad"}),
        ([1], ("bf16",), {"optimizer": "adagrad"}),
        ([0], ("fp32", "fp16", "bf16"), {"optimizer": "muon"}),
        ([1], ("bf16",), {"optimizer": "muon"}),
        ([1, 2, 3], ("bf16",), on_host),
        ([1, 2, 3], ("bf16",), {**on_host, "keys": ("ds.bf16.bf16_optimizer_states=true", *on_host["keys"])}),
    ]
    return [
        Case(zero=zero, precision=precision, **{**row, **varied})
        for stages, precisions, varied in asked
        for row in VARIED
        for precision in precisions
        for zero in stages
        if row["world_size"] > 1 or "hpz" not in str(varied)
    ]


def document_cases() -> list[Case]:
    """Return every cell with documents that are kept apart and targets that are left out, on one rank and on two."""
    rows = [{**row, "documents": "masked"} for row in (*VARIED, _LLAMA)]
    return [case for row in rows for case in _cells(row)]


def lora_cases() -> list[Case]:
    """Return every cell with adapters in all linear layers but the head, on one rank and on two."""
    targets = {"gpt2": '["c_attn","c_proj","c_fc"]',
               "llama": '["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]'}  # fmt: skip
    rows = [
        {**row, "lora": ("lora.rank=16", "lora.alpha=32", f"lora.targets={targets[row['family']]}")}
        for row in (*VARIED, _LLAMA)
    ]
    return [case for row in rows for case in _cells(row)]


FAMILIES: tuple[dict[str, Any], ...] = (
    # Biases in the attention, a tied head, a layer that sees all and a layer that sees a window.
    {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4096},
    # Experts, queries and keys that are normalised, keys that heads share, a head of its own.
    {"model_type": "qwen3_moe"},
)
"""Configs of `hf:` models, otherwise transformers' defaults, of whose families the gate makes a nano model."""


def family_cases() -> list[Case]:
    """Return two families of `hf:` models in every cell, made on the spot: no file of a hub is needed."""
    from halfstep.models.nano import nano  # loads transformers, which planning a preset does without

    return [
        case
        for config in FAMILIES
        for row in VARIED
        for case in _cells({**row, "family": config["model_type"], "config": canonical(nano(config, VOCABULARY))})
    ]


def default_cases() -> list[Case]:
    """Return the subset that meets every value of every condition in every cell."""
    return [case for conditions in _DEFAULT for case in _cells(conditions)] + autocast_cases()


def cases_of(zero: int, precision: str, offload: str) -> list[Case]:
    """Return what has to hold before a cell's numbers are believed: the default subset, of an offloaded cell two runs.

    What is on the device and what is not changes where the same arithmetic is done; both numbers of ranks are tried.
    """
    if offload != "none":
        conditions = [row for row in _DEFAULT[:2] if row["optimizer"] == "adamw"]
        return [Case(zero=zero, precision=precision, offload=offload, **row) for row in conditions]
    return [case for case in default_cases() if (case.zero, case.precision) == (zero, precision)]


_CHECKPOINTED: dict[str, Any] = {
    "accumulation": 1,
    "clip": BINDING_CLIP,
    "world_size": 1,
    "optimizer": "adamw",
    "family": "gpt2",
    "activation_checkpointing": True,
}
_COMPILED: dict[str, Any] = {**_CHECKPOINTED, "activation_checkpointing": False, "compile": True}
_FUSED_HEAD: dict[str, Any] = {
    **_CHECKPOINTED,
    "accumulation": 2,
    "world_size": 2,
    "activation_checkpointing": False,
    "fused_head": True,
}
_LLAMA: dict[str, Any] = {"accumulation": 1, "clip": 0.0, "world_size": 2, "optimizer": "adamw", "family": "llama"}
_DEFAULT: list[dict[str, Any]] = [
    {"accumulation": 1, "clip": 0.0, "world_size": 1, "optimizer": "adamw", "family": "gpt2"},
    {"accumulation": 2, "clip": BINDING_CLIP, "world_size": 2, "optimizer": "adamw", "family": "gpt2"},
    {"accumulation": 2, "clip": BINDING_CLIP, "world_size": 1, "optimizer": "sgd", "family": "llama"},
    _LLAMA,
    _CHECKPOINTED,
]


VARIED = _DEFAULT[:2]
"""The conditions in which a cell is tried that is none of the default subset: on one rank, and on two."""


def _cells(conditions: dict[str, Any]) -> list[Case]:
    return [Case(zero=zero, precision=precision, **conditions) for precision in GRID for zero in _STAGE_1_FIRST]


def select(cases: list[Case], conditions: list[str]) -> list[Case]:
    """Return the cases that every `key=value[|value]` word admits; raises RequestError for a word that admits none."""
    for word in conditions:
        key, _, text = word.partition("=")
        known = [name for name in asdict(cases[0]) if name != "config"] if cases else []
        if key not in known:
            fix = f"did you mean {nearest(key, known)[0]}?" if nearest(key, known) else f"one of {', '.join(known)}"
            raise RequestError(f"{key!r} is no property of a case", where=f"--only {word}", fix=fix)
        wanted = [_plain(value) for value in text.split("|")]
        kept = [case for case in cases if _plain(getattr(case, key)) in wanted]
        if not kept:
            values = dict.fromkeys(_plain(getattr(case, key)) for case in cases)
            raise RequestError(f"no case has {word}", where=f"--only {word}", fix=f"{key} is {' or '.join(values)}")
        cases = kept
    return cases


def _plain(value: object) -> str:
    """Return a value as people write it: 0 and 0.0 are one, and so are True and true."""
    text = str(value).strip().lower()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
