"""Published training runs as rows of a CSV: read what they say, guess the rest as their stack's habits have it."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher.config import counts
from halfstep.launcher.config.legal import shown
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import hardware as devices
from halfstep.launcher.forecast.hardware import Hardware, Rows
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.published.run_shape import number, shape_of
from halfstep.launcher.forecast.published.trainers import Stack, stack_of
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import reason


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published run, as the planner sees it."""

    row_id: str
    group: str
    source: str
    stack: str
    device: Hardware | None
    workload: Workload
    layout: Layout
    text: Mapping[str, str]
    """The row itself."""


def read(path: Path, own: Rows | None = None) -> list[Row]:
    """Read a file of rows; missing columns are empty. Raises RequestError where it is no such file."""
    return [parse(text, own) for text in read_text(path)]


def read_text(path: Path) -> list[dict[str, str]]:
    """Read the rows as text; raises RequestError where the file is no CSV with a `row_id`."""
    try:
        # Lines as the file has them: a line break inside of quotes is part of a cell.
        reader = csv.DictReader(io.StringIO(foreign.read_text(path, follow=True), newline=""), strict=True)
        rows = [
            {key: (value if isinstance(value, str) else "").strip() for key, value in row.items() if key is not None}
            for row in reader
        ]
        names = reader.fieldnames or []
    except OSError as error:
        raise RequestError(f"cannot be read: {reason(error)}", where=str(path), fix="check the path") from None
    except (ValueError, csv.Error) as error:
        raise RequestError(f"the rows are no CSV: {error}", where=str(path), fix="repair or fetch the file") from None
    if "row_id" not in names:
        known = ", ".join(name for name in names if name) or "nothing"
        raise RequestError(
            f"the rows have no column row_id; the first line names {known[:200]}",
            where=str(path),
            fix="give a CSV with the columns row_id, gpu, n_gpus, model_params_B, layers, hidden, ...",
        )
    return rows


