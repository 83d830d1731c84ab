"""Runs that an earlier Halfstep wrote, before everything was under one name: they list, report, export and resume.

old_run/whole is undisturbed; old_run/killed, the same run, lost a rank at step 10 and has the checkpoint of step 8.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process.conftest import BIN, Outcome

from halfstep.launcher.cli.main import main
from halfstep.launcher.system import machine

pytestmark = pytest.mark.process
STORED = Path(__file__).with_name("old_run")
WORDS = [
    *("model=gpt2-nano", "model.layers=1", "model.width=16", "model.heads=2", "model.dropout=0.1", "sequence=32"),
    *("batch.global=8", "batch.micro=2", "steps=12", "eval.every=6", "eval.sequences=4", "checkpoint.every=4"),
    *("checkpoint.keep=2", "zero=2", "precision=fp16", "numerics.every=4"),
]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(STORED, tmp_path_factory.mktemp("old") / "old_run"))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_old_run_is_listed_and_its_bytes_are_verified(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = result_of(capsys, "checkpoint", "list", old / "whole")
    assert (row["step"], row["state"], row["zero"], row["precision"]) == (12, "good", 2, "fp16")
    assert result_of(capsys, "checkpoint", "verify", old / "killed")["ok"]


def test_an_old_run_reports_its_numerics_and_its_time(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = result_of(capsys, "numerics", old / "whole", "--out", old / "numerics.png")
    assert (report["steps"], report["loss_scale_last"], report["skipped_steps"]) == (12, 65536.0, 0)
    assert report["gradients"]["steps"] == [4, 8, 12]
    assert report["gradients"]["grad_max"][0] == [0.162109375, 0.08929443359375, 0.0726318359375]
    assert main(["plan", "score", str(old / "whole")]) == 0
    assert "peak memory" in capsys.readouterr().out


def test_an_old_run_is_exported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = result_of(
        capsys, "checkpoint", "export", old / "killed", "--to", old / "exported", "--data", old / "corpus"
    )
    assert (export["step"], export["parameters"], export["tokenizer"]["vocabulary"]) == (8, 11504, 384)
    assert export["compare"]["ok"], "transformers computes what the engine did when it saved"


def test_an_old_run_resumes_to_the_end_of_the_undisturbed_one(old: Path, start: Callable[..., Outcome]) -> None:
    request = [*WORDS, f"data={old / 'corpus'}", f"out={old / 'killed'}"]
    done = start("old", [str(BIN / "halfstep"), "run", *request])
    assert done.returncode == 0, done.output
    run, whole = (Outcome(out=old / name, returncode=0, output="") for name in ("killed", "whole"))
    assert run.json("plan.json")["run_id"] == whole.json("plan.json")["run_id"]
    assert [row["step"] for row in run.steps] == list(range(1, 13))
    summary = run.json("summary.json")
    assert (summary["status"], summary["attempts"]) == ("done", 2)
    spent = summary["productive_seconds"] + sum(summary["lost_seconds"].values())
    assert spent == pytest.approx(summary["wall_seconds"]), "the time of the old attempt counts too"
    assert summary["lost_seconds"]["redone"] > 0
    about = read(old / "whole" / "attempts" / "0001" / "env.json")
    if (about["cpu"], about["versions"]["torch"]) != (machine.cpu_model(), torch.__version__):
        assert run.losses == pytest.approx(whole.losses, rel=1e-3), "another machine adds in another order"
        return
    assert run.losses == whole.losses
    assert [row["eval_loss"] for row in run.evaluations] == [row["eval_loss"] for row in whole.evaluations]
    resumed, undisturbed = (
        read(old / name / "checkpoints" / "step-00000012" / "manifest.json")["files"] for name in ("killed", "whole")
    )
    assert resumed == undisturbed
