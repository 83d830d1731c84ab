"""Every other way to start: torchrun, accelerate, a bare process, a wheel, `halfstep run`; and failing well."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from process.conftest import BIN, ROOT, WORDS, Outcome, environment

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]
Cell = Callable[[int, str], Outcome]


@pytest.mark.parametrize(
    ("starter", "arguments"),
    [
        ("torchrun", ["--standalone", "--nproc_per_node", "2"]),
        (
            "accelerate",
            [
                "launch",
                "--multi_gpu",
                "--num_processes",
                "2",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ],
        ),
    ],
)
def test_another_starter_gives_the_same_losses_to_the_last_digit(
    start: Start, cell: Cell, data: Path, starter: str, arguments: list[str]
) -> None:
    run = [*WORDS, "zero=2", "precision=fp32", f"data={data}", "out={out}"]
    outcome = start(starter, [str(BIN / starter), *arguments, "launcher/train.py", *run])
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses == cell(2, "fp32").losses
    assert outcome.evaluations[-1]["eval_loss"] == cell(2, "fp32").evaluations[-1]["eval_loss"]


def test_halfstep_run_prints_its_command_and_one_bare_process_agrees(start: Start, cell: Cell, data: Path) -> None:
    run = [*WORDS, "zero=1", "precision=fp32", f"data={data}", "out={out}"]
    launched = start("halfstep run", [str(BIN / "halfstep"), "run", *run])
    assert launched.returncode == 0, launched.output
    assert launched.output.startswith(f"$ {BIN / 'deepspeed'} --num_gpus 2 --master_port ")
    assert launched.losses == cell(1, "fp32").losses
    alone = start("bare", [sys.executable, "launcher/train.py", *run])
    assert alone.returncode == 0, alone.output
    assert alone.json("plan.json")["batch"] == {"micro": 2, "accumulation": 4, "ranks": 1, "global": 8}
    assert alone.losses == pytest.approx(launched.losses, abs=2e-5), "the same global batches, summed in another order"


def test_what_happens_while_python_is_taken_down_does_not_change_how_a_rank_ended(
    start: Start, data: Path, scratch: Path
) -> None:
    # Threads of gloo that end at that moment have aborted a rank that was done; an exit handler does so every time.
    folder = scratch / "aborting"
    folder.mkdir()
    abort = "atexit.register(lambda: sys.argv[0].endswith('train.py') and os.abort())"
    (folder / "sitecustomize.py").write_text(f"import atexit, os, sys\n{abort}\n")
    run = [*WORDS, "steps=2", "eval.every=0", f"data={data}", "out={out}"]
    outcome = start("aborting", [sys.executable, "launcher/train.py", *run], PYTHONPATH=str(folder))
    assert outcome.returncode == 0, outcome.output
    assert outcome.json("summary.json")["status"] == "done"
    assert "done: validation perplexity" in outcome.output


def test_an_installed_wheel_trains_from_anywhere(start: Start, cell: Cell, data: Path, scratch: Path) -> None:
    target = scratch / "installed"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(scratch / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (scratch / "dist").glob("halfstep-*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    for zero, precision in ((2, "fp16"), (3, "bf16")):
        arguments = [*WORDS, f"zero={zero}", f"precision={precision}", f"data={data}", "out={out}"]
        command = [str(BIN / "deepspeed"), "--num_gpus", "2", str(target / "launcher/train.py"), *arguments]
        outcome = start(f"wheel-z{zero}-{precision}", command, cwd=Path("/"))
        assert outcome.returncode == 0, outcome.output
        assert outcome.losses == cell(zero, precision).losses
        assert json.loads((outcome.out / "attempts/0001/env.json").read_text())["code_revision"] is None


def test_a_wrong_request_ends_every_rank_with_code_2_and_is_said_once(start: Start, data: Path) -> None:
    arguments = ["model=gpt2-nano", f"data={data}", "presicion=fp16", "out={out}"]
    outcome = start("wrong", [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments])
    assert outcome.returncode == 2
    assert outcome.output.count("error: unknown run key 'presicion'") == 1
    assert "Traceback" not in outcome.output
    assert not outcome.out.exists()


def test_another_run_in_the_same_directory_is_refused_on_all_ranks(start: Start, cell: Cell, data: Path) -> None:
    there = cell(1, "bf16").out
    arguments = [*WORDS, "seed=1", "zero=1", "precision=bf16", f"data={data}", f"out={there}"]
    outcome = start("other", [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments])
    assert outcome.returncode == 2, outcome.output
    assert outcome.output.count(f"error: {there} belongs to a different run: seed was 0 and is now 1") == 1
    assert "Traceback" not in outcome.output


def test_activation_checkpointing_and_compile_change_no_loss(start: Start, cell: Cell, data: Path) -> None:
    for word, starter in (("activation_checkpointing=true", "accelerate"), ("compile=true", "torchrun")):
        arguments = [*WORDS, word, "zero=2", "precision=fp32", f"data={data}", "out={out}"]
        outcome = start(word, [str(BIN / "halfstep"), "run", "--with", starter, *arguments], timeout=400)
        assert outcome.returncode == 0, outcome.output
        assert outcome.losses == pytest.approx(cell(2, "fp32").losses, abs=2e-4)
        built = json.loads((outcome.out / "events.jsonl").read_text().splitlines()[1])
        assert (built["activation_checkpointing"], built["compiled"]) == (
            starter == "accelerate",
            starter == "torchrun",
        )


def test_doctor_finds_this_machine_fit(scratch: Path) -> None:
    done = subprocess.run(
        [BIN / "halfstep", "doctor", "--json"], capture_output=True, text=True, env=environment(scratch), cwd=scratch
    )
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, findings
    assert findings["operators"]["status"] == "ok"
    assert {"torch", "deepspeed", "compiler", "ninja", "ports", "threads", "disk", "build lock"} <= findings.keys()
