"""A Plan: every decision of a run as one frozen, JSON-able value."""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from halfstep.launcher.config import precisions
from halfstep.launcher.config.digest import changes, digest
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.batch import Batch
from halfstep.launcher.plan.data_plan import PLACES, DataPlan
from halfstep.launcher.plan.ds import effects
from halfstep.launcher.plan.schedule import Schedule
from halfstep.launcher.topology import Topology
from halfstep.models.lora import Lora


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The network that will be built."""

    name: str
    config: dict[str, Any]
    """A complete transformers config, `model_type` included."""
    weights: str | None
    """Where trained weights are loaded from; None: a fresh initialisation."""
    weights_digest: str | None
    """Identifies those weights, wherever they lie."""
    parameters: int
    """Distinct parameters; a tied head counts once."""
    flops_per_token: float | None
    """Forward and backward, causal attention counted; None where the family is not known."""
    vocabulary: int
    """Rows of the embedding."""
    active_parameters: int | None = None
    """Parameters that a token goes through, fewer in a mixture of experts; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class NumericsPlan:
    """When a run has to stop, and what is written down about its gradients."""

    every: int
    """Steps between events on each layer's gradients; 0 = never."""
    max_skips: int
    repairs: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """When the state is saved, what is kept, and what a start does with it."""

    every: int
    """Steps; 0 = none in between."""
    keep: int
    keep_every: int
    """Steps; 0 = none."""
    at_end: bool
    resume: str
    """`auto`, `must` or `never`."""
    on_failure: str
    """`stop` or `continue`."""
    grace: float
    """Seconds; 0 = no limit."""

    def due(self, step: int, last: int) -> bool:
        """Tell whether the state is saved after a step of a run that ends with step `last`."""
        return (self.every > 0 and step % self.every == 0) or (self.at_end and step == last)

    def count(self, last: int) -> int:
        """Return after how many steps of a run that ends with step `last` the state is saved."""
        regular = last // self.every if self.every > 0 else 0
        return regular + (self.at_end and not (self.every > 0 and last % self.every == 0))


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """A task that the model is judged by."""

    name: str
    path: str
    digest: str
    """Of what it asks and of its data, wherever they lie."""


