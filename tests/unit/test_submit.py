"""Job scripts and sites: word for word, quoted, and refused before anything is queued."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.cli.main import main
from halfstep.launcher.errors import Fault, RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import exits
from halfstep.launcher.submit import inside, render, site_file, slurm, times
from halfstep.launcher.submit.job import Array, Job
from halfstep.launcher.system import assets
from halfstep.launcher.topology import Topology, hosts

Make = Callable[..., Plan]
GOLDEN = Path(__file__).parents[1] / "golden"
SITES = ("cpu", "gpu", "container")


def world(chosen: site_file.Site, nodes: int = 2) -> Topology:
    ranks = chosen.node.gpus or 2
    kind = "cuda" if chosen.node.gpus else "cpu"
    return Topology(world_size=nodes * ranks, ranks_per_node=ranks, accelerator=kind, fused_adam=kind == "cuda")


def job(plan: Make, name: str = "gpu", **more: Any) -> Job:
    chosen = more.pop("site", None) or site_file.read(name, environ={})
    made = plan("model=gpt2-124m", "batch.global=8192", topology=world(chosen, more.pop("nodes", 2)))
    return Job(run=more.pop("run", Path("/scratch/me/runs/one")), plan=made, site=chosen, **more)


@pytest.mark.parametrize("name", [*SITES, "gpu-torchrun", "gpu-array"])
def test_the_script_of_each_site_is_word_for_word_this(plan: Make, name: str) -> None:
    kind, _, form = name.partition("-")
    more: dict[str, Any] = {"starter": "torchrun"} if form == "torchrun" else {}
    if form == "array":
        folder = Path("/scratch/me/runs/seeds")
        more["array"] = Array(folder=folder, runs=tuple(folder / f"seed={n}" for n in range(6)), at_once=2)
    text = render.script(job(plan, kind, **more))
    text = text.replace(sys.executable, "/venv/bin/python").replace(str(assets.train_script().parent), "/src/launcher")
    file = GOLDEN / f"job-{name}.sbatch"
    if os.environ.get("ACCEPT_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "$" in line]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("job-*.sbatch")), ids=lambda file: file.stem)
def test_bash_and_shellcheck_have_nothing_to_say(file: Path) -> None:
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        assert os.environ.get("CI") != "true", "shellcheck is not installed"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "--shell=bash", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_does_not_grow_with_the_nodes(plan: Make) -> None:
    few, many = (render.script(job(plan, nodes=nodes)) for nodes in (2, 1024))
    assert len(many.splitlines()) == len(few.splitlines())
    assert "#SBATCH --nodes=1024\n" in many


@given(st.text(st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"]), min_size=1))
def test_whatever_a_value_holds_the_shell_gets_it_back(value: str) -> None:
    text = f"printf %s {render._quoted(value)}"
    done = subprocess.run(["bash", "-c", text], capture_output=True)
    assert done.stdout.decode() == value


def test_paths_with_spaces_and_quotes_stay_whole(plan: Make) -> None:
    run = Path('/scratch/it\'s "mine" $HOME %j/run')
    lines = render.script(job(plan, run=run)).splitlines()
    [named] = [line for line in lines if line.startswith("RUN=")]
    done = subprocess.run(["bash", "-c", f'{named}; printf %s "$RUN"'], capture_output=True, text=True)
    assert done.stdout == str(run)
    [log] = [line for line in lines if line.startswith("#SBATCH --output=")]
    assert "%%j" in log, "SLURM would replace %j"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[slurm]\npartition = "a\'b"', "slurm.partition"),
        ('[slurm]\naccount = "a\\nb"', "slurm.account"),
        ('[environment]\nvariables = { A = "x\\ny" }', "environment.variables.A"),
        ('[environment]\nvariables = { "A B" = "x" }', "environment.variables"),
        ('[slurm]\ntime = "tomorrow"', "slurm.time = 'tomorrow': 'tomorrow' is no SLURM time"),
        ('[slurm]\npartitoin = "a"', "did you mean partition?"),
        ("[node]\ngpus = -1", "node.gpus"),
        ("[node\n", "the site is not TOML"),
        ('[container]\nkind = "docker"\nimage = "x"', "container.kind"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_wrong_in_a_site_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        site_file.read(str(file))
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_an_unknown_site_names_the_known_ones(tmp_path: Path) -> None:
    own = tmp_path / "halfstep" / "sites"
    own.mkdir(parents=True)
    (own / "mine.toml").write_text('description = "mine"')
    with pytest.raises(RequestError, match="known sites: container, cpu, gpu, mine"):
        site_file.read("gpus", environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert site_file.read("mine", environ={"XDG_CONFIG_HOME": str(tmp_path)}).description == "mine"
    (own / "default.toml").write_text('description = "default"')
    assert site_file.read(None, environ={"XDG_CONFIG_HOME": str(tmp_path)}).description == "default"
    named = {"XDG_CONFIG_HOME": str(tmp_path), "HALFSTEP_SITE": "mine"}
    assert site_file.read(None, environ=named).description == "mine"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-12", 216000), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_slurm_times(limit: str, seconds: int) -> None:
    assert times.seconds(limit) == seconds


def test_a_plan_must_fit_the_site(plan: Make) -> None:
    made = job(plan)
    four = made.site.model_copy(update={"node": made.site.node.model_copy(update={"gpus": 4})})
    with pytest.raises(RequestError, match="8 ranks on a node of 4 GPUs"):
        Job(run=made.run, plan=made.plan, site=four).check()
    with pytest.raises(RequestError, match="told to stop 300 s before a limit of 300 s"):
        Job(run=made.run, plan=made.plan, site=site_file.read("gpu", {"time": "5"}, environ={})).check()
    shared = made.site.model_copy(
        update={"environment": made.site.environment.model_copy(update={"shared": ["/home", made.plan.data.path]})}
    )
    with pytest.raises(RequestError, match="cannot be seen from the compute nodes"):
        Job(run=made.run, plan=made.plan, site=shared).check()


def test_the_same_script_serves_again_when_what_it_waited_for_is_over(plan: Make) -> None:
    made = job(plan, after=("12",), behind=("13", "14"))
    assert slurm.sbatch_line(made)[2:4] == ["--dependency=afterok:12,afterany:13:14", "--kill-on-invalid-dep=yes"]
    assert "dependency" not in render.script(made)


def test_two_arrays_in_one_folder_have_lists_of_their_own() -> None:
    folder = Path("/runs/seeds")
    first, second = (Array(folder=folder, runs=(folder / name,), at_once=1) for name in ("seed=0", "seed=1"))
    assert first.list != second.list
    assert first.list.parent == folder


@pytest.mark.parametrize("word", ["checkpoint.resume=never", "out=/tmp/a\nb"])
def test_what_a_job_cannot_do_is_refused(corpus: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", "--dry-run", "--site", "cpu", "model=gpt2-nano", f"data={corpus}", word]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "begin from scratch at every start" in said or "control character" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--site", "nowhere"], "there is no site 'nowhere'"),
        (["--site", "cpu", "--time", "soon"], "--time soon: 'soon' is no SLURM time"),
        (["--site", "cpu", "--partition", "a b"], "--partition a b"),
        (["--site", "gpu", "gpus_per_node=9", "batch.global=36"], "9 ranks on a node of 8 GPUs"),
        (["--each", "seed"], "--each seed names no values"),
        (["--each", "seed=1,1"], "two runs of the array are the same"),
        (["--each", "nodes=1,2"], "start the same ranks"),
        (["zero=9"], "zero"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_submit_ends_with_2_and_writes_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    arguments = ["submit", "--dry-run", "model=gpt2-nano", f"data={corpus}", f"out={tmp_path / 'run'}", *options]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_slurm_a_submit_says_so_and_a_dry_run_works(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["submit", "--site", "cpu", "model=gpt2-nano", f"data={corpus}", f"out={tmp_path / 'run'}"]
    assert main(arguments) == 3
    assert "this is no host that submits to SLURM" in capsys.readouterr().err
    assert main([*arguments, "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["command"] == ["sbatch", "--parsable", f"{tmp_path}/run/job.sbatch"]
    assert "\n#SBATCH --nodes=1\n" in shown["text"]


def _run(folder: Path, *, code: int | None = None, newest: int = 0) -> Path:
    """Make a run directory whose only attempt, of this start, ended with a code, or never was."""
    (folder / "plan.json").write_text("{}")
    if code is not None:
        attempt = folder / "attempts" / "0001"
        attempt.mkdir(parents=True)
        (attempt / "env.json").write_text(json.dumps({"environment": {}}))
        (attempt / "exit.json").write_text(json.dumps({"code": code, "cause": "the cause"}))
    if newest:
        (folder / f"checkpoints/step-{newest:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step-{newest:08d}/manifest.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("starts", "count"),
    [
        ([(0, 1), (0, 1)], 0),
        ([(0, 1), (0, 1), (0, 137)], 3),
        ([(40, 137), (40, 137)], 0),
        ([(40, 137), (40, 137), (40, 137)], 3),
        ([(40, 75), (40, 137), (40, 137)], 0),  # the first was stopped after it had saved: the crash has come twice
        ([(40, 75), (40, 137), (40, 1), (40, 1)], 3),
        ([(40, 75), (80, 75), (120, 75), (160, 75), (200, 75)], 0),
        ([(0, 75), (0, 75), (0, 75)], 3),  # a limit too short for one checkpoint
        ([(0, 137), (0, 137), (40, 75)], 0),
        ([(90, 1), (100, 1), (100, 1), (100, 1)], 3),
    ],
)
def test_a_run_is_stuck_when_its_last_three_starts_got_nowhere(starts: list[tuple[int, int]], count: int) -> None:
    assert inside.stuck([{"newest": newest, "code": code} for newest, code in starts]) == count


def test_the_third_start_that_gets_nowhere_ends_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path, code=137, newest=10)
    assert [inside.main(["end", str(run), "1", ""]) for _ in range(2)] == [75, 75]
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"job": "", "newe')  # the disk was full
        file.write("\n")
    assert inside.main(["end", str(run), "1", ""]) == 76
    assert "error: 3 starts in a row came no further than step 10: the cause" in capsys.readouterr().out


def test_a_job_that_is_submitted_again_counts_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    assert [inside.main(["end", str(run), "1", ""]) for _ in range(3)] == [75, 75, 76]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert inside.main(["end", str(run), "1", ""]) == 75


@pytest.mark.parametrize(
    ("code", "status", "ends"),
    [(75, 75, 75), (137, 1, 75), (77, 77, 75), (2, 2, 2), (3, 1, 3), (76, 1, 76), (None, 143, 75), (None, 2, 2)],
)
def test_what_becomes_of_a_job_follows_from_how_the_run_ended(
    tmp_path: Path, code: int | None, status: int, ends: int
) -> None:
    assert inside.main(["end", str(_run(tmp_path, code=code)), str(status), ""]) == ends


@pytest.mark.parametrize(
    ("used", "ends"),
    [
        ("", 75),
        ("2:00:00 2:00:00", 75),
        ("1-00:00:03 1-00:00:00", 75),
        ("1:59:00 2:00:00", 143),
        ("0:20 10:00", 143),
        ("3:00:00 UNLIMITED", 143),
        ("INVALID INVALID", 143),
    ],
)
def test_told_to_end_before_its_limit_a_job_leaves_it_to_slurm(tmp_path: Path, used: str, ends: int) -> None:
    run = _run(tmp_path, code=75)
    assert inside.main(["end", str(run), "75", used]) == ends
    assert (run / "starts.jsonl").exists() == (ends == 75), "a preemption is no failure of the run's"


def test_an_attempt_of_an_earlier_start_tells_nothing_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path, code=76)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert inside.main(["end", str(run), "137", ""]) == 75


def test_a_refusal_of_this_start_counts_whatever_srun_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path, code=75, newest=10)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    exits.write_refusal(run, RequestError("n2 has another torch", where="n2", fix="install it"))
    exits.write_refusal(run, Fault("what came of it", where="n1", fix="look"))
    assert inside.main(["end", str(run), "137", ""]) == 2
    assert "n2 has another torch (exit code 2)" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert inside.main(["end", str(run), "137", ""]) == 75, "that was an earlier start"


def test_a_finished_run_ends_its_job(tmp_path: Path) -> None:
    run = _run(tmp_path, code=0, newest=40)
    (run / "summary.json").write_text("{}")
    assert inside.main(["end", str(run), "0", ""]) == 0


def test_a_directory_that_a_node_does_not_see_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside.main(["begin", str(tmp_path / "elsewhere")]) == 2
    assert "is not a run directory on" in capsys.readouterr().err


def test_a_port_belongs_to_a_job_and_is_free() -> None:
    import socket

    first = inside.free_port(1234, 0)
    assert 20000 <= first < 32000
    with socket.socket() as taken:
        taken.bind(("", first))
        assert inside.free_port(1234, 0) == first + 1
    assert inside.free_port(1234, 1) != first
    assert inside.free_port(1234, 0) == first


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,20],m1", ["n08", "n09", "n10", "n11", "n20", "m1"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a,b", ["a", "b"]),
    ],
)
def test_a_node_list_is_expanded_as_slurm_does(nodelist: str, expected: list[str]) -> None:
    assert hosts(nodelist) == expected
    if shutil.which("scontrol") and os.environ.get("SLURM_CONF"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True)
        assert done.stdout.split() == expected


# --- sites of others


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slurm = 5", "slurm is a table, not a value"),
        ("slurm = [1]", "slurm is a table, not a value"),
        ("node = 'many'", "node = 'many'"),
        ("[[slurm]]\ntime = '1'", "slurm is a table, not a value"),
        ("environment = true", "environment = 'True'"),
        ("container = 1", "container = '1'"),
        ("a = " + "[" * 5000, "the site is not TOML: it is nested too deep"),
        ("[slurm]\nnotice = " + "9" * 5000, "the site is not TOML"),
        ("[slurm]\nnotice = nan", "slurm.notice = 'nan'"),
        ("[node]\ngpus = 1.0", "node.gpus = '1.0'"),
        ('[slurm]\npartition = "a\\u0663"', "slurm.partition"),
        ('[environment]\nsetup = ["a\\u2028b"]', "environment.setup.0"),
        ('[environment]\nforward = ["A\\nrm -rf /"]', "environment.forward.0"),
        ('[environment]\nvariables = { "A;rm" = "x" }', "environment.variables.A;rm"),
        ('[environment]\nvariables = { "A\\nB" = "x" }', "environment.variables.A\\nB"),
    ],
    ids=lambda value: value[:30],
)
def test_a_site_whose_tables_are_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        site_file.read(str(file))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) % 3 == 0


@pytest.mark.parametrize("name", ["a\nrm -rf $HOME", "a;b", "a b", "$(id)", "-x", "ä"])
def test_a_site_s_file_name_puts_no_line_into_the_script(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.toml"
    file.write_text('description = "fine"')
    with pytest.raises(RequestError, match="no name of a site") as caught:
        site_file.read(str(file))
    assert "rename the file" in caught.value.fix
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('variables = { WANDB_API_KEY = "abc123def" }', "WANDB_API_KEY"),
        ('variables = { HF_TOKEN = "hf_abc" }', "HF_TOKEN"),
        ('variables = { MLFLOW_TRACKING_PASSWORD = "pw1" }', "MLFLOW_TRACKING_PASSWORD"),
        ('variables = { HTTPS_PROXY = "http://me:pw1@proxy:3128" }', "HTTPS_PROXY"),
        ('setup = ["export COMET_API_KEY=abc123"]', "COMET_API_KEY"),
        ("setup = [\"module load x; export GITHUB_TOKEN='ghp_1'\"]", "GITHUB_TOKEN"),
    ],
)
def test_a_secret_of_a_site_is_refused_and_the_way_out_is_named(tmp_path: Path, text: str, name: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[environment]\n{text}")
    with pytest.raises(RequestError) as caught:
        site_file.read(str(file))
    said = str(caught.value)
    assert name in said
    assert "environment.forward" in said
    assert not [secret for secret in ("abc123", "hf_abc", "pw1", "ghp_1") if secret in said]


@pytest.mark.parametrize(
    "text",
    [
        'variables = { TOKENIZERS_PARALLELISM = "false", MAX_TOKENS = "4096", HF_TOKEN_PATH = "/home/me/.token" }',
        'variables = { GOOGLE_APPLICATION_CREDENTIALS = "/home/me/key.json", NCCL_DEBUG = "WARN", COMPASS = "north" }',
        'setup = ["export HF_TOKEN=$(cat ~/.token)", "source /shared/venv/bin/activate"]',
        'forward = ["HF_TOKEN", "WANDB_API_KEY"]',
    ],
)
def test_what_only_names_a_secret_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[environment]\n{text}")
    tree, kept = tomllib.loads(text), site_file.read(str(file)).environment
    assert {name: type(value)(getattr(kept, name)) for name, value in tree.items()} == tree


def test_a_value_of_a_variable_is_not_printed_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[environment]\nvariables = { ANY = "hush\\u0007hush" }')
    with pytest.raises(RequestError) as caught:
        site_file.read(str(file))
    assert "hush" not in str(caught.value)
    assert "environment.variables.ANY: may not hold" in str(caught.value)


def test_a_job_script_is_its_owner_s_alone(plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stat

    from fakes import scheduler

    from halfstep.launcher.config.load import load
    from halfstep.launcher.submit import send

    partition = "PartitionName=main Default=YES MaxTime=UNLIMITED TotalNodes=9 State=UP\n"
    scheduler.install(tmp_path / "bin", monkeypatch, sbatch="4711\n", scontrol=partition, sinfo="9999999\n")
    run, victim = tmp_path / "run", tmp_path / "victim"
    made = job(plan, run=run)
    request = load(["model=gpt2-124m", f"data={made.plan.data.path}", "batch.global=8192"])
    assert send.send(made, [(run, request, made.plan)]) == "4711"
    assert stat.S_IMODE((run / "job.sbatch").stat().st_mode) == 0o600
    victim.write_text("mine")
    (run / "jobs.jsonl").unlink()
    (run / "jobs.jsonl").symlink_to(victim)
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\n[ "$2" = --test-only ] || [ "$1" = --test-only ] || exit 1\n')
    with pytest.raises(RequestError, match="cannot be written"):
        send.send(made, [(run, request, made.plan)])
    assert victim.read_text() == "mine"
