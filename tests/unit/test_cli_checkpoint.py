"""The verbs on checkpoints: what they print, what programs read, and how they end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import saved

from halfstep.launcher.checkpoint import store
from halfstep.launcher.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (16, 16),
    "model.layers.0.self_attn.v_proj.weight": (16, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.norm.weight": (16,),
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture
def parameters() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def run(tmp_path: Path, parameters: dict[str, np.ndarray]) -> Path:
    run = tmp_path / "a run"
    for step in (10, 20, 30):
        saved.save(run, parameters, step=step, bounds=[600], config=CONFIG)
    saved.rows(run / "metrics.jsonl", 20)
    return run


@pytest.fixture
def damaged(run: Path) -> Path:
    """A run with everything that can lie in its checkpoints folder."""
    home = store.home(run)
    (home / "step-00000020" / "rank-00001.json").unlink()
    store.prepare(run, 40, "0002", 0)
    (home / "step-00000005.bad-0002").mkdir()
    (home / ".pruned-step-00000002").mkdir()
    (home / "notes").mkdir()
    return run


def _json(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_list_shows_good_damaged_set_aside_and_unfinished_ones(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "list", str(damaged)]) == 0
    heading, *rows, last = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "written", "size", "ranks", "zero", "precision", "loss", "state"]
    assert rows[2].split()[-5:] == ["2", "2", "fp32", "4.9000", "good"]
    assert "checkpoint verify" in last
    listed = _json(["checkpoint", "list", str(damaged)], capsys)
    assert [(row["step"], row["state"]) for row in listed] == [
        (2, "being deleted"),
        (5, "set aside"),
        (10, "good"),
        (20, "damaged"),
        (30, "good"),
        (40, "unfinished"),
    ]
    assert listed[3]["reason"] == "rank-00001.json: No such file or directory"
    assert (listed[2]["loss"], listed[4]["loss"]) == (4.9, None)  # no row tells of step 30
    assert (listed[2]["world_size"], listed[2]["zero"], listed[2]["precision"]) == (2, 2, "fp32")


def test_a_list_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} has no checkpoints\n"
    assert _json(["checkpoint", "list", str(tmp_path)], capsys) == []
    assert main(["checkpoint", "list", str(tmp_path / "gone")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


def test_a_list_does_not_read_contents_and_verify_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved.flip(store.home(run) / "step-00000020" / "rank-00001.safetensors")
    assert {row["state"] for row in _json(["checkpoint", "list", str(run)], capsys)} == {"good"}
    result = _json(["checkpoint", "verify", str(run)], capsys, code=2)
    assert result["ok"] is False
    assert [row["state"] for row in result["checkpoints"]] == ["good", "damaged", "good"]
    assert main(["checkpoint", "verify", str(run)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert " OK " in lines[0]
    assert "GB/s" in lines[0]
    assert lines[1].split(maxsplit=2)[2] == (
        "DAMAGED  rank-00001.safetensors is not what was written: its hash differs"
    )
    assert main(["checkpoint", "verify", str(run), "--step", "10"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run), "--step", "11"]) == 2
    assert "take one of 30, 20, 10" in capsys.readouterr().err


def test_a_checkpoint_under_another_name_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store.home(run) / "step-00000030").rename(store.home(run) / "step-00000031")
    rows = _json(["checkpoint", "list", str(run)], capsys)
    assert (rows[2]["state"], rows[2]["reason"]) == ("damaged", "its manifest is of step 30")


def test_a_newer_halfsteps_checkpoint_does_not_hide_the_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from halfstep.launcher.config.digest import digest

    file = store.home(run) / "step-00000030" / "manifest.json"
    tree = {**json.loads(file.read_text()), "format": 99}
    tree.pop("digest")
    file.write_text(json.dumps({**tree, "digest": digest(tree, 32)}))
    rows = _json(["checkpoint", "list", str(run)], capsys)
    assert [row["state"] for row in rows] == ["good", "good", "damaged"]
    assert "format 99" in rows[2]["reason"]


def test_an_export_is_told_in_four_lines_and_warnings_apart(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["checkpoint", "export", str(run), "--to", str(out)]) == 0
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()] == ["folder", "weights", "tokenizer", "compared"]
    assert "2,864 parameters in fp32, 12.3 KiB in 1 file" in output.out
    assert output.err.count("warning: ") == 2
    assert (out / "model.safetensors").is_file()
    assert main(["checkpoint", "export", str(run), "--to", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_damaged_export_ends_with_2_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.flip(store.home(run) / "step-00000030" / "rank-00000.safetensors")
    out = tmp_path / "made" / "out"
    assert main(["checkpoint", "export", str(run), "--to", str(out)]) == 2
    errors = capsys.readouterr().err
    assert "the checkpoint of step 30 is damaged: rank-00000.safetensors is not what was written" in errors
    assert f"try: halfstep checkpoint export '{run}' --to {out} --step 20" in errors
    assert not out.exists()
    assert not out.parent.exists()
    assert main(["checkpoint", "export", str(run), "--to", str(out), "--step", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 20


@pytest.mark.parametrize(("size", "files"), [("5GB", 1), ("4KiB", 4), ("4 kb", 4), ("0.004MB", 4), ("1b", 11)])
def test_sizes_of_files_are_read_as_people_write_them(
    size: str, files: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "checkpoint",
        "export",
        str(run),
        "--to",
        str(tmp_path / "out"),
        "--no-compare",
        "--max-shard-size",
        size,
    ]
    result = _json(arguments, capsys)
    assert len([name for name in result["files"] if name.endswith(".safetensors")]) == files


@pytest.mark.parametrize("size", ["", "five", "-1GB", "0", "5XB"])
def test_a_size_that_is_none_is_refused(size: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "export", str(run), "--to", "/nowhere", f"--max-shard-size={size}"]) == 2
    assert "is no size of a file" in capsys.readouterr().err


def test_converting_needs_the_plan_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "convert", str(run), "--to", str(tmp_path / "new")]) == 2
    assert "is not a whole run directory: plan.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_generate_and_eval_on_a_run_say_how_to_export_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", "x"]) == 2
    assert f"try: halfstep checkpoint export '{run}' --to '{run}-export'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_looking_at_checkpoints_never_loads_torch(verb: str, run: Path) -> None:
    program = (
        "import sys\nfrom halfstep.launcher.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = sorted(set(sys.modules) & {'torch', 'deepspeed', 'transformers', 'datasets'})\n"
        "assert not code and not heavy, (code, heavy)"
    )
    command = [sys.executable, "-c", program, "checkpoint", verb, str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
