"""Tasks in a plan: which evaluations judge, what makes no other run, and what is wrong before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import judges
from fakes.pairs import write_pair

from halfstep.launcher.cli.main import main
from halfstep.launcher.config.load import load
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan, TaskPlan
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, of_row

TEXT = 'metrics = ["exact_match"]\n[answer]\nkind = "generate"\n'


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return judges.task(tmp_path / "tasks", [{"prompt": "a", "completion": "b"}], TEXT)


@pytest.mark.parametrize(
    ("keys", "judged"),
    [
        ([], [0, 2, 4, 6, 7]),
        (["eval.tasks_every=4"], [0, 4, 7]),
        (["eval.tasks_every=0"], [7]),
        (["eval.every=0"], [0, 7]),
    ],
)
def test_evaluations_judge_as_often_as_asked_and_in_every_case_at_the_end(
    keys: list[str], judged: list[int], plan: Callable[..., Plan], task: Path
) -> None:
    made = plan("steps=7", "eval.every=2", f"eval.tasks={task}", *keys)
    evaluations = [0, 7] if made.eval_every == 0 else [0, 2, 4, 6, 7]
    assert [step for step in evaluations if made.judges(step)] == judged
    (planned,) = made.tasks
    assert (planned.name, planned.path) == ("small", str(task))
    assert not any(plan("steps=7").judges(step) for step in range(8))


def test_tasks_are_a_list_wherever_they_are_written(
    plan: Callable[..., Plan], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task.parent)
    for spelling in ("task.toml", "[task.toml]", '["task.toml"]'):
        assert [planned.path for planned in plan(f"eval.tasks={spelling}").tasks] == [str(task)]
    run = tmp_path / "run.toml"
    run.write_text('model = "gpt2-nano"\ndata = "d"\n[eval]\ntasks = ["tasks/task.toml"]\n')
    assert load([str(run)]).spec.eval.tasks == (str(task),)


def test_what_is_judged_makes_another_id_and_no_other_run(
    plan: Callable[..., Plan], task: Path, tmp_path: Path
) -> None:
    without, given = plan(), plan(f"eval.tasks={task}")
    assert given.identity == without.identity
    assert given.run_id != without.run_id
    tree = {key: value for key, value in without.to_dict().items() if not key.startswith("tasks")}
    assert Plan.from_dict(tree).run_id == without.run_id, "older plans know no tasks"
    elsewhere = judges.task(tmp_path / "elsewhere", [{"prompt": "a", "completion": "b"}], TEXT)
    assert plan(f"eval.tasks={elsewhere}").run_id == given.run_id
    assert Plan.from_dict(given.to_dict()).tasks == [
        TaskPlan(name="small", path=str(task), digest=given.tasks[0].digest)
    ]


def test_what_is_wrong_with_a_task_is_said_by_the_plan(
    plan: Callable[..., Plan], task: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = judges.task(tmp_path / "same", [{"prompt": "a", "completion": "b"}], TEXT)
    with pytest.raises(RequestError, match="two tasks are called small"):
        plan(f"eval.tasks={task},{same}")
    with pytest.raises(RequestError, match="does not exist"):
        plan("eval.tasks=gone.toml")
    write_pair(tmp_path / "bare", 10_000)
    with pytest.raises(RequestError, match="says nothing of its tokenizer"):
        plan(f"data={tmp_path / 'bare'}", "model.vocabulary=100", f"eval.tasks={task}")
    task.write_text(task.read_text().replace("exact_match", "exact"))
    assert main(["plan", "model=gpt2-nano", f"data={corpus}", f"eval.tasks={task}"]) == 2
    what, where, _ = capsys.readouterr().err.splitlines()
    assert "there is no metric exact; did you mean exact_match" in what
    assert where == f" from: {task}"


def test_answers_that_leave_no_room_to_a_prompt_are_refused_by_the_plan(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    text = TEXT.replace("generate", 'generate"\nmax_new_tokens = 128\n#')
    task = judges.task(tmp_path / "long", [{"prompt": "a", "completion": "b"}], text)
    assert plan(f"eval.tasks={task}", "sequence=129").tasks
    with pytest.raises(RequestError) as refused:
        plan(f"eval.tasks={task}", "sequence=128")
    assert refused.value.what.startswith("an answer may have 128 tokens, and the model looks at 128")
    assert refused.value.where == f"answer.max_new_tokens in {task}"


def test_a_plan_shows_its_tasks(task: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=gpt2-nano", f"data={corpus}", f"eval.tasks={task}", "eval.tasks_every=50"]) == 0
    line = f"task         small: {task}, at evaluations after multiples of 50 steps, and at the end"
    assert line in capsys.readouterr().out
    assert main(["plan", "--json", "model=gpt2-nano", f"data={corpus}", f"eval.tasks={task}"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["name"] == "small"


def test_rows_of_before_there_were_tasks_are_read() -> None:
    row = {"step": 0, "eval_loss": 2.0, "perplexity": 7.4, "time": 1.0}
    assert of_row(row).tasks is None  # type: ignore[union-attr]
    judged = of_row({**row, "tasks": {"a": {"bleu": 1.5, "perplexity": None}}})
    assert isinstance(judged, EvaluationRecord)
    assert judged.tasks == {"a": {"bleu": 1.5, "perplexity": None}}
    with pytest.raises(ValueError, match="tasks"):
        of_row({**row, "tasks": {"a": {"bleu": "high"}}})
