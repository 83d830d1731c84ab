"""What a plan is predicted to need and take: the one place where planning asks the forecast."""

import re
from collections import Counter
from typing import Any

from halfstep.launcher.config.task_file import CHOICES, GENERATE, Task
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.forecast import fit, hardware, run_estimate, workload
from halfstep.launcher.forecast.answering import Asking
from halfstep.launcher.forecast.memory import FITS, TOO_LARGE
from halfstep.launcher.plan import batch
from halfstep.launcher.plan.facts import Facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Topology
from halfstep.models.lora import Linear, Lora, is_named, linear_layers
from halfstep.models.shapes import Shape, from_hf_config

_GIB = 2**30
_TEMPLATE_BYTES = 1024
"""What a chat template writes around a prompt, at most: alpaca 140 bytes, others a system message of their own."""
FILLING_TOKENS = 32 * 1024
"""Of a micro-step: a GPU is busy with them, more gain little and take memory (H200, GPT-2 124M: 64k are 5 % faster)."""


def memory_of(plan: Plan, facts: Facts, named: str | None) -> dict[str, Any]:
    """Return a rank's predicted memory and whether its device has it; `named` is the run key `hardware`."""
    asked = [_asking(task, task.longest_row, plan) for task in facts.tasks if task.longest_row is not None]
    described = fit.described(workload_of(plan), _capacity(plan.topology, facts, named), asked)
    unread = [task.spec.name for task in facts.tasks if task.longest_row is None]
    if unread and described["excludes"] == fit.NOTHING:
        described["excludes"] = f"answers to {', '.join(unread)}, whose rows are compressed"
    return described


def _asking(task: Task, longest_row: int, plan: Plan) -> Asking:
    spec, shape = task.spec, from_hf_config(plan.model.config)
    generates = spec.answer.kind == GENERATE
    limit = spec.limit or spec.batch
    if spec.answer.kind == CHOICES:  # each row is as many sequences as it has choices
        limit = limit * len(spec.answer.choices) if spec.answer.choices else spec.batch
    # Of a few examples that stand in the layout itself, too.
    around = [spec.prompt, spec.reference, max(spec.answer.choices or [""], key=len)]
    longest = longest_row * max(map(_most_often, around[:2])) + len("".join(around).encode())
    return Asking(
        name=spec.name,
        rows=min(spec.batch, limit),
        longest=longest + (_TEMPLATE_BYTES if spec.template else 0),
        context=shape.positions if shape else plan.sequence,
        new_tokens=spec.answer.max_new_tokens if generates else 0,
        beams=spec.answer.beams,
        scored=not generates or "perplexity" in spec.metrics,
    )


def time_of(plan: Plan, facts: Facts, named: str | None, terms: run_estimate.Terms | None = None) -> dict[str, Any]:
    """Return how long a plan takes; `named` is the run key `hardware`."""
    topology = plan.topology
    device = hardware.of(named, topology.device_name, topology.accelerator, facts.hardware)
    work = run_estimate.Work(
        steps=plan.steps,
        evaluations=plan.evaluations,
        evaluation_sequences=plan.data.validation_windows,
        checkpoints=plan.checkpoint.count(plan.steps),
    )
    return run_estimate.of(workload_of(plan), device, topology.device_name, work, terms)


def _most_often(layout: str) -> int:
    """Return how often the field stands in a layout that stands there most often, or 1."""
    return max(Counter(re.findall(r"{([^{}]+)}", layout)).values(), default=1)


