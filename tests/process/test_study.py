"""Studies on real ranks: what is run, what is not run again, and that every failure is a result with its cause."""

import json
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sacrebleu
from process.conftest import BIN, ROOT
from ranks import environment

pytestmark = pytest.mark.process
HEAD = """
[base]
model = "gpt2-nano"
data = "{data}"
zero = 1
precision = "fp32"
sequence = 64
steps = {steps}
batch.global = 8
batch.micro = 2
eval.every = 0
eval.sequences = 6
checkpoint.at_end = false
"""
Study = Callable[..., "subprocess.CompletedProcess[str]"]
HPZ = "ds.zero_optimization.zero_hpz_partition_size"
# At stage 0 in fp16, where a repair adds micro-batches up, a compiled model loses the first parameter's gradient.
WRONG_REPAIR = """
import sys
from importlib.machinery import PathFinder


class Planted:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "halfstep.launcher.engine.numerics.repair":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def execute(module):
            load(module)
            right = module.repair

            def repair(engine, plan):
                repairs = right(engine, plan)
                if plan.compile and plan.zero == 0 and plan.precision == "fp16":
                    give = repairs.sums.give

                    def give_wrong():
                        totals = give()
                        totals[0].zero_()
                        return totals

                    repairs.sums.give = give_wrong
                return repairs

            module.repair = repair

        spec.loader.exec_module = execute
        return spec


sys.meta_path.insert(0, Planted)
"""


