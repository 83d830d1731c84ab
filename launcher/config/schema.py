"""The run keys: what a user may ask for, with units, defaults and bounds."""

import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from halfstep.launcher.config.counts import (
    RANKS,
    Checkpoints,
    Count,
    CountOrZero,
    Hosts,
    Layers,
    Rows,
    Seconds,
    SecondsOrZero,
    Seed,
    Sequences,
    Tokens,
    Width,
)
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.errors import nearest
from halfstep.models.presets import PRESETS


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_is_number(part) for part in typing.get_args(annotation))


def listed(text: str) -> list[str]:
    """Return the names that a command line lists: `a,b`, `[a, b]` or `["a", "b"]`."""
    return [name.strip(" '\"") for name in text.strip("[] ").split(",")]


def _listed(value: Any) -> Any:
    """Take `a,b` or `["a", "b"]` of a command line for the list it means."""
    return listed(value) if isinstance(value, str) else value


class _Section(BaseModel):
    # populate_by_name: `batch.global` is spelt with a Python keyword, so its field has another name inside.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true where a number is meant, which pydantic takes for 1."""
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("true and false are not numbers")
        return value


class ModelKeys(_Section):
    """`model.*`: which network, and which of its dimensions to change."""

    name: str
    """A preset (`gpt2-124m`), `hf:` and a path or hub id of a causal language model, or `run:` and a run directory."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.startswith(("hf:", "run:")) and name.partition(":")[2]:
            return name
        if name not in PRESETS:
            close = nearest(name, PRESETS) or list(PRESETS)
            raise ValueError(f"no such preset; did you mean {' or '.join(close)}?")
        return name

    layers: Layers | None = None
    """Transformer blocks instead of the preset's."""
    width: Width | None = None
    """Hidden size instead of the preset's."""
    heads: Width | None = None
    """Attention heads instead of the preset's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout probability instead of the model's own."""
    vocabulary: Rows | None = None
    """Rows of the embedding instead of the preset's (needed for a corpus that does not say its vocabulary)."""
    router_loss: Annotated[float, Field(ge=0)] | None = None
    """Coefficient of a mixture's auxiliary loss, which keeps its experts in use; 0 = none; unset: its config's own."""


class BatchKeys(_Section):
    """`batch.*`: global = micro x accumulation x ranks; accumulation is solved."""

    global_: Sequences = Field(default=32, alias="global")
    """Sequences per optimizer step, over all ranks."""
    micro: Sequences | None = None
    """Sequences per forward and backward on one rank; unset: the largest divisor (CPU: to 8; GPU: that fits)."""


class OptimizerKeys(_Section):
    """`optimizer.*`: AdamW or SGD on fp32 masters."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """Which optimizer."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; unset: by model size, after Brown et al. 2020, table 2.1."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of the matrices; biases, norms and other vectors get none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's second-moment decay."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""


class ScheduleKeys(_Section):
    """`schedule.*`: the learning rate as a pure function of the step."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd: the peak, and at the end of the run a linear decay."""
    warmup: CountOrZero | None = None
    """Steps of linear warm-up; unset: a tenth of the run, at most 2000."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end as a fraction of the peak."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run in which wsd decays; the other kinds pay no heed to it."""


class Fp16Keys(_Section):
    """`fp16.*`: loss scaling; read only with precision=fp16 and fp16-autocast."""

    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    """The dynamic loss scale starts at 2 to this power."""
    window: Count = 1000
    """Clean steps before the scale doubles."""
    hysteresis: Count = 2
    """Overflows before the scale first halves."""
    min_scale: Annotated[float, Field(gt=0)] = 1.0
    """The scale never falls below this."""
    scale: Annotated[float, Field(ge=0)] = 0.0
    """A fixed loss scale; 0 = dynamic."""

    @model_validator(mode="after")
    def _consistent(self) -> "Fp16Keys":
        dynamic = [f"fp16.{name}" for name in sorted(self.model_fields_set - {"scale"})]
        if self.scale and dynamic:
            raise ValueError(
                f"a fixed scale never moves, and {', '.join(dynamic)} would move it; give one or the other"
            )
        if not self.scale and self.min_scale > 2.0**self.initial_scale_power:
            raise ValueError(
                f"fp16.min_scale={self.min_scale:g} is above the initial scale, "
                f"2^{self.initial_scale_power} = {2**self.initial_scale_power}"
            )
        return self


