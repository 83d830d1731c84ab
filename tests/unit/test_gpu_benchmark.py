"""benchmarks/gpu.py as far as a CPU can show it: its arithmetic, its trace reader, its peers, its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import environment
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import breakdown, gpu, gpu_cases, gpu_device, gpu_report, peer_run, random_corpus
from benchmarks.plain_models import plain
from halfstep.models import shapes
from halfstep.models.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def row(case: str, who: str, rate: float, **more: object) -> dict:
    tokens = 1024
    timed = {"outcome": "done", "tokens_per_second": rate, "step_seconds": tokens / rate, "mfu": rate / 1e4}
    return {"case": case, "who": who, "micro": 1, "sequence": tokens, "seconds_to_first_step": 9.0, **timed} | {
        "first_loss": 11.0,
        "predicted_step_seconds": None,
        **more,
    }


def result(rows: list[dict], **more: object) -> dict:
    return {
        "dry_run": False,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0"},
        "revision": "0123456789abcdef",
        "date": "2026-11-30",
        "rows": rows,
        "ratios": gpu_report.ratios(rows),
        "cells": [],
        "breakdowns": [],
        "skipped": [],
        **more,
    }


def test_a_ratio_sets_round_against_round_and_says_how_far_the_rounds_are_apart() -> None:
    rows = [row("a", who, rate) for who, rate in (("ours", 300), ("plain", 100), ("ours", 400), ("plain", 200))]
    rows += [row("a", "ours", 900), row("a", "deepspeed", 150), row("b", "plain", 10)]
    rows += [{"case": "a", "who": "deepspeed", "outcome": "out of device memory"}]
    assert gpu_report.ratios(rows) == [
        {"case": "a", "peer": "plain", "rounds": 2, "low": 2.25, "median": 2.5, "high": 2.75},
        {"case": "a", "peer": "deepspeed", "rounds": 1, "low": 2.0, "median": 2.0, "high": 2.0},
    ]


def test_throughput_is_of_the_median_step_and_mfu_of_the_plans_flops() -> None:
    seen = gpu_report.speed([0.1, 0.2, 0.9], tokens=1000, flops_per_token=2e6, peak_flops=1e11)
    assert seen["tokens_per_second"] == 5000
    assert seen["mfu"] == 0.1
    assert seen["step_seconds_quartiles"] == pytest.approx([0.15, 0.55])
    assert gpu_report.speed([0.1], 10, 1.0, None)["mfu"] is None
    assert gpu_report.speed([], 10, 1.0, None) == {}


def test_goals_are_compared_with_what_was_measured_and_no_others() -> None:
    rows = [row("124m-z1", "ours", 5000), row("124m-z1", "plain", 4000), row("124m-z3", "ours", 4500)]
    goals = {goal.what: goal for goal in gpu_report.goals(result(rows))}
    assert (goals["124m-z1 / plain"].seen, goals["124m-z1 / plain"].least) == (1.25, 1.15)
    assert goals["124m-z1 MFU"].seen == 0.5
    assert goals["124m-z3 / 124m-z1"].seen == 0.9
    assert goals["124m-z0 / 124m-z1"].seen is None
    lines = {line[:28].strip(): line for line in gpu_report.table(result(rows))}
    assert lines["124m-z1 / plain"].endswith("1.250  met")
    assert lines["124m-z3 / 124m-z1"].endswith("0.900  NOT MET")
    assert lines["124m-z0 / 124m-z1"].endswith("-  not measured")


def test_the_table_shows_memory_beside_its_band_the_cells_the_gate_and_what_was_left_out() -> None:
    memory = {"predicted_peak_bytes": 5 << 30, "predicted_low_bytes": 4 << 30, "predicted_high_bytes": 6 << 30}
    cells = [
        {"cell": f"z{zero}-fp32", "precision": "fp32", "outcome": "done", "losses": [11.0 + zero / 10, 9.0], **memory}
        for zero in (0, 1)
    ]
    cells[1]["peak_bytes"] = 7 << 30
    spent = breakdown.Breakdown(kinds={"matmul": 0.03, "loss": 0.01}, busy=0.04, kernels=7, longest=[], on="cuda")
    lines = gpu_report.table(
        result(
            [row("a", "ours", 100, peak_bytes=4 << 30, **memory), {"case": "b", "who": "ours", "outcome": "killed"}],
            cells=cells,
            verify={"ok": True, "cells": [{"ok": True}], "not_run": [1, 2]},
            breakdowns=[{"case": "a", **spent.to_dict(0.05)}],
            skipped=[{"what": "c plain", "reason": "3 s are left"}],
        )
    )
    text = "\n".join(lines)
    assert "a                         4.00      5.00     +25.0 %  held" in lines
    assert "z1-fp32                   7.00      5.00     -28.6 %  NOT HELD" in lines
    assert "fp32: first losses within 0.1 over 2 stages" in text
    assert "parity gate: ok, 1 of 1 cases, 2 not run" in lines
    assert "  the GPU waits              10.00 ms, 20.0 % of the step" in lines
    assert "  matmul                     30.00 ms  75.0 %" in lines
    assert "  c plain: 3 s are left" in lines
    assert any(line.startswith("b ") and "killed" in line for line in lines)


def test_a_dry_run_says_so_and_names_no_goal() -> None:
    lines = gpu_report.table(result([row("124m-z1", "ours", 5000)], dry_run=True))
    assert lines[0].startswith("DRY RUN")
    assert not any(line.startswith("goal") for line in lines)


@pytest.mark.parametrize(
    ("name", "operators", "kind"),
    [
        # Names of the H200's profile.
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", ("aten::mm", "aten::linear"), "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", (), "attention"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", ("aten::copy_",), "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, exp_kernel_cuda>", ("aten::exp_",), "norm and elementwise"),
        ("void at::native::vectorized_layer_norm_kernel", ("aten::native_layer_norm",), "norm and elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", (), "copies"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", ("nccl:all_reduce",), "communication"),
        # The operators around a kernel decide where its name does not.
        ("void exp_kernel_cuda", ("aten::exp_", "_ChunkedCrossEntropyBackward"), "loss"),
        ("void direct_copy_kernel_cuda", ("aten::copy_", "_ChunkedCrossEntropy"), "loss"),
        ("liger_cross_entropy_kernel", (), "loss"),
        ("nvjet_sm90_mm", ("aten::mm", "LigerFusedLinearCrossEntropyFunction"), "matmul"),
        ("void elementwise_kernel", ("aten::mul", "Optimizer.step#AdamW.step"), "optimizer"),
        ("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", ("aten::_fused_adamw_",), "optimizer"),
        ("void cublasLt::splitKreduce_kernel", ("aten::addmm",), "matmul"),
    ],
)
def test_a_kernel_has_the_kind_of_its_name_or_of_what_launched_it(
    name: str, operators: tuple[str, ...], kind: str
) -> None:
    assert breakdown.kind_of(name, operators) == kind


def span(cat: str, name: str, start: float, lasted: float, correlation: int | None = None, tid: int = 1) -> dict:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": lasted, "tid": tid, "args": arguments}


def test_a_trace_is_added_up_by_kind_with_the_time_in_which_any_kernel_runs() -> None:
    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name"},
            span("cpu_op", "_ChunkedCrossEntropy", 0, 100),
            span("cpu_op", "aten::exp_", 10, 20),
            span("cuda_runtime", "cudaLaunchKernel", 12, 2, correlation=7),
            span("cpu_op", "aten::mm", 200, 50),
            span("cuda_driver", "cuLaunchKernelEx", 210, 2, correlation=8),
            span("kernel", "exp_kernel_cuda", 300, 1000, correlation=7, tid=9),
            span("kernel", "nvjet_mm", 800, 1000, correlation=8, tid=10),
            span("gpu_memcpy", "Memcpy DtoH", 3000, 100, correlation=99, tid=9),
            span("gpu_user_annotation", "a step", 300, 3000, tid=9),
        ]
    }
    spent = breakdown.of_trace(trace, steps=2)
    assert {kind: seconds for kind, seconds in spent.kinds.items() if seconds} == pytest.approx(
        {"loss": 5e-4, "matmul": 5e-4, "copies": 5e-5}
    )
    assert spent.busy == pytest.approx(8e-4)  # 300 to 1800, and 100 more, in two steps
    assert (spent.kernels, spent.on) == (1.5, "cuda")
    assert spent.to_dict(1e-3)["waits_seconds"] == pytest.approx(2e-4)


def test_on_a_cpu_the_operators_own_time_stands_for_kernels() -> None:
    trace = {
        "traceEvents": [
            span("user_annotation", "Optimizer.step#AdamW.step", 0, 100),
            span("cpu_op", "aten::_fused_adamw_", 10, 60),
            span("cpu_op", "aten::linear", 200, 100),
            span("cpu_op", "aten::mm", 210, 80),
            span("cpu_op", "aten::gelu", 300, 5),
        ]
    }
    spent = breakdown.of_trace(trace, steps=1)
    assert {kind: seconds for kind, seconds in spent.kinds.items() if seconds} == pytest.approx(
        {"optimizer": 6e-5, "matmul": 1e-4, "norm and elementwise": 5e-6}
    )
    assert (spent.on, spent.busy) == ("cpu", pytest.approx(1.65e-4))
    with pytest.raises(ValueError, match="neither kernels nor operators"):
        breakdown.of_trace({"traceEvents": []}, steps=1)


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano"])
def test_the_plain_models_are_those_of_transformers(preset: str) -> None:
    """The same parameters in the same order, and with the same weights the same loss."""
    shape = shapes.shape_of(PRESETS[preset], vocabulary=97, sequence=16)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes.hf_config(shape))).eval()
    model, tokens = plain(shape), torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(1))
    assert sum(parameter.numel() for parameter in model.parameters()) == shapes.parameters(shape)
    with torch.no_grad():
        for parameter, (name, weight) in zip(model.parameters(), theirs.named_parameters(), strict=True):
            if weight.dim() == 1:
                weight.normal_(std=0.1)
            transposed = preset == "gpt2-nano" and ".h." in name and weight.dim() == 2  # transformers' Conv1D
            parameter.copy_(weight.T if transposed else weight)
        logits = theirs(input_ids=tokens[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert float(model(tokens[:, :-1], tokens[:, 1:])) == pytest.approx(float(expected), rel=1e-5)


def test_random_tokens_are_below_the_vocabulary_and_as_frequent_as_words() -> None:
    drawn = random_corpus.tokens(100_000, 1000)
    assert drawn.max() < 1000
    # Of 1000 ranks the first three are as frequent together as the last 750: log 4 / log 1000 = 0.2.
    assert (drawn < 3).mean() == pytest.approx(0.2, abs=0.01)
    assert (drawn >= 249).mean() == pytest.approx(0.2, abs=0.01)


def test_a_peer_that_is_timed_reports_every_step_and_learns(tmp_path: Path) -> None:
    shape = shapes.shape_of(PRESETS["gpt2-nano"], vocabulary=256, sequence=16)
    job = {"who": "plain", "config": shapes.hf_config(shape), "micro": 2, "sequence": 16, "precision": "bf16"}
    job |= {"steps": 12, "tokens_below": 256, "compiler": "eager", "result": str(tmp_path / "result.json")}
    peer_run.main(job)
    seen = json.loads((tmp_path / "result.json").read_text())
    assert seen["outcome"] == "done"
    assert len(seen["step_seconds"]) == len(seen["losses"]) == 12
    assert seen["losses"][0] == pytest.approx(5.545, abs=0.2)  # log 256
    assert seen["losses"][-1] < seen["losses"][0]


def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, processes: str) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\n[ "$2" = 3 ] || exit 9\ncase $3 in\n'
        f"*memory.used) echo {used};;\n*compute-apps*) printf '{processes}';;\n"
        "*) echo 'NVIDIA H200, 143771, 580.159.04';;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")


@pytest.mark.parametrize(
    ("used", "processes", "strangers"),
    [
        (530, "", None),
        (530, "41\\n42\\n", "process 41, 42 is on the GPU"),
        (4096, "", "others hold 4.0 GiB of the GPU"),
    ],
)
def test_the_gpu_that_is_measured_is_the_first_visible_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, processes: str, strangers: str | None
) -> None:
    nvidia_smi(tmp_path, monkeypatch, used, processes)
    device = gpu_device.first_gpu()
    assert device == gpu_device.Device(name="NVIDIA H200", index="3", memory_bytes=143771 << 20, driver="580.159.04")
    assert device.slug == "nvidia-h200"
    assert device.strangers() == strangers


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "no GPU here: nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_in_time_or_memory_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small GPU that is named by its driver; no process is started."""
    (tmp_path / "scratch").mkdir()
    random_corpus.write(tmp_path / "scratch" / "corpus", 4096, 256)
    device = gpu_device.Device(name="Tesla V100-SXM2-16GB", index="0", memory_bytes=16 << 30)
    monkeypatch.setattr(gpu.Bench, "_write_corpus", lambda bench: None)
    bench = gpu.Bench(tmp_path, tmp_path / "scratch", device, dry=False, budget=100)
    large = next(task.case for task in gpu_cases.tasks() if task.case and task.case.name == "1.5b-z1")
    bench.run([gpu_cases.Task(kind="ours", case=large, seconds=30), gpu_cases.Task(kind="proof", seconds=900)])
    written = json.loads((tmp_path / "tesla-v100-sxm2-16gb.json").read_text())
    memory, time = (entry["reason"] for entry in written["skipped"])
    assert memory.startswith("its plan needs ")
    assert memory.endswith(" of 14.9")
    assert time.endswith("s are left, it takes about 900")
    assert written["rows"] == []


def test_every_case_of_the_benchmark_is_planned_in_every_cell_that_it_names() -> None:
    names = {task.case.name for task in gpu_cases.tasks() if task.case}
    stages = {f"124m-z{zero}" for zero in range(4)}
    assert names == stages | {"124m-z1-fp16", "124m-z1-compile", "124m-z1-eager", "355m-z1", "1.5b-z1", "llama1b-z1"}
    assert len(gpu_cases.cells(dry=False)) == 12


@pytest.mark.process
@pytest.mark.full
def test_the_dry_run_goes_from_the_command_to_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--dry-run", "--seconds", "900"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("dry-run-*.json")
    seen = json.loads(file.read_text())
    assert [entry["what"] for entry in seen["skipped"]] == ["gpt2-nano-z3 plain"]
    assert {timed["outcome"] for timed in seen["rows"]} == {"done"}
    assert {cell["outcome"] for cell in seen["cells"]} == {"done"}
    assert seen["verify"]["ok"]
    assert done.stdout.startswith("DRY RUN")
