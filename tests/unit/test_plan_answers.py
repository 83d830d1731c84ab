"""What a plan says that answers to tasks take: keys and values to the byte, upper bounds, and what to change."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import judges
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from halfstep.launcher.config import task_file
from halfstep.launcher.forecast import answering, fit, memory_table
from halfstep.launcher.forecast.answering import Asking
from halfstep.launcher.forecast.memory import FITS, TIGHT, forecast
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.plan import present
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Topology
from halfstep.models import shapes
from halfstep.models.network import build
from halfstep.models.presets import PRESETS

WRITES = 'batch = 8\nmetrics = ["exact_match"]\n[answer]\nkind = "generate"\nmax_new_tokens = 20\n'
CHOOSES = 'batch = 8\nmetrics = ["accuracy"]\n[answer]\nkind = "choices"\nchoices = [" yes", " certainly not"]\n'


def workload(preset: str = "gpt2-nano", **more: Any) -> Workload:
    shape = shapes.shape_of(PRESETS[preset], layers=2, vocabulary=512)
    base: dict[str, Any] = {"zero": 1, "precision": "fp32", "ranks": 1, "ranks_per_node": 1, "micro": 1}
    base |= {"accumulation": 1, "sequence": 64, "accelerator": "cuda", "reduce_bucket": 2**20}
    return Workload(shape=shape, parameters=shapes.parameters(shape), **{**base, **more})


def asking(**more: Any) -> Asking:
    return Asking(**{"name": "small", "rows": 4, "longest": 60, "context": 128, **more})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("preset", "precision"), [("gpt2-nano", "fp32"), ("llama-nano", "bf16")])
def test_keys_and_values_are_those_that_transformers_keeps(preset: str, precision: str, beams: int) -> None:
    made, task = workload(preset, precision=precision), asking(beams=beams, new_tokens=10)
    assert made.shape is not None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = build(shapes.hf_config(made.shape), seed=1, dtype=dtype)
    prompts = torch.randint(3, 512, (task.rows, task.prompt))
    settings = GenerationConfig(
        max_new_tokens=10, min_new_tokens=10, num_beams=beams, do_sample=False, use_cache=True,
        return_dict_in_generate=True, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kept = model.eval().generate(prompts, generation_config=settings).past_key_values
    tensors = [tensor for layer in kept.layers for tensor in (layer.keys, layer.values)]
    terms = {name: size for name, size, _ in answering.largest(made, [task])}
    # The last token of an answer is never read.
    assert sum(tensor.nbytes for tensor in tensors) * 40 == terms["keys and values"] * 39
    assert max(tensor.nbytes for tensor in tensors) * 40 == terms["cache being lengthened"] * 39


@given(
    st.sampled_from(["gpt2-nano", "llama-nano"]),
    st.sampled_from(["cpu", "cuda"]),
    st.integers(0, 3),
    st.integers(1, 600),
    st.integers(0, 100),
    st.integers(1, 4),
    st.booleans(),
)
def test_answers_never_lower_the_peak_and_leave_the_least_that_is_needed(
    preset: str, accelerator: str, zero: int, rows: int, new_tokens: int, beams: int, scored: bool
) -> None:
    made = workload(preset, accelerator=accelerator, zero=zero)
    task = asking(rows=rows, new_tokens=new_tokens, beams=beams, scored=scored or not new_tokens)
    without, needed = forecast(made), forecast(made, tasks=[task])
    assert sum(term.bytes for term in needed.device) == needed.peak_bytes + needed.outside_bytes
    assert needed.peak_bytes == max(without.peak_bytes, needed.by_phase["answers to tasks"])
    assert needed.low_bytes == without.low_bytes
    more = forecast(made, tasks=[task, dataclasses.replace(task, rows=rows + 1)])
    assert more.by_phase["answers to tasks"] > needed.by_phase["answers to tasks"]


def test_a_batch_that_may_not_fit_is_named_and_refuses_nothing() -> None:
    made, many = workload(), asking(rows=4096, new_tokens=60)
    peak = forecast(made).high_bytes
    room = peak + forecast(made).outside_bytes
    assert forecast(made, capacity_bytes=room).verdict() == FITS
    assert forecast(made, capacity_bytes=room, tasks=[many]).verdict() == TIGHT
    described = fit.described(made, room, [many])
    assert described["peak_at"] == "answers to tasks"
    assert described["changes"][0]["words"] == "batch = 2048 in the task small"
    assert described["largest_micro"] == fit.described(made, room)["largest_micro"], "answers are no micro-batch"
    lines = "\n".join(memory_table.lines(described, False))
    assert "of 4,096 sequences of up to 90 tokens, task small" in lines
    unknown = fit.described(dataclasses.replace(made, shape=None), room, [many])
    assert unknown["excludes"] == "activations: a family whose arithmetic is not known, and answers to tasks"


def test_prompts_are_as_long_as_the_data_and_the_layout_let_them_be(plan: Callable[..., Plan], tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a" * 30, "completion": "é" * 10}]
    task = judges.task(tmp_path / "writing", rows, WRITES)
    longest = len('{"prompt": "' + "a" * 30 + '", "completion": "' + "é" * 10 + '"}\n') + 10  # bytes of an é: 2
    assert task_file.read(task).longest_row == longest

    def answered(file: Path) -> int:
        made = plan(f"eval.tasks={file}")
        return made.memory["by_moment"]["answers to tasks"]

    assert "answers to tasks" not in plan().memory["by_moment"]
    short = answered(task)
    task.write_text(task.read_text().replace("metrics", f'prompt = "{"x" * 40}{{prompt}}"\nmetrics'))
    assert answered(task) > short, "examples that stand in the layout are part of every prompt"
    choosing = judges.task(tmp_path / "choosing", [{"prompt": "a", "completion": "yes"}], CHOOSES)
    assert answered(choosing) != short
    packed = tmp_path / "writing" / "rows.jsonl.gz"
    packed.write_bytes(b"whatever")
    task.write_text(task.read_text().replace("rows.jsonl", "rows.jsonl.gz"))
    assert task_file.read(task).longest_row is None
    assert answered(task) > short, "of compressed rows nothing is known but the model's context"


def test_the_time_of_a_run_is_said_to_be_without_that_of_answers(plan: Callable[..., Plan], tmp_path: Path) -> None:
    task = judges.task(tmp_path / "writing", [{"prompt": "a", "completion": "b"}], WRITES)
    gpu = Topology(world_size=8, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")
    judged, unjudged = (plan(*keys, topology=gpu) for keys in ((f"eval.tasks={task}",), ()))
    (line,) = [line for line in present.lines(judged) if "whole run" in line]
    assert "without the time of saving and of answers to tasks" in line
    assert "answers" not in "".join(line for line in present.lines(unjudged) if "whole run" in line)
