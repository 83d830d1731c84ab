"""Published rows and runs: how they are read, what is predicted of each, and what is said of a damaged file."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher.cli.main import main
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast.published import published_runs, score
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import prediction_errors

Make = Callable[..., Plan]
FOUNDRY = {
    "row_id": "a",
    "group": "mosaicml/llm-foundry | 1.3B | A100-80GB",
    "source": "mosaicml/llm-foundry@8c8dd48",
    "gpu": "A100-80GB",
    "n_gpus": "8",
    "model_params_B": "1.316",
    "layers": "24",
    "hidden": "2048",
    "heads": "16",
    "ffn": "8192",
    "vocab": "50368",
    "seq_len": "2048",
    "micro_batch": "14",
    "global_batch": "448",
    "precision": "amp_bf16",
    "sharding": "FSDP FULL_SHARD",
    "activation_checkpointing": "none",
}
BLOOM = FOUNDRY | {
    "source": "bigscience-workshop/bigscience@9e64ede",
    "n_gpus": "384",
    "model_params_B": "176",
    "layers": "70",
    "hidden": "14336",
    "heads": "112",
    "ffn": "57344",
    "vocab": "250k",
    "micro_batch": "2",
    "global_batch": "2048",
    "precision": "bf16",
    "sharding": "ZeRO-1 DP8 TP4 PP12",
    "activation_checkpointing": "full",
}


def test_a_row_is_read_as_a_setting_and_a_layout() -> None:
    row = published_runs.parse(FOUNDRY)
    assert (row.stack, row.layout.collectives, row.device and row.device.name) == ("llm-foundry", "fsdp", "a100")
    workload = row.workload
    assert (workload.ranks, workload.micro, workload.accumulation, workload.zero, workload.precision) == (
        8,
        14,
        4,
        3,
        "bf16",
    )
    row = published_runs.parse(BLOOM)
    workload, cut = row.workload, row.layout
    assert (cut.tensor, cut.pipeline, workload.ranks, workload.zero) == (4, 12, 8, 1)
    assert (workload.micro, workload.accumulation) == (2, 128)
    assert workload.shape is not None
    assert workload.shape.vocabulary == 250_000
    assert cut.attention == "unfused"


@pytest.mark.parametrize(
    ("sharding", "zero", "cut", "virtual", "context"),
    [
        ("ZeRO-3", 3, (1, 1), 1, 1),
        ("ZeRO++", 3, (1, 1), 1, 1),
        ("DDP", 0, (1, 1), 1, 1),
        ("FSDP SHARD_GRAD_OP", 2, (1, 1), 1, 1),
        ("FSDP0 TP8 PP8 CP2 VP8", 1, (8, 8), 8, 2),
        ("FSDP8+TP8+PP8", 3, (8, 8), 1, 1),
        ("TPxPP=64 DP24", 0, (8, 8), 1, 1),
    ],
)
def test_shardings_are_understood(sharding: str, zero: int, cut: tuple[int, int], virtual: int, context: int) -> None:
    row = published_runs.parse(FOUNDRY | {"source": "elsewhere", "sharding": sharding, "n_gpus": "1536"})
    assert row.workload.zero == zero
    assert (row.layout.tensor, row.layout.pipeline) == cut
    assert (row.layout.virtual, row.layout.context) == (virtual, context)


def test_tokens_a_gpu_are_a_micro_batch_and_low_precisions_are_told_apart() -> None:
    row = published_runs.parse(FOUNDRY | {"micro_batch": "4096 tok/GPU", "precision": "fp8 rowwise", "gpu": "H100"})
    assert (row.workload.micro, row.layout.arithmetic) == (2, "fp8-rowwise")
    assert published_runs.parse(FOUNDRY | {"precision": "NVFP4"}).layout.arithmetic == "fp4"
    assert published_runs.parse(FOUNDRY | {"precision": "FP8-CS (FP8-MX)"}).layout.arithmetic == "fp8"


def test_a_llama_is_told_from_a_gpt_by_its_parameters() -> None:
    llama = {"model_params_B": "8.03", "layers": "32", "hidden": "4096", "heads": "32", "ffn": "14336"}
    shape = published_runs.parse(FOUNDRY | llama | {"vocab": "128256"}).workload.shape
    assert shape is not None
    assert (shape.family, shape.kv_heads) == ("llama", 8)
    guessed = published_runs.parse({"row_id": "b", "model_params_B": "6.7"}).workload.shape
    assert guessed is not None
    assert 3584 <= guessed.width <= 4608


@pytest.mark.parametrize("text", [FOUNDRY, BLOOM, {"row_id": "x", "gpu": "H100-80GB", "model_params_B": "7"}])
def test_every_row_with_a_device_and_a_size_gets_a_speed(text: dict[str, str]) -> None:
    predicted = score.predict_row(published_runs.parse(text))
    assert predicted.tokens_per_s_per_gpu is not None
    assert 1 < predicted.tokens_per_s_per_gpu < 1e6


def test_what_cannot_be_told_is_empty() -> None:
    assert score.predict_row(published_runs.parse(FOUNDRY | {"gpu": "Abacus"})).tokens_per_s_per_gpu is None
    nothing = score.predict_row(published_runs.parse({"row_id": "x"}))
    assert (nothing.tokens_per_s_per_gpu, nothing.peak_memory_gib) == (None, None)


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ({"tokens_per_s_per_gpu": "20513"}, 20513),
        ({"iter_time_s": "2", "global_batch": "64", "seq_len": "1024", "n_gpus": "8"}, 4096),
        ({"tflops_per_gpu": "100", "flops_convention": "6N"}, 100e12 / (6 * 1.316e9)),
        (
            {"tflops_per_gpu": "100", "flops_convention": "6N+12Lhs (full attention)"},
            100e12 / (6 * 1.316e9 + 12 * 24 * 2048 * 2048),
        ),
        ({"tflops_per_gpu": "100", "flops_convention": "HFU: 8N (recompute counted)"}, 100e12 / (8 * 1.316e9)),
        ({"tflops_per_gpu": "100", "flops_convention": "as published"}, None),
    ],
)
def test_a_measured_speed_is_read_in_its_own_convention(text: dict[str, str], speed: float | None) -> None:
    measured = score.measured_speed({**FOUNDRY, **text})
    assert measured == (None if speed is None else pytest.approx(speed))


def test_the_command_predicts_a_file_with_missing_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("row_id,gpu,model_params_B,n_gpus\na,A100-80GB,1.3,8\nb,,,\nc,H100-80GB,70,64\n")
    assert main(["plan", "score", "--rows", str(source), "--predict", str(target)]) == 0
    assert "3 rows, a speed for 2" in capsys.readouterr().out
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert list(rows[0]) == ["row_id", "tokens_per_s_per_gpu", "peak_memory_gib"]
    assert [row["row_id"] for row in rows] == ["a", "b", "c"]
    assert float(rows[0]["tokens_per_s_per_gpu"]) > 0
    assert rows[1]["tokens_per_s_per_gpu"] == ""


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"gpu,n_gpus\nA100,8\n", "the rows have no column row_id; the first line names gpu, n_gpus"),
        (b"", "the rows have no column row_id; the first line names nothing"),
        (b"row_id,gpu\na,\xff\xfe\n", "the rows are no CSV"),
        (b'row_id,gpu\n"a,b\n', "the rows are no CSV"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        score.predict(file)
    assert caught.value.what.startswith(what)
    assert caught.value.where == str(file)


def test_runs_are_compared_with_their_plans(plan: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = plan().to_dict()
    tree["time"]["step_seconds"] = 0.5
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(RequestError, match=r"there is no summary\.json"):
        prediction_errors.run(tmp_path)
    sent = tree["time"]["communication_bytes_per_rank"] * 2
    measured = {"step_seconds": 0.4, "peak_memory_bytes": 2**30, "communication_bytes": sent}
    (tmp_path / "summary.json").write_text(json.dumps(measured))
    assert prediction_errors.run(tmp_path).step_error == pytest.approx(0.25)
    assert main(["plan", "score", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "+25.0 %" in out
    assert "step time: mean error 25.0 % over 1 run(s)" in out
    assert "bytes sent: mean error 50.0 % over 1 run(s)" in out


@pytest.mark.parametrize(
    "arguments", [["score"], ["score", "--predict", "out.csv"], ["score", "run", "--rows", "in.csv"]]
)
def test_a_score_of_nothing_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
