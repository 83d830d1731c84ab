"""Every other way to start, amid other people's `launcher` and `models`: from a clone, a wheel, a bare clone."""

import argparse
import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import studied
from process.conftest import BIN, ROOT, WORDS, Outcome, environment

from halfstep.launcher.cli import main
from halfstep.launcher.study import study_file

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]
Cell = Callable[[int, str], Outcome]
SITE = Path(sysconfig.get_path("purelib"))
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    *("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2"]


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One way to have Halfstep: its Python, the script that starters are given, and the command if there is one."""

    python: Path
    script: Path
    halfstep: Path | None


def foreign_packages(folder: Path) -> None:
    """Make packages called `launcher` and `models` that fail when they are imported."""
    for name in ("launcher", "models"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError(f'{__file__} is not what was meant')\n")


@pytest.fixture(scope="session")
def amid(scratch: Path) -> dict[str, str | Path]:
    """Return where to start and in which environment: foreign packages in the folder, on the path and before us."""
    here, distribution = scratch / "their project", scratch / "their-site-packages"
    foreign_packages(here)
    foreign_packages(distribution)
    return {"cwd": here, "PYTHONPATH": f".:{distribution}"}


def python_with_dependencies(folder: Path) -> tuple[Path, Path]:
    """Make an environment that holds what this one does, but not Halfstep; return its Python and site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True)
    site = folder / SITE.relative_to(sys.prefix)
    for item in SITE.iterdir():
        if "halfstep" not in item.name and item.name not in ("launcher", "models"):
            (site / item.name).symlink_to(item)
    return folder / "bin" / "python", site


@pytest.fixture(scope="session")
def wheels(scratch: Path) -> list[Path]:
    """Return two wheels, one built from the clone and one from its sdist."""
    build = [sys.executable, "-m", "build", "--no-isolation"]
    subprocess.run([*build, "--wheel", "--outdir", scratch / "direct", ROOT], check=True, capture_output=True)
    subprocess.run([*build, "--outdir", scratch / "from-sdist", ROOT], check=True, capture_output=True)
    return [next((scratch / name).glob("halfstep-*.whl")) for name in ("direct", "from-sdist")]


@pytest.fixture(scope="session")
def installed(scratch: Path, wheels: list[Path]) -> Installation:
    """Return a wheel's installation, beside a foreign distribution in the same site-packages."""
    python, site = python_with_dependencies(scratch / "wheel")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheels[1])], check=True, capture_output=True)
    foreign_packages(site)
    script = site / "halfstep" / "launcher" / "train.py"
    return Installation(python=python, script=script, halfstep=python.with_name("halfstep"))


@pytest.fixture(scope="session")
def bare(scratch: Path) -> Installation:
    """Return a clone whose dependencies are installed, but which itself is not."""
    python, site = python_with_dependencies(scratch / "bare")
    foreign_packages(site)
    return Installation(python=python, script=ROOT / "launcher" / "train.py", halfstep=None)


CLONE = Installation(python=Path(sys.executable), script=ROOT / "launcher" / "train.py", halfstep=BIN / "halfstep")