@pytest.fixture
def study(tmp_path: Path, data: Path, scratch: Path) -> Study:
    """Return a function that writes a study file and runs a verb on it; its folder is tmp_path/study."""

    def run(
        verb: str,
        text: str,
        *arguments: str,
        steps: int = 6,
        zero: int = 1,
        axes: tuple[str, ...] = (),
        patch: str = "",
        **more: object,
    ) -> "subprocess.CompletedProcess[str]":
        file = tmp_path / "mine.toml"
        base = "".join(line for line in HEAD.splitlines(keepends=True) if line.partition(" ")[0] not in axes)
        file.write_text((base + text).replace("{data}", str(data)).replace("{steps}", str(steps)))
        file.write_text(file.read_text().replace("zero = 1", f"zero = {zero}"))
        command = [BIN / "halfstep", "study", verb, file, "--out", tmp_path / "study", *arguments]
        environ = {**environment(scratch), "XDG_CACHE_HOME": str(scratch / "cache")}
        if patch:  # Python runs a sitecustomize.py of its path at every start, a rank's too
            (tmp_path / "patch").mkdir()
            (tmp_path / "patch" / "sitecustomize.py").write_text(patch)
            environ |= {"PYTHONPATH": str(tmp_path / "patch"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1200, check=False, **more
        )

    return run


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["runs"]


def attempts(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/*/attempts/*"))


def test_what_has_a_result_is_not_run_again_and_a_failure_is_one(study: Study, tmp_path: Path) -> None:
    where = tmp_path / "study"
    axes = '[axes]\noptimizer.lr = [1e-3, 1e30]\noffload = ["none", "cpu"]\n'
    first = study("run", axes, "--no-gate")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "study mine: 4 runs, 2 refused by a rule" in first.stdout
    assert "2 run, 1 of them failed; 0 had a result already" in first.stdout
    runs = {(run["values"]["optimizer.lr"], run["values"]["offload"]): run for run in results(where)}
    assert runs["0.001", "none"]["status"] == "done"
    assert runs["1e+30", "none"]["status"] == "failed"
    assert runs["1e+30", "none"]["reason"].startswith("diverged: ")
    assert runs["0.001", "cpu"]["reason"].startswith("param-offload-needs-stage-3: ")
    assert runs["0.001", "none"]["checksum"] == runs["1e+30", "none"]["checksum"], "the same initial weights"
    assert (where / "report.html").read_text().count("diverged: ") >= 1
    before = attempts(where)
    again = study("run", axes, "--no-gate")
    assert again.returncode == 0, again.stderr
    assert "0 run, 0 of them failed; 2 had a result already" in again.stdout
    assert attempts(where) == before
    wider = study("run", axes.replace("1e30]", "1e30, 2e-3]"), "--no-gate")
    assert "of those, 2 were part of it before and stay; 1 are new" in wider.stdout
    assert len(attempts(where)) == len(before) + 1
    assert sum(run["status"] == "done" for run in results(where)) == 2


@pytest.mark.full
def test_ctrl_c_stops_a_study_which_resumes_where_it_was(tmp_path: Path, data: Path, scratch: Path) -> None:
    file, where = tmp_path / "mine.toml", tmp_path / "study"
    text = (HEAD + '[axes]\nseed_axis_of_one = [{ name = "one", "optimizer.lr" = 1e-3 }]\n').replace("{steps}", "400")
    file.write_text(text.replace("{data}", str(data)))
    arguments = [BIN / "halfstep", "study", "run", file, "--out", where, "--no-gate"]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(scratch), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 120
    while not any(len(metrics.read_text().splitlines()) > 3 for metrics in where.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert "stopped" in output
    status = subprocess.run(
        [BIN / "halfstep", "study", "status", where, "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    [row] = json.loads(status.stdout)
    assert (row["status"], row["steps"]) == ("stopped", 400)
    assert 3 <= row["step"] < 400


@pytest.mark.full
def test_a_seeded_difference_is_real_and_two_identical_cells_are_within_noise(study: Study, tmp_path: Path) -> None:
    policies = (
        '{ name = "base", "optimizer.lr" = 1e-3 }, { name = "same", "optimizer.lr" = 1e-3, "log.every" = 3 }, '
        '{ name = "lr + 3 %", "optimizer.lr" = 1.03e-3 }'
    )
    done = study("run", f"[axes]\npolicy = [{policies}]\n[seeds]\nvalues = [0, 1, 2]\n", steps=60)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = {
        cell["values"]["policy"]: cell
        for cell in json.loads((tmp_path / "study" / "results.json").read_text())["cells"]
    }
    assert {name: cell["verdict"] for name, cell in cells.items()} == {
        "base": "reference",
        "same": "identical",
        "lr + 3 %": "real",
    }
    assert all(cell["proved"] for cell in cells.values())


@pytest.mark.full
def test_out_of_memory_time_out_and_missing_repairs_are_rows_with_their_reasons(study: Study, tmp_path: Path) -> None:
    variants = (
        '{ name = "plain", "schedule.warmup" = 2 }, { name = "huge", "model.vocabulary" = 40000000 }, '
        '{ name = "slow", "model.layers" = 200 }, { name = "diverging", "optimizer.lr" = 1e30 }, '
        '{ name = "unmended", "numerics.repairs" = false }, { name = "illegal", "offload" = "nvme" }'
    )
    text = f"[axes]\nwhat = [{variants}]\n[limits]\nseconds = 60\n"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))

    done = study("run", text, "zero=0", "precision=bf16", "--force", steps=100, preexec_fn=limited)
    assert done.returncode == 0, done.stdout + done.stderr
    tree = json.loads((tmp_path / "study" / "results.json").read_text())
    runs = {run["values"]["what"]: run for run in tree["runs"]}
    assert runs["plain"]["status"] == "done"
    assert runs["huge"]["reason"].startswith("out of memory: out of host memory")
    assert runs["slow"]["reason"] == "timed out: it took longer than the 60 s it was given"
    assert runs["diverging"]["reason"].startswith("diverged: ")
    assert runs["illegal"]["status"] == "refused"
    assert (runs["unmended"]["status"], runs["unmended"]["proved"]) == ("done", False)
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Not proved, and left out of the recommendation: what=unmended" in page
    assert tree["best"] == "what=plain"


@pytest.mark.full
def test_each_cell_is_proved_by_its_own_cases_and_a_wrong_condition_flags_its_cell_alone(
    study: Study, tmp_path: Path
) -> None:
    """hpZ, a compiler and SGD are proved; DeepSpeed's CPU Lion, which moves what has no gradient, is found out."""
    axes = f'[axes]\n{HPZ} = [1, 2]\ncompile = [false, true]\noptimizer.kind = ["adamw", "sgd"]\n'
    conditions = study("run", axes, zero=3)
    assert conditions.returncode == 0, conditions.stdout + conditions.stderr
    runs = results(tmp_path / "study")
    assert [(run["status"], run["proved"], run["unproved_because"]) for run in runs] == [("done", True, "")] * 8
    proofs = [json.loads(file.read_text()) for file in (tmp_path / "study").glob("runs/*/proof.json")]
    assert sorted(record["cases"] for record in proofs) == [1, 1, 1, 1, 2, 2, 5, 5], "hpZ takes two ranks"
    for optimizer in ("adamw", "sgd"):
        assert f"zero=3 fp32 {optimizer} offload=none {HPZ}=2" in conditions.stdout
    (tmp_path / "study").rename(tmp_path / "first")
    steppers = study("run", '[axes]\noffload = ["optimizer-cpu"]\n"ds.optimizer.type" = ["AdamW", "Lion"]\n')
    assert steppers.returncode == 0, steppers.stdout + steppers.stderr
    proved = {run["values"]["ds.optimizer.type"]: run["proved"] for run in results(tmp_path / "study")}
    assert proved == {"AdamW": True, "Lion": False}
    assert {run["status"] for run in results(tmp_path / "study")} == {"done"}


@pytest.mark.full
def test_a_repair_that_is_wrong_under_a_condition_flags_the_cells_of_that_condition_alone(
    study: Study, tmp_path: Path
) -> None:
    axes = '[axes]\ncompile = [false, true]\noptimizer.kind = ["adamw", "sgd"]\n'
    done = study("run", axes, "precision=fp16", "gpus_per_node=1", zero=0, patch=WRONG_REPAIR)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {(run["values"]["compile"], run["values"]["optimizer.kind"]): run for run in results(tmp_path / "study")}
    proved = {cell: (run["status"], run["proved"], run["unproved_because"]) for cell, run in runs.items()}
    another = "the parity gate found that it trains another model"
    assert proved == {
        ("false", "adamw"): ("done", True, ""),
        ("false", "sgd"): ("done", True, ""),
        ("true", "adamw"): ("done", False, another),
        ("true", "sgd"): ("done", False, another),
    }
    page = (tmp_path / "study" / "report.md").read_text()
    assert f"compile=true optimizer.kind=adamw, compile=true optimizer.kind=sgd ({another})" in page
    for cell, run in runs.items():
        summary = json.loads((tmp_path / "study" / run["run"] / "summary.json").read_text())
        assert (summary["proved"], summary["unproved_because"]) == proved[cell][1:]


@pytest.mark.full
def test_a_cell_of_another_family_is_proved_with_models_of_that_family(study: Study, tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    for name, own in {
        "window": {"model_type": "mistral", "sliding_window": 32},
        "experts": {"model_type": "mixtral", "num_local_experts": 4},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**small, **own}))
    grid = f'[axes]\nmodel.name = ["hf:{tmp_path}/window", "hf:{tmp_path}/experts"]\nzero = [0, 3]\n'
    done = study("run", f'precision = "bf16"\n{grid}', axes=("model", "zero", "precision"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 cases of the family mistral" in done.stdout
    assert "4 cases of the family mixtral" in done.stdout
    runs = results(tmp_path / "study")
    assert [(run["status"], run["proved"], run["unproved_because"]) for run in runs] == [("done", True, "")] * 4


@pytest.mark.full
def test_applications_are_learnt_from_nothing_far_beyond_chance_and_copying(tmp_path: Path, scratch: Path) -> None:
    arguments = ["task=sentiment,translation", "precision=fp32,bf16-autocast", "seed=0", "--no-gate"]
    done = subprocess.run(
        [BIN / "halfstep", "study", "run", "applications", *arguments],
        cwd=tmp_path,
        env=environment(scratch),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tree = json.loads((tmp_path / "studies" / "applications" / "results.json").read_text())
    assert [section["title"] for section in tree["sections"]] == ["sentiment", "translation"]
    test = (tmp_path / "data" / "applications" / "translation" / "test.jsonl").read_text()
    rows = [json.loads(line) for line in test.splitlines()]
    copied = [row["prompt"].removesuffix(" =") for row in rows]
    copying = sacrebleu.corpus_bleu(copied, [[row["completion"].strip() for row in rows]]).score
    for section in tree["sections"]:
        judged = {row["name"]: row for row in section["tasks"] if row["cell"].endswith("fp32")}
        if section["title"] == "sentiment":
            assert judged["sentiment.accuracy"]["mean"] > 0.9
            assert judged["sentiment.accuracy"]["gain"] > 0.3, "the base model guesses"
        else:
            assert judged["translation-en-de.bleu"]["mean"] > copying + 3
            assert judged["translation-en-de.bleu"]["gain"] > 3
