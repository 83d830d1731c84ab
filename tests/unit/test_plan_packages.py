"""DeepSpeed keys that need a package: told by the plan and by every rank, before anything is built."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher import train
from halfstep.launcher.cli import main
from halfstep.launcher.config.load import load
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.ds import packages
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import exits, run_directory
from halfstep.launcher.topology import Topology

Make = Callable[..., Plan]

CASES = {
    "tensorboard": (
        "ds.tensorboard.enabled=true",
        "tensorboard.enabled",
        "pip install tensorboard, or remove tensorboard",
    ),
    "wandb": ("ds.wandb.enabled=true", "wandb.enabled", "pip install wandb, or remove wandb"),
    "comet_ml": ("ds.comet.enabled=true", "comet.enabled", "pip install 'comet_ml>=3.41.0', or remove comet"),
    "deep_ep": (
        "ds.expert_parallel.comm_backend=deepep",
        "expert_parallel.comm_backend",
        "pip install deep_ep, or remove expert_parallel.comm_backend",
    ),
    "liger_kernel": (
        "ds.tensor_parallel.vocab_parallel_ce_backend=liger",
        "tensor_parallel.vocab_parallel_ce_backend",
        "pip install 'liger-kernel>=0.8.1', or remove tensor_parallel.vocab_parallel_ce_backend",
    ),
}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the packages from this Python, as they are on a fresh machine."""
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in CASES else find_spec(name))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("module", CASES)
def test_a_key_whose_package_is_missing_is_refused_with_what_installs_it(plan: Make, module: str) -> None:
    word, key, fix = CASES[module]
    made = plan(word, "zero=0")
    (violation,) = packages.missing(made.deepspeed, made.origins)
    assert violation.sentence == f"{key} needs the package {module}, which is not installed here"
    assert violation.where == f"{key} from {word.partition('=')[0]} from the command line"
    assert violation.fix == fix
    with pytest.raises(RequestError, match=f"needs the package {module}"):
        packages.require(made.deepspeed, made.origins)


def test_every_package_that_deepspeed_looks_for_has_a_case() -> None:
    assert {need.module for need in packages._NEEDS} == set(CASES)


@pytest.mark.usefixtures("bare")
def test_keys_that_are_off_or_need_nothing_are_allowed(plan: Make) -> None:
    off = ["ds.tensorboard.enabled=false", "ds.wandb.project=x", "ds.csv_monitor.enabled=true"]
    made = plan(*off, "ds.flops_profiler.enabled=true", "ds.comms_logger.enabled=true")
    assert packages.missing(made.deepspeed, made.origins) == []


def test_a_package_that_is_there_is_enough_and_an_older_one_is_not(
    plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "comet_ml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('planning imports nothing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    both = plan("ds.tensorboard.enabled=true", "ds.comet.enabled=true")
    assert packages.missing(both.deepspeed, both.origins) == []
    for version, enough in (("3.40.9", False), ("3.41.0", True), ("4.0", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert (packages.missing(both.deepspeed, both.origins) == []) == enough


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("verb", ["plan", "run", "train"])
def test_every_door_says_so_in_three_lines(
    verb: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model=gpt2-nano", f"data={corpus}", f"out={tmp_path / 'run'}", "ds.wandb.enabled=true"]
    assert (train.main(arguments) if verb == "train" else main.main([verb, *arguments])) == 2
    printed = capsys.readouterr()
    said = printed.out if verb == "plan" else printed.err
    assert "wandb.enabled needs the package wandb, which is not installed here" in said
    assert "try: pip install wandb, or remove wandb" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("bare")
def test_a_rank_of_a_planned_run_writes_down_why_it_refuses(
    plan: Make, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model=gpt2-nano", f"data={corpus}", "ds.wandb.enabled=true"]
    made = plan("ds.wandb.enabled=true", topology=Topology(world_size=1, ranks_per_node=1, accelerator="cpu"))
    run_directory.write_plan(tmp_path / "run", load(arguments), made)
    assert train.main([f"run={tmp_path / 'run'}"]) == 2
    assert "needs the package wandb" in capsys.readouterr().err
    refusal = exits.read_refusal(tmp_path / "run")
    assert refusal is not None
    assert (refusal.code, refusal.cause[:13]) == (2, "wandb.enabled")


@pytest.mark.usefixtures("bare")
def test_a_job_is_planned_where_the_package_is_not_because_its_nodes_may_have_it(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model=gpt2-nano", f"data={corpus}", "ds.wandb.enabled=true"]
    assert main.main(["submit", "--site", "gpu", "--dry-run", *arguments]) == 0