def micro_of(plan: Plan, facts: Facts, named: str | None) -> tuple[int | None, str]:
    """Return the micro-batch of a GPU for which nobody asked, None where it cannot be told, and why it is that one.

    It is the largest that divides the rank's share of the batch, whose predicted peak surely fits, and whose tokens do
    not exceed what fills the device; `plan` has any other.
    """
    share, sequence = plan.batch.micro * plan.batch.accumulation, plan.sequence
    sizes = batch.micro_sizes(share, FILLING_TOKENS // sequence)
    capacity, workload = _capacity(plan.topology, facts, named), workload_of(plan)
    if capacity is None or workload.shape is None:
        unknown = "the device's memory" if capacity is None else "what the model's activations need"
        return None, f"the largest divisor of {share} up to 8, since {unknown} is not known"
    fitting = fit.largest_fitting(workload, capacity, sizes)
    if fitting is None:
        return 1, f"one sequence, and not even that is sure to fit in {capacity / _GIB:.1f} GiB"
    micro, bound = fitting
    fits = f"its peak, at most {bound / _GIB:.1f} GiB, fits in {capacity / _GIB:.1f}"
    if micro == share:
        return micro, f"all of a rank's share; {fits}"
    if micro == sizes[-1]:
        return micro, f"the largest divisor of {share} up to {FILLING_TOKENS:,} tokens, which fill the device; {fits}"
    return micro, f"the largest divisor of {share} that is sure to fit: {fits}"


def workload_of(plan: Plan) -> workload.Workload:
    """Return what the forecasts read of a whole plan."""
    shape, lora = from_hf_config(plan.model.config), plan.lora
    adapters: dict[str, Any] = {}
    if lora is not None:
        adapters = {"adapter_rank": lora.rank, "adapted": _adapted(shape, lora), "adapter_dropout": lora.dropout}
    return workload.of(
        plan.deepspeed,
        shape=shape,
        parameters=plan.model.parameters,
        zero=plan.zero,
        precision=plan.precision,
        micro=plan.batch.micro,
        accumulation=plan.batch.accumulation,
        topology=plan.topology,
        sequence=plan.sequence,
        activation_checkpointing=plan.activation_checkpointing,
        compile=plan.compile,
        fused_head=plan.fused_head,
        documents_apart=plan.documents_apart,
        averaged=bool(plan.ema_decay),
        repairs=plan.numerics.repairs,
        **adapters,
    )


def _adapted(shape: Shape | None, lora: Lora) -> tuple[Linear, ...]:
    """Return the layers with adapters; of an unknown shape, equal ones that stand for them."""
    if shape is not None:
        return tuple(layer for layer in linear_layers(shape) if is_named(layer.name, lora.targets))
    columns = lora.parameters // lora.rank
    share = columns // lora.layers
    sizes = [share] * (lora.layers - 1) + [columns - share * (lora.layers - 1)]
    return tuple(Linear("", size // 2, size - size // 2) for size in sizes)


def _capacity(topology: Topology, facts: Facts, named: str | None) -> int | None:
    """Return the bytes that one rank has: its GPU's, or its share of the host's."""
    if topology.accelerator == "cuda":
        return hardware.memory_bytes(named, topology.device_name, facts.hardware)
    return facts.node_memory_bytes // topology.ranks_per_node if facts.node_memory_bytes else None


def require_fit(plan: Plan, force: bool = False) -> None:
    """Raise RefusedError, exit code 3, where a rank cannot have the memory it needs; `force` starts it all the same."""
    memory = plan.memory
    if force or memory.get("verdict") != TOO_LARGE:
        return
    least = memory["predicted_low_bytes"] + memory["outside_bytes"]
    largest = sorted(memory["device_terms"], key=lambda term: -term["bytes"])[:3]
    terms = ", ".join(f"{term['name']} {term['bytes'] / _GIB:.1f}" for term in largest)
    first = [
        f"{change['words']} ({change['peak_bytes'] / _GIB:.1f} GiB{', fits' if change['verdict'] == FITS else ''})"
        for change in memory["changes"][:3]
    ]
    raise RefusedError(
        f"a rank needs at least {least / _GIB:.1f} GiB and has {memory['capacity_bytes'] / _GIB:.1f}: it cannot fit",
        where=f"the largest terms at the peak, {memory['peak_at']}, in GiB: {terms}",
        fix=f"{', or '.join(first) or 'take more ranks or a smaller model'}; --force starts it all the same",
    )