def parse(text: Mapping[str, str], own: Rows | None = None) -> Row:
    """Return a row as a workload and a layout; what it does not say is guessed as the trainer's habits have it."""
    source = text.get("source", "")
    stack = stack_of(text)
    try:
        device: Hardware | None = devices.find(text.get("gpu", ""), own)
    except RequestError:
        device = None
    sequence = _sequence(text)
    shape, parameters = shape_of(text, sequence)
    cut = _cut(text.get("sharding", ""))
    tensor, pipeline = _tensor_and_pipeline(text.get("sharding", ""), cut, stack)
    context = cut.get("CP", cut.get("SP", 1))
    asked = number(text.get("n_gpus", ""))
    n_gpus = int(asked) if asked else tensor * pipeline * context * cut.get("DP", 1)
    ranks = cut.get("DP") or max(1, n_gpus // (tensor * pipeline * context))
    micro, accumulation = _batch(text, sequence, ranks, tensor, pipeline, stack)
    precision, arithmetic = _precision(text, device)
    layout = _layout(text, stack, device, tensor=tensor, pipeline=pipeline, context=context, arithmetic=arithmetic)
    if layout.virtual == 1 and cut.get("VP", 1) > 1:
        layout = dataclasses.replace(layout, virtual=cut["VP"])
    offload = _offload(text)
    name = device.name if device else ""
    workload = Workload(
        shape=shape,
        parameters=parameters,
        zero=_stage(text.get("sharding", ""), stack),
        precision=precision,
        ranks=ranks,
        ranks_per_node=_ranks_per_node(text, stack, name, device),
        micro=micro,
        accumulation=accumulation,
        sequence=sequence,
        accelerator="cuda",
        offload_optimizer="cpu" if offload else "none",
        offload_param="cpu" if "param" in offload or "full" in offload else "none",
        activation_checkpointing=text.get("activation_checkpointing", "").startswith("full"),
        accumulation_dtype=precision,
        communication_dtype=precision,
        overlap_comm=layout.collectives != "deepspeed" or _stage(text.get("sharding", ""), stack) == 3,
        fused_loss="Liger" in f"{text.get('sharding', '')} {text.get('notes', '')}".replace("no Liger", ""),
    )
    _refuse_beyond_bounds(workload, text)
    return Row(
        row_id=text.get("row_id", ""),
        group=text.get("group", ""),
        source=source,
        stack=stack.name,
        device=device,
        workload=workload,
        layout=layout,
        text=text,
    )


def _refuse_beyond_bounds(workload: Workload, text: Mapping[str, str]) -> None:
    """Raise RequestError for a row that says more than can be predicted."""
    shape = workload.shape
    said = {"n_gpus": (workload.ranks, counts.RANKS)}
    if shape is not None:
        said |= {"layers": (shape.layers, counts.LAYERS), "hidden": (shape.width, counts.WIDTH)}
    for name, (value, most) in said.items():
        if value > most:
            raise RequestError(
                f"{name} is {value}; at most {most} can be predicted",
                where=f"row {shown(text.get('row_id', ''))}",
                fix="correct the row, or leave it out",
            )


def _layout(
    text: Mapping[str, str],
    stack: Stack,
    device: Hardware | None,
    *,
    tensor: int,
    pipeline: int,
    context: int,
    arithmetic: str | None,
) -> Layout:
    notes, sharding = text.get("notes", ""), text.get("sharding", "")
    kind = text.get("activation_checkpointing", "")
    recompute = next((word for word in ("none", "selective", "full") if kind.startswith(word)), None)
    collectives = "fsdp" if "FSDP" in sharding and "FSDP0" not in sharding else stack.collectives
    if collectives == "deepspeed" and "ZeRO" not in sharding:
        collectives = "ddp"
    compiled = stack.compiled and "eager" not in notes.replace("eager/compile", "").partition("->")[0]
    name = device.name if device else ""
    network = next((rate for start, rate in stack.network.items() if name.startswith(start)), None)
    links = re.search(r"(?<![0-9])([0-9]{1,4})xIB", text.get("file_or_table", ""))
    if links and int(links[1]):  # so many 100 Gb/s adapters for the 16 V100 of a DGX-2
        network = int(links[1]) * 12.5e9 / 16
    attention = stack.attention
    if "FA3" in notes or "cuDNN" in notes:
        attention = "hopper"
    return Layout(
        tensor=tensor,
        tensor_overlap=stack.name == "megatron-core" or "async" in notes.lower(),
        sequence_parallel=stack.sequence_parallel or "sequence parallel" in kind or "+SP" in sharding,
        pipeline=pipeline,
        virtual=2 if "interleaved" in notes else 1,
        context=context,
        collectives=collectives,
        quantized="ZeRO++" in sharding,
        arithmetic=arithmetic,
        recompute=recompute or ("none" if stack.name != "megatron-core" else "selective"),
        reentrant=stack.name in ("megatron-deepspeed", "deepspeed-2020"),
        attention=attention,
        compiled=compiled,
        network=network,
    )


def _cut(sharding: str) -> dict[str, int]:
    """Return the numbers of `TP8 PP12 DP4 CP1 VP5`, `FSDP32+TP8` and the like."""
    cuts = re.findall(r"(?<![A-Za-z])(TP|PP|DP|CP|VP|SP)([0-9]{1,6})(?![0-9])", sharding)
    return {word: max(1, int(number)) for word, number in cuts}


def _tensor_and_pipeline(sharding: str, cut: Mapping[str, int], stack: Stack) -> tuple[int, int]:
    product = re.search(r"TPxPP=([0-9]{1,6})(?![0-9])", sharding)
    if product and int(product[1]):  # Megatron: tensor parallelism up to a node of 8 first (Narayanan et al. 2021)
        tensor = math.gcd(8, int(product[1]))
        return tensor, int(product[1]) // tensor
    tensor = cut.get("TP", 1)
    if "PP(n/" in sharding or "TP+SP+PP" in sharding:  # the 530B runs of Korthikanti et al. 2022
        return 8, 35
    return tensor, cut.get("PP", 1)


def _stage(sharding: str, stack: Stack) -> int:
    said = re.search(r"ZeRO-([0-3])(?![0-9])", sharding)
    if said:
        return int(said[1])
    if "ZeRO++" in sharding:
        return 3
    if "SHARD_GRAD_OP" in sharding:
        return 2
    if "FSDP" in sharding and "FSDP0" not in sharding:
        return 3
    return 1 if stack.collectives == "megatron" or "FSDP0" in sharding or "ZeRO" in sharding else 0


def _offload(text: Mapping[str, str]) -> str:
    said = f"{text.get('offload', '')} {text.get('sharding', '')}".lower()
    if "no offload" in said or text.get("offload", "").lower() in ("none", "no"):
        return ""
    return said if "offload" in said else text.get("offload", "").lower()


def _batch(
    text: Mapping[str, str], sequence: int, ranks: int, tensor: int, pipeline: int, stack: Stack
) -> tuple[int, int]:
    said, whole = text.get("micro_batch", ""), number(text.get("global_batch", ""))
    micro = number(said)
    if micro and "tok" in said:
        micro = max(1.0, micro / sequence)
    per_rank = whole / ranks if whole else None
    if micro is None:
        # Nothing said: 8192 tokens a device where that is legal, one sequence in a pipeline.
        micro = 1.0 if pipeline > 1 else max(1.0, min(per_rank or math.inf, 8192 * tensor / sequence))
    if stack.name == "torchtitan" and pipeline > 1:  # its local batch is cut into micro-batches of one
        return 1, max(1, round(micro))
    accumulation = max(1, round(per_rank / micro)) if per_rank else max(1, 4 * pipeline if pipeline > 1 else 1)
    return max(1, round(micro)), accumulation


def _sequence(text: Mapping[str, str]) -> int:
    said = number(text.get("seq_len", ""))
    if said:
        return int(said)
    notes = text.get("notes", "")
    if "torchtitan" in text.get("source", ""):
        return 8192
    if "GPT3" in notes:
        return 2048
    return 4096 if "NeMo" in text.get("source", "") else 1024 if "V100" in text.get("gpu", "") else 2048


def _precision(text: Mapping[str, str], device: Hardware | None) -> tuple[str, str | None]:
    said = text.get("precision", "").lower()
    arithmetic = "fp4" if "fp4" in said else "fp8" if "fp8" in said else None
    if arithmetic == "fp8":  # a scale for each row, or for each 32 elements, costs passes over the tensors
        first = said.partition("(")[0]
        arithmetic = "fp8-rowwise" if "rowwise" in first else "fp8-mx" if "mx" in first else "fp8"
    if "fp32" in said:
        return "fp32", None
    old = device is not None and device.name.startswith("v100")
    half = "fp16" if "fp16" in said or (not said and old) else "bf16"
    return half, arithmetic


def _ranks_per_node(text: Mapping[str, str], stack: Stack, name: str, device: Hardware | None) -> int:
    said = re.search(r"[0-9] nodes x ([0-9]{1,6})(?![0-9])", text.get("notes", ""))
    if said and int(said[1]):
        return int(said[1])
    known = next((number for start, number in stack.ranks_per_node.items() if name.startswith(start)), None)
    return known or (device.node if device else 8)