@dataclass(frozen=True, kw_only=True)
class WatchPlan:
    """How a stalled or slow rank is noticed."""

    timeout: float
    """Seconds without progress."""
    startup: float
    """The same before the first step."""
    slow: float
    """Times the others' computing time; 0 = never."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision of a run; JSON-able, equal on every rank, never changed afterwards."""

    run_id: str
    identity: dict[str, Any]
    """What may not change when a run continues in its directory."""
    model: ModelPlan
    data: DataPlan
    batch: Batch
    topology: Topology
    sequence: int
    steps: int
    tokens: int
    """Training tokens in all."""
    zero: int
    precision: str
    seed: int
    activation_checkpointing: bool
    compile: bool
    trust_remote_code: bool
    schedule: Schedule
    clip: float
    numerics: NumericsPlan
    checkpoint: CheckpointPlan
    watch: WatchPlan
    eval_every: int
    log_every: int
    peak_flops: float | None
    """Of one device, for MFU; None where not known."""
    deepspeed: dict[str, Any]
    origins: dict[str, str]
    memory: dict[str, Any]
    time: dict[str, Any]
    """A step's seconds and what follows from them (`forecast/run_estimate.py`); null where the device is not known."""
    warnings: list[str]
    refused_by: list[dict[str, str]]
    fused_head: bool = False
    """Whether the head and the loss are one."""
    documents: str = "plain"
    """`masked` where attention stays inside documents."""
    keep_fp32: list[str] = field(default_factory=list)
    """Patterns of the modules that autocast leaves alone."""
    router_loss: float = 0.0
    """What a mixture's auxiliary loss is multiplied with in the loss that is trained; 0: none is computed."""
    tasks: list[TaskPlan] = field(default_factory=list)
    """What the model is judged by at evaluations."""
    tasks_every: int | None = None
    """Steps: at evaluations after multiples of it; 0 = at the last alone; None = at all. The last always does."""
    lora: Lora | None = None
    """The adapters that are trained, beside frozen weights; None: every parameter is trained."""
    ema_decay: float = 0.0
    """Of the average of the masters; 0: none is kept."""
    micro_because: str = ""
    """Why the micro-batch is what it is; empty where it was asked for, and on CPU ranks."""

    @property
    def evaluations(self) -> int | None:
        """How often a run evaluates: at step 0, at the last, and at every multiple between; None without data."""
        if not self.data.known:
            return None
        between = (self.steps - 1) // self.eval_every if self.eval_every else 0
        return 2 + between if self.data.validation_windows else 0

    def judges(self, step: int) -> bool:
        """Tell whether the evaluation after a step judges by tasks."""
        if not self.tasks:
            return False
        return step == self.steps or self.tasks_every is None or (self.tasks_every > 0 and step % self.tasks_every == 0)

    @property
    def documents_apart(self) -> bool:
        """Whether attention stays inside the documents of all corpora or of some: examples always are kept apart."""
        return self.documents == "masked" or self.data.has_examples

    @property
    def trained_parameters(self) -> int:
        """Parameters that have gradients, masters and optimizer states."""
        return self.model.parameters if self.lora is None else self.lora.parameters

    @property
    def can_save(self) -> bool:
        """Whether the state can be written down; what lies on NVMe cannot yet."""
        moved = (self.deepspeed["zero_optimization"].get(f"offload_{what}", {}) for what in ("param", "optimizer"))
        return all(section.get("device") != "nvme" for section in moved)

    @property
    def repairs_on(self) -> bool:
        """Whether what DeepSpeed gets wrong in this cell is repaired; only stage 0 in half precision needs it."""
        return self.numerics.repairs or self.zero != 0 or not precisions.of(self.precision).half_weights

    def setting(self) -> effects.Setting:
        """Return what the effect of a DeepSpeed key depends on."""
        leaves = flatten(self.deepspeed)
        return effects.Setting(zero=self.zero, precision=self.precision, topology=self.topology, leaves=leaves)

    def changed_from(self, identity: Mapping[str, Any]) -> list[str]:
        """Return the keys that make this another run than one of that identity; what does nothing may come and go."""
        changed = changes(identity, self.identity)
        pointless = effects.make_no_other_run(changed, identity, self.setting())
        return [key for key in changed if key not in pointless]

    def left_out_since(self, tree: dict[str, Any]) -> list[str]:
        """Return the keys that change checkpoints, that an older plan of the run had and that this one leaves out."""
        try:
            held = Plan.from_dict(tree).setting()
        except (ValueError, KeyError, TypeError):
            return []
        here = self.setting()
        return [path for path in held.leaves if effects.is_left_out(path, held) and not here.value(path)]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able dictionaries."""
        tree = dataclasses.asdict(self)
        tree["batch"]["global"] = tree["batch"].pop("global_")
        tree["topology"]["nodes"] = self.topology.nodes
        if not self.data.parts:  # what reads the plan of a single corpus finds in it what it always had
            del tree["data"]["parts"]
        for corpus in (tree["data"], *tree["data"].get("parts", ())):
            if corpus["examples"] is None:  # nor does a corpus of text say that it is none of examples
                del corpus["examples"]
        if not self.data.known:
            tree |= {"data": dict.fromkeys(tree["data"]), "run_id": None}
        return tree

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Plan":
        """Rebuild a plan that `to_dict` wrote; raises ValueError, KeyError or TypeError for what is none."""
        batch = dict(tree["batch"])
        batch["global_"] = batch.pop("global")
        topology = {key: value for key, value in tree["topology"].items() if key != "nodes"}
        text = json.dumps({"time": {}, **tree, "batch": batch, "topology": topology})
        return _adapter().validate_json(text, strict=True)

    def require_allowed(self) -> None:
        """Raise RequestError with every rule the request breaks."""
        problems = [
            RequestError(
                f"{violation['sentence']} (rule {violation['rule']})", where=violation["where"], fix=violation["fix"]
            )
            for violation in self.refused_by
        ]
        if problems:
            raise problems[0].with_more(problems[1:])


@functools.cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


_NOT_THE_QUESTION = (
    "run_id",
    "log_every",
    "origins",
    "memory",
    "time",
    "warnings",
    "refused_by",
    "peak_flops",
    "checkpoint",
    "watch",
    "micro_because",
)
"""Parts of a plan that do not make it another run: logging, and what is only said about it."""


def run_id_of(tree: dict[str, Any]) -> str:
    """Hash a plan, as `Plan.to_dict` wrote it, without paths, logging and what is only said about it.

    It works on the tree, not on a Plan, so that what an older or newer Halfstep planned keeps its id.
    """
    if not isinstance(tree["deepspeed"].get("zero_optimization"), dict):
        raise ValueError("its DeepSpeed config has no ZeRO section")
    kept = copy.deepcopy({key: value for key, value in tree.items() if key not in _NOT_THE_QUESTION})
    for part in kept["data"].get("parts") or ():
        for key in PLACES:
            part.pop(key, None)
    for section, keys in {
        "data": PLACES,
        "numerics": ("every", "max_skips"),
        "model": ("name", "weights"),
        "identity": ("model.name",),
    }.items():
        for key in keys:
            kept[section].pop(key, None)
    if not kept["schedule"].get("decay"):  # runs of other kinds than `wsd` are older than this field
        kept["schedule"].pop("decay", None)
    for task in kept.get("tasks") or ():
        task.pop("path", None)
    if not kept.get("tasks"):
        kept.pop("tasks_every", None)
    for key in ("fused_head", "keep_fp32", "router_loss", "tasks", "lora", "ema_decay"):
        if not kept.get(key):
            kept.pop(key, None)
    if kept.get("documents") == "plain":
        del kept["documents"]
    if kept["model"].pop("active_parameters", None) not in (None, kept["model"]["parameters"]):
        kept["model"]["flops_per_token"] = None  # runs of mixtures are older than what is known of their FLOPs
    for section in kept["deepspeed"]["zero_optimization"].values():
        if isinstance(section, dict):
            section.pop("nvme_path", None)
    return digest(kept)
