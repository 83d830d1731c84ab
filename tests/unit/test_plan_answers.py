"""What a plan says that answers to tasks take: keys and values to the byte, upper bounds, and what to change."""

import dataclasses
import json
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
from halfstep.launcher.plan import cautions, present
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import prediction_errors
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


def tokens_of(memory: dict[str, Any]) -> int:
    """Return the positions of which logits are held at the peak, by a vocabulary of 4096 in fp32."""
    (logits,) = [term["bytes"] for term in memory["device_terms"] if term["name"] == "logits"]
    return logits // (4 * 4096)


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
    short, plainly = answered(task), task.read_text()
    task.write_text(plainly.replace("metrics", 'template = "alpaca"\nmetrics'))
    assert answered(task) > short, "what a template writes around a prompt"
    task.write_text(plainly)
    task.write_text(task.read_text().replace("metrics", f'prompt = "{"x" * 40}{{prompt}}"\nmetrics'))
    assert answered(task) > short, "examples that stand in the layout are part of every prompt"
    choosing = judges.task(tmp_path / "choosing", [{"prompt": "a", "completion": "yes"}], CHOOSES)
    assert answered(choosing) != short
    before = answered(task)
    task.write_text(task.read_text().replace("{prompt}", "{prompt} {prompt}"))
    assert answered(task) > before, "a field that stands there twice"
    (tmp_path / "writing" / "ROWS.JSONL.GZ").write_bytes(b"whatever")
    task.write_text(task.read_text().replace("rows.jsonl", "ROWS.JSONL.GZ"))
    assert task_file.read(task).longest_row is None
    made = plan(f"eval.tasks={task}")
    assert made.memory["excludes"] == "answers to small, whose rows are compressed"
    assert "not counted: answers to small" in "\n".join(memory_table.lines(made.memory, False))


@pytest.mark.parametrize(
    ("limit", "choices", "rows"), [(4, 5, 20), (40, 5, 64), (4, 100, 64), (None, 2, 64)], ids=lambda given: str(given)
)
def test_of_choices_each_row_is_as_many_sequences(
    limit: int | None, choices: int, rows: int, plan: Callable[..., Plan], tmp_path: Path
) -> None:
    named = ", ".join(f'" choice {number:03}"' for number in range(choices))
    text = f'{f"limit = {limit}" if limit else ""}\nbatch = 64\nmetrics = ["accuracy"]\n'
    text += f'[answer]\nkind = "choices"\nchoices = [{named}]\n'
    file = judges.task(tmp_path / "task", [{"prompt": "a" * 300, "completion": "choice 000"}] * 80, text)
    memory = plan(f"eval.tasks={file}", "batch.micro=1", "zero=1", "precision=fp32").memory
    assert memory["peak_is_bound"]
    assert tokens_of(memory) == rows * 128, "all of the model's context"


def test_what_is_scored_may_fill_the_context_that_a_prompt_leaves_to_its_answer() -> None:
    made = workload()
    both = asking(longest=1000, new_tokens=100, scored=True, rows=1)
    assert (both.prompt, both.sequence) == (28, 128)
    terms = {name: size for name, size, _ in answering.largest(made, [both])}
    assert terms["logits"] == 4 * 512 * 128


def test_a_bound_is_no_prediction_that_less_than_it_proves_wrong(
    plan: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = judges.task(tmp_path / "task", [{"prompt": "a" * 300, "completion": "b"}], WRITES.replace("8", "4096"))
    made = plan(f"eval.tasks={task}")
    assert made.memory["peak_is_bound"]
    said = cautions.memory_warning(made, made.memory["predicted_peak_bytes"] // 2)
    assert said is not None
    assert "may not fit: a rank may need up to" in said
    for name, planned in (("bound", made), ("predicted", plan())):
        run = tmp_path / name
        run.mkdir()
        (run / "plan.json").write_text(json.dumps(planned.to_dict()))
        measured = {"status": "done", "peak_memory_bytes": 2**29, "predicted_peak_bytes": 1}
        (run / "summary.json").write_text(json.dumps(measured))
    assert prediction_errors.run(tmp_path / "bound").peak_error is None
    assert prediction_errors.run(tmp_path / "predicted").peak_error is not None


def test_the_time_of_a_run_is_said_to_be_without_that_of_answers(plan: Callable[..., Plan], tmp_path: Path) -> None:
    task = judges.task(tmp_path / "writing", [{"prompt": "a", "completion": "b"}], WRITES)
    gpu = Topology(world_size=8, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")
    judged, unjudged = (plan(*keys, topology=gpu) for keys in ((f"eval.tasks={task}",), ()))
    (line,) = [line for line in present.lines(judged) if "whole run" in line]
    assert "without the time of saving and of answers to tasks" in line
    assert "answers" not in "".join(line for line in present.lines(unjudged) if "whole run" in line)