def test_a_wheel_holds_every_file_once_and_under_one_name(wheels: list[Path]) -> None:
    direct, from_sdist = ({item.filename: item.CRC for item in zipfile.ZipFile(file).infolist()} for file in wheels)
    assert direct == from_sdist
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert len(names) == len(set(names))
    tracked = subprocess.run(
        ["git", "ls-files", "launcher", "models", "ds_configs", "slurm", "constraints.txt"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    ours = {f"halfstep/{name}" for name in (*tracked, "__init__.py", "__main__.py")}
    assert {name for name in names if ".dist-info/" not in name} == ours


def verbs_of(parser: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    """Yield the words of every verb: `plan`, `data prepare`."""
    for action in parser._actions:
        for name, inner in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
            yield f"{before}{name}"
            yield from verbs_of(inner, f"{before}{name} ")


@pytest.mark.parametrize("which", ["clone", "wheel"])
def test_every_verb_works_amid_other_people_s_packages(
    which: str, request: pytest.FixtureRequest, amid: dict[str, str | Path], cell: Cell, data: Path, scratch: Path
) -> None:
    home = CLONE if which == "clone" else request.getfixturevalue("installed")
    out, here = cell(1, "bf16").out, amid["cwd"]
    env = {**environment(scratch), "PYTHONPATH": str(amid["PYTHONPATH"])}
    helps = (
        "import contextlib, sys\nfrom halfstep.launcher.cli.main import main\n"
        "for verb in sys.argv[1:]:\n with contextlib.suppress(SystemExit): main([*verb.split(), '--help'])\n"
    )
    verbs = list(verbs_of(main._parser()))
    assert {"plan", "run", "study run", "checkpoint export", "data prepare"} <= set(verbs)
    run = [*WORDS, f"data={data}"]
    study = scratch / f"study-{which}"
    studied.started(study, study_file.READY / "zero.toml", run)
    commands = [
        [home.python, "-c", helps, *verbs],
        [home.python, "-m", "halfstep", "--help"],
        *(
            [home.halfstep, *arguments]
            for arguments in (
                ["plan", *run],
                ["run", "--dry-run", *run],
                [
                    "data",
                    "prepare",
                    "--source",
                    scratch / "text",
                    "--out",
                    scratch / f"data-{which}",
                    "--vocab-size",
                    "512",
                ],
                ["data", "inspect", data],
                ["doctor"],
                ["checkpoint", "list", out],
                ["checkpoint", "export", out, "--to", scratch / f"export-{which}"],
                ["numerics", out, "--out", scratch / f"numerics-{which}.png"],
                ["submit", "--site", "cpu", "--dry-run", *run, f"out={scratch / 'submitted'}"],
                ["study", "run", "zero", "--dry-run", *run],
                ["study", "status", study],
                ["jobs"],
            )
        ),
    ]
    for command in commands:
        done = subprocess.run([str(item) for item in command], cwd=here, env=env, capture_output=True, text=True)
        allowed = (0, 3) if command[1:] == ["jobs"] else (0,)  # 3: SLURM is installed here, and is not up
        assert done.returncode in allowed, (command, done.stdout, done.stderr)
        assert "is not what was meant" not in done.stdout + done.stderr
    assert not any(Path(here, name).exists() for name in ("runs", "studies", "data"))


@pytest.mark.parametrize("starter", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_another_starter_gives_the_same_losses_to_the_last_digit(
    start: Start, cell: Cell, data: Path, amid: dict[str, str | Path], starter: list[str]
) -> None:
    request = [*WORDS, "zero=2", "precision=fp32", f"data={data}", "out={out}"]
    outcome = start(starter[0], [sys.executable, "-m", *starter, str(CLONE.script), *request], **amid)
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses == cell(2, "fp32").losses
    assert outcome.evaluations[-1]["eval_loss"] == cell(2, "fp32").evaluations[-1]["eval_loss"]


def test_halfstep_run_prints_its_command_and_a_bare_process_agrees(
    start: Start, cell: Cell, data: Path, amid: dict[str, str | Path]
) -> None:
    request = [*WORDS, "zero=1", "precision=fp32", f"data={data}", "out={out}"]
    two = start("halfstep run", [str(BIN / "halfstep"), "run", *request], **amid)
    assert two.returncode == 0, two.output
    assert two.output.startswith(f"$ {BIN / 'deepspeed'} --num_gpus 2 --master_port ")
    assert two.losses == cell(1, "fp32").losses
    single = start("bare", [sys.executable, str(CLONE.script), *request], **amid)
    assert single.returncode == 0, single.output
    assert single.json("plan.json")["batch"] == {"micro": 2, "accumulation": 4, "ranks": 1, "global": 8}
    assert single.losses == pytest.approx(two.losses, abs=2e-5), "the same global batches, summed in another order"


@pytest.mark.parametrize(
    ("starter", "zero", "precision"),
    [
        pytest.param(DEEPSPEED, 2, "fp16", id="deepspeed"),
        pytest.param(TORCHRUN, 3, "bf16", id="torchrun", marks=pytest.mark.full),
        pytest.param(["halfstep", "run", "--with", "accelerate"], 2, "fp32", id="accelerate", marks=pytest.mark.full),
    ],
)
def test_a_wheel_trains_amid_other_people_s_packages(
    start: Start, cell: Cell, data: Path, installed: Installation, amid: dict[str, str | Path],
    starter: list[str], zero: int, precision: str,
) -> None:  # fmt: skip
    request = [*WORDS, f"zero={zero}", f"precision={precision}", f"data={data}", "out={out}"]
    script = [] if starter[0] == "halfstep" else [str(installed.script)]
    outcome = start(f"wheel-z{zero}-{precision}", [str(installed.python), "-m", *starter, *script, *request], **amid)
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses == cell(zero, precision).losses
    assert json.loads((outcome.out / "attempts/0001/env.json").read_text())["code_revision"] is None


def test_deepspeed_starts_a_clone_that_is_not_installed(
    start: Start, cell: Cell, data: Path, bare: Installation, amid: dict[str, str | Path]
) -> None:
    importable = subprocess.run([bare.python, "-P", "-c", "import halfstep.launcher"], capture_output=True, text=True)
    assert "No module named 'halfstep'" in importable.stderr
    request = [*WORDS, "zero=2", "precision=fp16", f"data={data}", "out={out}"]
    outcome = start("not installed", [str(bare.python), "-m", *DEEPSPEED, str(bare.script), *request], **amid)
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses == cell(2, "fp16").losses


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


def test_a_wrong_request_ends_every_rank_with_code_2_and_is_said_once(start: Start, data: Path) -> None:
    request = ["model=gpt2-nano", f"data={data}", "presicion=fp16", "out={out}"]
    outcome = start("wrong", [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *request])
    assert outcome.returncode == 2
    assert outcome.output.count("error: unknown run key 'presicion'") == 1
    assert "Traceback" not in outcome.output
    assert not outcome.out.exists()


def test_another_run_in_the_same_directory_is_refused_on_all_ranks(start: Start, cell: Cell, data: Path) -> None:
    taken = cell(1, "bf16").out
    request = [*WORDS, "seed=1", "zero=1", "precision=bf16", f"data={data}", f"out={taken}"]
    outcome = start("other", [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *request])
    assert outcome.returncode == 2, outcome.output
    assert outcome.output.count(f"error: {taken} belongs to a different run: seed was 0 and is now 1") == 1
    assert "Traceback" not in outcome.output


@pytest.mark.full
def test_activation_checkpointing_and_compile_change_no_loss(start: Start, cell: Cell, data: Path) -> None:
    # Stage 3 compiles as the others do, and gathers around what is compiled.
    for word, starter, zero in (("activation_checkpointing=true", "accelerate", 2), ("compile=true", "torchrun", 3)):
        request = [*WORDS, word, f"zero={zero}", "precision=fp32", f"data={data}", "out={out}"]
        outcome = start(word, [str(BIN / "halfstep"), "run", "--with", starter, *request], timeout=400)
        assert outcome.returncode == 0, outcome.output
        assert outcome.losses == pytest.approx(cell(zero, "fp32").losses, abs=2e-4)
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