class NumericsKeys(_Section):
    """`numerics.*`: when a run has to stop, what is written down about its gradients."""

    every: CountOrZero = 0
    """Steps between events on each layer's gradients (maximum, underflow in fp16); 0 = never."""
    max_skips: Count = 3
    """Steps in a row, skipped or without a finite loss, that end the run; a falling loss scale has more."""
    repairs: bool = True
    """Repair what DeepSpeed gets wrong at stage 0 in half precision; false shows DeepSpeed as it is."""


class LoraKeys(_Section):
    """`lora.*`: the low-rank adapters of train=lora."""

    rank: Width = 16
    """Rows of A and columns of B, in elements."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an element of an adapter's input is left out."""
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Layers with adapters, by name or the end of one: ["q_proj", "v_proj"]; unset: all linear ones but the head."""


class EmaKeys(_Section):
    """`ema.*`: an exponential moving average of the masters, kept beside them."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the average that stays after every step that was not skipped, such as 0.999; 0 = none is kept."""


class EvalKeys(_Section):
    """`eval.*`: loss on the validation split, at step 0, at the end, and in between."""

    every: CountOrZero = 100
    """Steps between evaluations; 0 = only at the start and the end."""
    sequences: Count = 64
    """Validation sequences read at each, the first of the split (each part's in a mixture); fewer if it is smaller."""
    tasks: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Task files by which the model is judged at evaluations, in every case at the last: ["translation/task.toml"]."""
    tasks_every: CountOrZero | None = None
    """Of the evaluations those whose step is a multiple of this judge by tasks; 0 = the last alone; unset: all."""


class CheckpointKeys(_Section):
    """`checkpoint.*`: when the state is saved, what is kept, and what a start does with it."""

    every: CountOrZero = 200
    """Steps between checkpoints; 0 = none in between."""
    keep: Checkpoints = 3
    """How many of the newest are kept."""
    keep_every: CountOrZero = 0
    """Steps whose multiples are kept for ever; 0 = none."""
    at_end: bool = True
    """Whether the last step is saved, so that the run can be exported or made longer."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Resume from the newest good checkpoint if there is one, only if there is one, or start from scratch."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a save that fails (a full disk) does to the run."""
    grace: SecondsOrZero = 0.0
    """Seconds from a stop signal to the end, whether the last save is done or not; 0 = as long as it takes."""


class WatchKeys(_Section):
    """`watch.*`: how a stalled or slow rank is noticed."""

    timeout: Seconds = 1800.0
    """Seconds without any progress of a rank after which the run ends with exit code 77."""
    startup: Seconds = 1800.0
    """The same before the first step: importing, joining, building, compiling, loading."""
    slow: Annotated[float, Field(ge=0)] = 1.35
    """A rank that computes this many times as long as the others is named; 0 = none is."""


class LogKeys(_Section):
    """`log.*`: what the console shows; no influence on the run."""

    every: Count = 10
    """Steps between lines in a file or pipe (a terminal shows every step)."""


class RunSpec(_Section):
    """One run as it was asked for. Derived values live in the Plan and are never written back."""

    model: ModelKeys
    """Which network (`model=NAME` for short)."""
    data: str | None = None
    """A folder of `halfstep data prepare`, a Megatron .bin/.idx prefix, or a mixture a:0.7,b:0.3; a plan needs none."""
    documents: Literal["plain", "masked"] = "plain"
    """masked: attention stays inside documents, where positions begin anew; plain: it sees the whole sequence."""
    packing: bool = True
    """Examples (`data prepare --format sft`) share sequences as whole examples; false: one in each, and padding."""
    too_long: Literal["refuse", "cut", "drop"] = "refuse"
    """What becomes of an example that is longer than the sequence."""
    out: str | None = None
    """The run directory; unset: runs/<run id>."""
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage: 0 replicates; 1 shards optimizer states, 2 also gradients, 3 also weights."""
    precision: Literal["fp32", "tf32", "fp16", "bf16", "fp16-autocast", "bf16-autocast"] = "bf16"
    """What forward and backward compute in; the masters are always fp32, with autocast and tf32 the weights, too."""
    keep_fp32: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Modules that stay in fp32 under autocast, by name or the end of one, `*` and `?` allowed: ["ln_f", "lm_head"]."""

    offload: Literal["none", "optimizer-cpu", "cpu", "nvme"] = "none"
    """What moves off the device: nothing, optimizer states, those and weights, or both to NVMe."""
    nvme_path: str | None = None
    """A folder on a local NVMe disk, for offload=nvme."""
    sequence: Rows | None = None
    """Tokens per sequence; unset: the preset's context."""
    steps: Count | None = None
    """Optimizer steps (default 1000)."""
    tokens: Tokens | None = None
    """Training tokens, instead of steps."""
    train: Literal["full", "lora"] = "full"
    """full: every parameter; lora: low-rank adapters (`lora.*`) beside frozen weights."""
    lora: LoraKeys = LoraKeys()
    """Adapters."""
    ema: EmaKeys = EmaKeys()
    """Averaged weights."""
    seed: Seed = 0
    """Decides the initial weights, the data order and dropout."""
    batch: BatchKeys = BatchKeys()
    """The batch equation."""
    optimizer: OptimizerKeys = OptimizerKeys()
    """The optimizer."""
    schedule: ScheduleKeys = ScheduleKeys()
    """The learning rate."""
    fp16: Fp16Keys = Fp16Keys()
    """Loss scaling."""
    numerics: NumericsKeys = NumericsKeys()
    """Skipped steps, forensics, repairs."""
    eval: EvalKeys = EvalKeys()
    """Evaluation."""
    checkpoint: CheckpointKeys = CheckpointKeys()
    """Saving and resuming."""
    watch: WatchKeys = WatchKeys()
    """Stalled and slow ranks."""
    log: LogKeys = LogKeys()
    """Console output."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile each block with torch.compile; off until it is measured on a GPU to be faster in every cell."""
    fused_head: bool = False
    """Compute the output head and the loss in one, chunk by chunk: logits are never whole, and are made twice."""
    trust_remote_code: bool = False
    """Let a model from the hub run its own Python code."""
    hardware: str | None = None
    """The device to plan and report for, as in the planner's table; unset: what is found."""
    nodes: Hosts | None = None
    """Hosts; unset: what the launcher started, or 1."""
    gpus_per_node: Hosts | None = None
    """Ranks on each host; unset: one for each GPU, two on a CPU."""
    ds: dict[str, Any] = {}
    """DeepSpeed keys set directly, by dotted path (`ds.zero_optimization.overlap_comm=true`)."""
    ds_config: str | None = None
    """A DeepSpeed JSON file used instead of the composition (`--ds-config FILE`)."""

    @field_validator("model", mode="before")
    @classmethod
    def _model_for_short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("ds", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return flatten(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _steps_or_tokens(self) -> "RunSpec":
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens both say how long to train; give one of them")
        return self

    @model_validator(mode="after")
    def _ranks(self) -> "RunSpec":
        ranks = (self.nodes or 1) * (self.gpus_per_node or 1)
        if ranks > RANKS:
            raise ValueError(f"nodes x gpus_per_node is {ranks} ranks; at most {RANKS} can be planned")
        return self


def run_keys() -> dict[str, str]:
    """Return every run key in its dotted spelling with its one-line description."""
    keys: dict[str, str] = {}
    for name, field in RunSpec.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            for inner, inner_field in section.model_fields.items():
                keys[f"{name}.{inner_field.alias or inner}"] = inner_field.description or ""
        else:
            keys[name] = field.description or ""
    return keys
