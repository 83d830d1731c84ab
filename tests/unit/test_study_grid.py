"""Study files: what they may say, which cells they make, and what is said of what they may not."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import studied

from halfstep.launcher.errors import RequestError
from halfstep.launcher.study import grid, preparation, study_file, study_folder

HEAD = '[base]\nmodel = "gpt2-nano"\ndata = "{corpus}"\nsteps = 4\nsequence = 32\nbatch.global = 8\n'
GRID = '[axes]\nzero = [0, 1]\nprecision = ["fp32", "bf16"]\n[seeds]\nvalues = [0, 1]\n'
WHOLE = HEAD + GRID + '[compare]\nreference = { zero = 1, precision = "fp32" }\n'


@pytest.fixture
def written(tmp_path: Path, corpus: Path):
    def write(text: str) -> Path:
        file = tmp_path / "mine.toml"
        file.write_text(text.replace("{corpus}", str(corpus)))
        return file

    return write


def test_a_grid_is_every_combination_for_every_seed(written) -> None:
    study = study_file.read(str(written(WHOLE)))
    cells = studied.cells_of(study)
    assert [(cell.name, cell.seed) for cell in cells] == [
        (f"zero={zero} precision={precision}", seed)
        for seed in (0, 1)
        for zero in (0, 1)
        for precision in ("fp32", "bf16")
    ]
    assert study.reference == {"zero": "1", "precision": "fp32"}
    assert len({cell.folder for cell in cells}) == 8
    assert cells[0].folder.startswith("zero0-fp32-s0-")


def test_mixtures_are_values_of_an_axis(written, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Path(shutil.copytree(corpus, tmp_path / "other")) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seed": 1}))
    monkeypatch.chdir(tmp_path)
    head = HEAD.replace('data = "{corpus}"\n', "")
    tables = f'[{{ path = "{corpus}", weight = 1 }}, {{ path = "other", weight = 3 }}]'
    file = str(written(f'{head}[axes]\ndata = ["other", "other:1,{corpus}:2", {tables}]\n'))
    cells = studied.cells_of(study_file.read(file))
    assert [cell.refused for cell in cells] == [None] * 3
    assert [cell.plan.data.weights for cell in cells] == [[1.0], [1 / 3, 2 / 3], [0.25, 0.75]]
    assert [cell.name for cell in cells][2] == f"data={corpus}:1,other:3"
    assert len({cell.folder for cell in cells}) == 3
    assert all("/" not in cell.folder for cell in cells)

    def weights(word: str) -> list[list[float]]:
        return [cell.plan.data.weights for cell in studied.cells_of(study_file.read(file, [word]))]

    assert weights(f"data=other:3,{corpus}:1") == [[0.75, 0.25]]
    assert weights(f'data=["other", "other:3,{corpus}:1"]') == [[1.0], [0.75, 0.25]]
    assert weights(f"data=other,{corpus}") == [[1.0], [1.0]]
    both = f'{{"path": "other", "weight": 3}}, {{"path": "{corpus}", "weight": 1}}'
    assert weights(f"data=[{both}]") == [[0.75, 0.25]]
    assert weights(f'data=[[{both}], "other"]') == [[0.75, 0.25], [1.0]]
    with pytest.raises(RequestError, match="null is no value of axis data"):
        study_file.read(file, ["data=[null]"])
    with pytest.raises(RequestError, match="'other' has no weight"):
        study_file.read(file, [f"data={corpus}:1,other"])


def test_every_pass_runs_the_other_way_round(written) -> None:
    study = study_file.read(str(written(WHOLE)))
    ran = list(grid.order(studied.cells_of(study), study.seeds))
    assert [cell.name for cell in ran[:4]] == [cell.name for cell in reversed(ran[4:])]
    assert [cell.seed for cell in ran] == [0] * 4 + [1] * 4


def test_only_and_exclude_choose_cells(written) -> None:
    only = 'only = [{ precision = "fp32" }, { zero = 1 }]\nexclude = [{ zero = [1], precision = ["bf16"] }]\n'
    cells = studied.cells_of(study_file.read(str(written(only + WHOLE))))
    assert {cell.name for cell in cells} == {"zero=0 precision=fp32", "zero=1 precision=fp32"}


def test_overlapped_communication_is_pinned_where_there_is_any_unless_the_study_decides_it(written) -> None:
    cells = studied.cells_of(study_file.read(str(written(WHOLE.replace("[0, 1]\np", "[0, 1, 3]\np")))))
    overlap = {cell.plan.zero: cell.plan.deepspeed["zero_optimization"].get("overlap_comm") for cell in cells}
    assert overlap == {0: None, 1: False, 3: False}
    own = WHOLE.replace("zero = [0, 1]\n", "zero = [1]\nds.zero_optimization.overlap_comm = [true, false]\n")
    cells = studied.cells_of(study_file.read(str(written(own))))
    assert {cell.plan.deepspeed["zero_optimization"]["overlap_comm"] for cell in cells} == {True, False}


def test_values_of_an_axis_may_set_several_keys(written) -> None:
    axis = 'policy = [{ name = "dynamic", "fp16.initial_scale_power" = 8 }, { name = "static", "fp16.scale" = 1024 }]\n'
    text = HEAD + 'precision = "fp16"\n[axes]\n' + axis
    cells = studied.cells_of(study_file.read(str(written(text))))
    assert [(cell.name, cell.plan.deepspeed["fp16"]["loss_scale"]) for cell in cells] == [
        ("policy=dynamic", 0.0),
        ("policy=static", 1024.0),
    ]


def test_a_command_line_overrides_the_base_and_the_axes(written) -> None:
    arguments = ["steps=9", "precision=bf16,fp16", "zero=1", "seed=5"]
    text = WHOLE.replace('[compare]\nreference = { zero = 1, precision = "fp32" }\n', "")
    cells = studied.cells_of(study_file.read(str(written(text)), arguments))
    assert [(cell.name, cell.seed, cell.plan.steps) for cell in cells] == [
        ("zero=1 precision=bf16", 5, 9),
        ("zero=1 precision=fp16", 5, 9),
    ]


def test_a_refused_cell_is_a_row_and_the_others_go_on(written) -> None:
    text = HEAD + '[axes]\noffload = ["none", "cpu"]\nzero = [1, 3]\n'
    cells = studied.cells_of(study_file.read(str(written(text))))
    refused = {cell.name: cell.refused for cell in cells if cell.refused}
    assert list(refused) == ["offload=cpu zero=1"]
    assert refused["offload=cpu zero=1"].startswith("param-offload-needs-stage-3: weights can move off the device")


def test_a_cell_whose_batch_cannot_be_shared_out_is_refused(written) -> None:
    text = HEAD + "[axes]\nbatch.micro = [4, 3]\n"
    cells = studied.cells_of(study_file.read(str(written(text))))
    assert [cell.refused and cell.refused.split(":")[0] for cell in cells] == [None, "request"]


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (HEAD + "[axes]\nzreo = [0, 1]\n", (), ["'zreo' is no run key", "did you mean zero?"]),
        (HEAD + "[axes]\nzero = []\n", (), ["axis zero has no values"]),
        (HEAD + "[axes]\nzero = 1\n", (), ["axis zero is no list"]),
        (HEAD + "[axes]\nzero = [1, 1]\n", (), ["axis zero has 1 twice"]),
        (HEAD + "[axes]\nseed = [1, 2]\n", (), ["seed is no axis", "[seeds] values"]),
        (HEAD + '[axes]\nout = ["a"]\n', (), ["out is no axis"]),
        (HEAD + "[axes]\nsteps = [1, 2]\n", (), ["steps is an axis and a base key"]),
        (HEAD, (), ["a study needs an axis"]),
        (HEAD + "[axis]\nzero = [1]\n", (), ["a study has no [axis]", "did you mean [axes]?"]),
        (WHOLE.replace("zero = 1,", "zero = 3,"), (), ["zero has no value 3", "zero has 0, 1"]),
        (WHOLE.replace("zero = 1,", "stage = 1,"), (), ["'stage' is no axis of this study", "zero"]),
        ("exclude = [{ zero = 1 }]\n" + WHOLE, (), ["the reference zero=1 precision=fp32 is not in the grid"]),
        ("only = [{ zero = 7 }]\n" + WHOLE, (), ["zero has no value 7"]),
        (WHOLE.replace("[0, 1]\n[compare]", "[0, 0]\n[compare]"), (), ["seeds are different whole numbers"]),
        (WHOLE.replace("[0, 1]\n[compare]", "[]\n[compare]"), (), ["seeds are different whole numbers"]),
        (WHOLE + 'price = "cheap"\n', (), ["'cheap' is no price"]),
        (WHOLE + "cost = 3\n", (), ["[compare] has no 'cost'"]),
        (WHOLE + "[limits]\nseconds = -1\n", (), ["-1 is no time"]),
        (WHOLE + "[base\n", (), ["the study file cannot be read", "line"]),
        (WHOLE.replace("steps = 4", "stepz = 4"), (), ["unknown run key 'stepz'", "mine.toml", "steps"]),
        (WHOLE.replace("[0, 1]\np", "[0, 1, 7]\np"), (), ["zero=7", "mine.toml"]),
        (WHOLE, ("zero",), ["'zero' is no key=value"]),
        (HEAD + '[axes]\npolicy = [{ "fp16.scale" = 1 }]\n', (), ["needs a name"]),
        (HEAD + '[axes]\nzero = [0, 1]\np = [{ name = "a", zero = 3 }]\n', (), ["axes zero and p both set zero"]),
        (HEAD + "[axes]\nzero = [[1, 2]]\n", (), ["[1, 2] is no value of axis zero"]),
        (HEAD + '[axes]\nzero = ["x"]\n', (), ["zero=x", "mine.toml"]),
        (HEAD + GRID.replace("values", "value"), (), ["[seeds] has no 'value'"]),
        ("exclude = [{ zero = 7 }]\n" + WHOLE, (), ["zero has no value 7"]),
        (WHOLE.replace("zero = 1,", "zero = [],"), (), ["the reference has 0 values of zero"]),
        (WHOLE, ("seed=\u00b2",), ["seeds are different whole numbers"]),
        (WHOLE, ("out=/tmp/here",), ["a study has many", "--out /tmp/here"]),
        (HEAD + '[axes]\npolicy = [{ name = "a\\nb", zero = 3 }]\n', (), ["is no name"]),
        (WHOLE + 'within = "task"\n', (), ["'task' is no axis of this study", "zero, precision"]),
        (WHOLE + '[[prepare]]\nmakes = "x"\n', (), ["a step of [[prepare]] needs makes and run"]),
        (WHOLE + '[[prepare]]\nmakes = "x"\nrun = "plan \'a"\n', (), ["is no command"]),
        (WHOLE + '[[prepare]]\nmake = "x"\nrun = "plan"\n', (), ["[[prepare]] has no 'make'", "did you mean makes?"]),
        (WHOLE + '[prepare]\nmakes = "x"\nrun = "plan"\n', (), ["prepare is no list of tables"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_three_lines(
    written, text: str, arguments: Sequence[str], said: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        studied.cells_of(study_file.read(str(written(text)), arguments))
    assert len(str(caught.value).splitlines()) == 3
    for sentence in said:
        assert sentence in str(caught.value)


def test_what_a_study_needs_is_made_once_and_what_cannot_be_made_is_said(
    written, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    text = f"data prepare --source {tmp_path}/some.txt --out {tmp_path}/some --vocab-size 288 --workers 1"
    steps = WHOLE + f'[[prepare]]\nmakes = "some/manifest.json"\nrun = "{text}"\n'
    said: list[str] = []
    study = study_file.read(str(written(steps)))
    with pytest.raises(RequestError, match="which is not there yet") as caught:
        preparation.prepare(study, may=False, say=said.append)
    assert f"run `halfstep {text}`" in caught.value.fix
    for _ in range(2):
        preparation.prepare(study, may=True, say=said.append)
    assert said == [f"preparing, 1 of 1: halfstep {text}"]
    for run, what in (("plan --nonsense", "ended with code 2"), ("plan --help", f"made no {tmp_path / 'never'}")):
        study = study_file.read(str(written(steps + f'[[prepare]]\nmakes = "never"\nrun = "{run}"\n')))
        with pytest.raises(RequestError, match=what) as caught:
            preparation.prepare(study, may=True, say=said.append)
        assert caught.value.where.endswith(f"mine.toml: halfstep {run}")
    assert "--nonsense" in capfd.readouterr().err, "what a step says is seen"


def test_names_that_come_to_one_folder_are_told_apart(written) -> None:
    names = ("\u03b1", "\u03b2", "no clip/1", "no clip 1", "x" * 200, "x" * 199)
    axis = "policy = [" + ", ".join(f'{{ name = "{name}", steps = 4 }}' for name in names) + "]\n"
    cells = studied.cells_of(study_file.read(str(written(HEAD.replace("steps = 4\n", "") + "[axes]\n" + axis))))
    assert len({cell.folder for cell in cells}) == 6
    assert max(len(cell.folder) for cell in cells) < 200


def test_values_that_differ_in_the_last_digit_are_two(written) -> None:
    cells = studied.cells_of(study_file.read(str(written(HEAD + "[axes]\noptimizer.lr = [0.001, 0.0010000001]\n"))))
    assert len({cell.plan.run_id for cell in cells}) == 2


def test_an_unknown_study_names_the_ready_ones() -> None:
    with pytest.raises(RequestError, match="there is no study 'precison'") as caught:
        study_file.read("precison")
    assert "precision" in caught.value.fix


@pytest.mark.parametrize("name", [name for name in study_file.ready() if not study_file.read(name).prepare])
def test_a_ready_study_plans_its_cells_for_a_tiny_model_and_for_a_real_one(name: str, corpus: Path) -> None:
    for arguments in ([], ["model=gpt2-124m"]):
        cells = studied.cells_of(study_file.read(name, [f"data={corpus}", *arguments]))
        legal = [cell for cell in cells if not cell.refused]
        assert len(legal) >= 3
        assert len({cell.plan.batch.global_ for cell in legal}) == 1, "the global batch is constant"


def test_the_study_of_applications_makes_all_that_it_reads_where_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = study_file.read("applications")
    (task, precision) = study.axes
    assert (study.within, [value.label for value in task.values]) == (
        "task",
        ["sentiment", "translation", "generation"],
    )
    assert [value.label for value in precision.values] == ["fp32", "fp16", "bf16", "bf16-autocast"]
    made = [Path(step.makes) for step in study.prepare]
    assert all(path.is_relative_to(tmp_path / "data" / "applications") for path in made)
    read = [Path(value.keys["data"]) for value in task.values]
    read += [Path(file) for value in task.values for file in value.keys["eval.tasks"]]
    read.append(tmp_path / study.base["model.name"].removeprefix("hf:"))
    for path in read:
        assert any(path in (step, *step.parents) for step in made), f"{path} is made by no step"


def test_a_changed_file_keeps_what_is_still_asked_for_and_says_what_is_not(written, tmp_path: Path) -> None:
    where = tmp_path / "study"
    _, cells = studied.started(where, written(WHOLE))
    for cell in cells:
        studied.finish(where, cell, 5.0)
    wider = studied.cells_of(study_file.read(str(written(WHOLE.replace('"bf16"]', '"bf16", "fp16"]')))))
    change = study_folder.compare(where, wider)
    assert (change.kept, change.new, change.left) == (8, 4, ())
    longer = studied.cells_of(study_file.read(str(written(WHOLE.replace("steps = 4", "steps = 5")))))
    change = study_folder.compare(where, longer)
    assert (change.kept, change.new, len(change.left)) == (0, 8, 8)


def test_another_folder_is_not_written_into(written, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").touch()
    cells = studied.cells_of(study_file.read(str(written(WHOLE))))
    with pytest.raises(RequestError, match="is not a study's folder"):
        study_folder.compare(tmp_path / "study", cells)
