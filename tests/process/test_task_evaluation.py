"""Tasks inside a training: ranks that share weights and examples, and a run that is the same with them as without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, WORDS, Outcome
from fakes import judges

from halfstep.launcher.cli.main import main
from halfstep.launcher.rundir.run_reader import Run

PROMPTS = ("def parse(", "class", "return", "", "    if not isinstance(value, str):\n        raise", "import", "x = ")
ROWS = [{"prompt": prompt, "completion": " self.name"} for prompt in PROMPTS]
WRITING = (
    'batch = 2\nmetrics = ["chrf", "perplexity", "exact_match"]\n'
    '[answer]\nkind = "generate"\nmax_new_tokens = 6\nstop = ["\\n"]\n'
)
CHOOSING = 'batch = 3\nmetrics = ["accuracy", "macro_f1"]\n[answer]\nkind = "choices"\nchoices = [" self.name", ":"]\n'
_TIMED = ("time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes", "tasks")


@pytest.fixture(scope="module")
def tasks(scratch: Path) -> list[Path]:
    writing = judges.task(scratch / "writing", ROWS, WRITING)
    choosing = judges.task(scratch / "choosing", ROWS, CHOOSING)
    choosing.write_text(choosing.read_text().replace('name = "small"', 'name = "choosing"'))
    return [writing, choosing]


def _numbers(run: Outcome) -> list[dict[str, Any]]:
    """Return all that a run wrote of its training, without what a clock says."""
    return [{key: value for key, value in row.items() if key not in _TIMED} for row in run.rows]


def _tasks(run: Outcome) -> list[tuple[int, Any]]:
    return [(row["step"], row["tasks"]) for row in run.evaluations if row.get("tasks")]


def _given(tasks: list[Path]) -> str:
    return f"eval.tasks={','.join(map(str, tasks))}"


def test_a_run_is_judged_at_its_evaluations_and_is_the_same_run(
    cell: Callable[[int, str], Outcome],
    start: Callable[..., Outcome],
    data: Path,
    tasks: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*WORDS, "zero=3", "precision=fp32", f"data={data}", "out={out}", _given(tasks)]
    run = start("judged", [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments])
    assert run.returncode == 0, run.output
    assert _numbers(run) == _numbers(cell(3, "fp32"))
    judged = _tasks(run)
    assert [step for step, _ in judged] == [0, 10, 20]
    assert all(set(metrics) == {"small", "choosing"} for _, metrics in judged)
    assert set(judged[0][1]["small"]) == {"chrf", "perplexity", "exact_match"}
    assert judged[-1][1]["small"]["perplexity"] < judged[0][1]["small"]["perplexity"]
    assert run.json("summary.json")["tasks"] == judged[-1][1]
    assert Run(run.out).evaluations()[-1].tasks == judged[-1][1]
    assert "choosing: accuracy " in run.output
    planned, measured = run.json("plan.json")["memory"], run.json("summary.json")["peak_memory_bytes"]
    assert planned["by_moment"]["answers to tasks"] > 0
    assert planned["predicted_low_bytes"] <= measured <= planned["predicted_high_bytes"]
    events = [event for event in run.events if event["event"] == "judged"]
    assert [(event["step"], event["task"], event["examples"]) for event in events] == [
        (step, task, len(ROWS)) for step in (0, 10, 20) for task in ("small", "choosing")
    ]
    # A single process with the whole weights comes to the same as two ranks with a part of each.
    assert main(["eval", str(run.out), "--json", *(word for task in tasks for word in ("--task", str(task)))]) == 0
    alone = {result["name"]: result["metrics"] for result in json.loads(capsys.readouterr().out)["tasks"]}
    assert alone == {task: pytest.approx(metrics, rel=1e-6) for task, metrics in judged[-1][1].items()}


@pytest.mark.full
def test_any_number_of_ranks_at_any_stage_comes_to_the_same_and_draws_nothing(
    start: Callable[..., Outcome], data: Path, tasks: list[Path]
) -> None:
    results, numbers = {}, {}
    for ranks, zero, precision in (
        (1, 0, "fp32"),
        (1, 3, "fp32"),
        (2, 0, "fp32"),
        (2, 3, "bf16"),
        (2, 1, "bf16-autocast"),
    ):
        for given in ([], [_given(tasks)]):
            arguments = ["steps=4", "eval.every=2", "model.dropout=0.2", f"data={data}", "out={out}", *given]
            name = f"dropout-{ranks}-{zero}-{precision}-{len(given)}"
            keys = [*WORDS, f"zero={zero}", f"precision={precision}", *arguments]
            run = start(name, [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "launcher/train.py", *keys])
            assert run.returncode == 0, run.output
            numbers[ranks, zero, precision, bool(given)] = _numbers(run)
            if given:
                results[ranks, zero, precision] = _tasks(run)[0]
    assert len({json.dumps(results[key]) for key in results if key[2] == "fp32"}) == 1
    for key in results:
        assert numbers[*key, True] == numbers[*key, False], key


@pytest.mark.full
def test_a_run_that_was_stopped_goes_on_being_judged(
    start: Callable[..., Outcome], data: Path, tasks: list[Path]
) -> None:
    arguments = [*WORDS, "steps=8", "eval.every=2", "eval.tasks_every=4", "checkpoint.every=2", f"data={data}"]
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments, "zero=1", "out={out}"]
    whole = start("judged-whole", [*command, _given(tasks)])
    assert [step for step, _ in _tasks(whole)] == [0, 4, 8]
    killed = start("judged-killed", [*command, _given(tasks)], HALFSTEP_FAULT="fwd:1:6:kill9")
    assert killed.returncode != 0
    resumed = start("judged-killed", [*command, _given(tasks)])
    assert resumed.returncode == 0, resumed.output
    assert (_numbers(resumed), _tasks(resumed)) == (_numbers(whole), _tasks(whole))
