"""What benchmarks/gpu.py times, the most telling first, and the same in small for a dry run."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload on one GPU."""

    name: str
    model: str
    sequence: int
    micro: int
    zero: int = 1
    precision: str = "bf16"
    keys: tuple[str, ...] = ()
    """Further run keys of ours."""
    warmup: int = 6
    """Steps that are not timed: kernels are compiled, caches filled."""
    steps: int = 24
    """Steps that are."""

    def run_keys(self) -> list[str]:
        """Return the run keys of ours, without `data` and `out`."""
        return [
            *(f"model={self.model}", f"sequence={self.sequence}", f"zero={self.zero}", f"precision={self.precision}"),
            *(f"batch.micro={self.micro}", f"batch.global={self.micro}", f"steps={self.warmup + self.steps}"),
            *("eval.every=0", "eval.sequences=1", "checkpoint.every=0", "checkpoint.at_end=false", "log.every=100000"),
            *self.keys,
        ]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process, or a few beside each other where nothing is timed."""

    kind: str
    """`ours`, `plain`, `deepspeed`, `profile`, or `proof`: the cells' losses and memory, and the parity gate."""
    case: Case | None = None
    seconds: float
    """What it is expected to take, until one of its kind has been seen."""

    @property
    def name(self) -> str:
        """Say it in a line."""
        return f"{self.case.name} {self.kind}" if self.case else self.kind


_124M = Case(name="124m-z1", model="gpt2-124m", sequence=1024, micro=32)
_355M = Case(name="355m-z1", model="gpt2-355m", sequence=1024, micro=16, steps=16)
_1500M = Case(name="1.5b-z1", model="gpt2-1.5b", sequence=1024, micro=16, warmup=4, steps=10)
_LLAMA = Case(name="llama1b-z1", model="llama-1b", sequence=2048, micro=8, warmup=4, steps=10)


def _at(zero: int) -> Case:
    return replace(_124M, name=f"124m-z{zero}", zero=zero)


_STAGES = [_at(2), _at(3), _at(0)]
_FP16 = replace(_124M, name="124m-z1-fp16", precision="fp16")
_COMPILED = replace(_124M, name="124m-z1-compile", keys=("compile=true",))
_EAGER = replace(_124M, name="124m-z1-eager", keys=("compile=false",))


def tasks() -> list[Task]:
    """Return what is run on a GPU, in its order: each once, then once more what is worth a spread."""
    ours, plain, bare = (lambda case, seconds, kind=kind: Task(kind=kind, case=case, seconds=seconds) for kind in PEERS)
    first = [ours(_124M, 30), plain(_124M, 45), bare(_124M, 25), ours(_124M, 20), plain(_124M, 25), bare(_124M, 20)]
    first += [Task(kind="profile", case=_124M, seconds=30)]
    first += [ours(case, 22) for case in _STAGES] + [Task(kind="proof", seconds=90)]
    large = [ours(_1500M, 35), ours(_LLAMA, 35), plain(_LLAMA, 60), plain(_1500M, 70)]
    more = [ours(_FP16, 20), ours(_COMPILED, 30), ours(_EAGER, 20), ours(_355M, 25), plain(_355M, 45)]
    again = [ours(_124M, 20), plain(_124M, 25), bare(_124M, 20)]
    return [*first, *large, *more, *(bare(case, 20) for case in _STAGES), bare(_1500M, 35), bare(_LLAMA, 35), *again]


def dry_tasks() -> list[Task]:
    """Return the same kinds in small: nano models, few steps, on a CPU."""

    def small(case: Case) -> Case:
        nano = "llama-nano" if case.model.startswith("llama") else "gpt2-nano"
        keys = (*case.keys, f"model.vocabulary={DRY_VOCABULARY}", "gpus_per_node=1")
        name = f"{nano}-z{case.zero}"
        return replace(case, name=name, model=nano, sequence=32, micro=2, warmup=1, steps=3, keys=keys)

    kept = [Task(kind=kind, case=_124M, seconds=8) for kind in ("ours", "plain", "deepspeed", "ours", "plain")]
    kept += [Task(kind="profile", case=_124M, seconds=8), Task(kind="proof", seconds=15)]
    kept += [Task(kind="ours", case=_at(3), seconds=8), Task(kind="deepspeed", case=_at(3), seconds=8)]
    kept += [Task(kind="ours", case=_LLAMA, seconds=8), Task(kind="plain", case=_LLAMA, seconds=8)]
    # Far beyond any time: what does not fit is left out and named.
    kept += [Task(kind="plain", case=_at(3), seconds=1e9)]
    return [replace(task, case=small(task.case)) if task.case else task for task in kept]


PEERS = ("ours", "plain", "deepspeed")
"""Who is timed."""
DRY_VOCABULARY = 256
VOCABULARY = 50304
"""Tokens are below it: GPT-2's rows, and fewer than Llama's."""
CORPUS_TOKENS = 4_000_000
DRY_CORPUS_TOKENS = 20_000


def cells(dry: bool) -> list[Case]:
    """Return the (stage, precision) cells whose first loss and peak memory are looked at; few for a dry run."""
    if dry:
        pairs = [(0, "fp32"), (3, "fp16")]
    else:
        pairs = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16", "fp16")]
    shape = {"model": "gpt2-nano", "sequence": 32} if dry else {"model": "gpt2-124m", "sequence": 1024}
    keys = (f"model.vocabulary={DRY_VOCABULARY}", "gpus_per_node=1") if dry else ()
    micro = 2 if dry else 8
    return [
        Case(name=f"z{z}-{p}", **shape, micro=micro, zero=z, precision=p, warmup=0, steps=4, keys=keys)
        for z, p in pairs
    ]
