"""The run directory: what is written, whose it is, and who may use it."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher.config.load import Request, load
from halfstep.launcher.errors import HalfstepError, RequestError, Stalled
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import exits, run_directory
from halfstep.launcher.rundir.lease import LEASE_STALE_SECONDS, lease, reserved
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.topology import Topology

WORLD = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")


@pytest.fixture
def decide(corpus: Path) -> Callable[..., tuple[Request, Plan]]:
    def make(*arguments: str, world: Topology = WORLD) -> tuple[Request, Plan]:
        request = load(["model=gpt2-nano", f"data={corpus}", *arguments])
        return request, resolve(request, world, facts.read(request.spec))

    return make


def test_a_run_directory_holds_request_plan_config_and_origins(decide: Callable, tmp_path: Path) -> None:
    out = tmp_path / "it's a run"
    request, plan = decide("zero=3", "optimizer.lr=1e-4", "ds.zero_optimization.overlap_comm=false", f"out={out}")
    run_directory.write_plan(run_directory.location(request, plan), request, plan)
    asked = tomllib.loads((out / "request.toml").read_text())
    assert asked["zero"] == 3
    assert asked["optimizer"] == {"lr": 1e-4}
    assert asked["ds"] == {"zero_optimization": {"overlap_comm": False}}
    assert "seed" not in asked, "a default was not asked for"
    assert json.loads((out / "ds_config.json").read_text()) == plan.deepspeed
    assert json.loads((out / "origins.json").read_text())["deepspeed"] == plan.origins
    again, same = Run(out).require_as_asked()
    assert (again.spec, same) == (request.spec, plan)


def test_without_out_the_directory_is_named_by_the_run_id(
    decide: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request, plan = decide()
    assert run_directory.location(request, plan) == tmp_path / "runs" / plan.run_id


@pytest.mark.parametrize(
    "arguments",
    [
        *(["zero=3"], ["precision=fp16"], ["batch.micro=4"], ["steps=2000"], ["eval.every=7"], ["log.every=3"]),
        *(["ds.optimizer.params.torch_adam=false"], ["ds.optimizer.params.fused=true"]),
    ],
)
def test_a_run_resumes_in_its_directory_when_only_these_change(
    decide: Callable, tmp_path: Path, arguments: list[str]
) -> None:
    run_directory.write_plan(tmp_path / "run", *decide())
    run_directory.write_plan(tmp_path / "run", *decide(*arguments))
    run_directory.write_plan(
        tmp_path / "run", *decide(world=Topology(world_size=4, ranks_per_node=4, accelerator="cpu"))
    )
    there = Run(tmp_path / "run").plan
    assert there.topology.world_size == 4, "the last one asked for stands"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["seed=1"], "seed was 0 and is now 1"),
        (["optimizer.lr=1e-5"], "optimizer.lr was None and is now 1e-05"),
        (["model=llama-nano"], "model.name was 'gpt2-nano' and is now 'llama-nano'"),
        (["batch.global=64"], "batch.global was 32 and is now 64"),
        (["ds.optimizer.params.lr=1e-5"], "ds.optimizer.params.lr was None and is now 1e-05"),
    ],
)
def test_a_directory_of_a_different_run_is_refused(
    decide: Callable, tmp_path: Path, arguments: list[str], what: str
) -> None:
    run_directory.write_plan(tmp_path / "run", *decide())
    before = (tmp_path / "run" / "plan.json").read_bytes()
    with pytest.raises(RequestError) as caught:
        run_directory.write_plan(tmp_path / "run", *decide(*arguments))
    assert what in caught.value.what
    assert (tmp_path / "run" / "plan.json").read_bytes() == before


def test_another_corpus_makes_another_run(decide: Callable, corpus: Path, tmp_path: Path) -> None:
    run_directory.write_plan(tmp_path / "run", *decide())
    manifest = corpus / "manifest.json"
    manifest.write_text(manifest.read_text().replace("by hand", "by another hand"))
    with pytest.raises(RequestError, match="data was"):
        run_directory.write_plan(tmp_path / "run", *decide())


def test_a_folder_of_something_else_is_not_taken(decide: Callable, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(RequestError, match="not a run directory"):
        run_directory.write_plan(tmp_path, *decide())


def test_a_folder_that_cannot_be_made_is_named(decide: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written: Not a directory"):
        run_directory.write_plan(tmp_path / "file" / "run", *decide())


def test_every_start_is_a_new_attempt_with_its_environment(
    decide: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run_directory.write_plan(tmp_path / "run", *decide())
    attempts = []
    for measured in ("first", "second"):
        attempts.append(run_directory.start_attempt(tmp_path / "run", {"world_size": 2}))
        attempts[-1].metrics.write_text(measured)
    assert (attempts[0].attempt / "metrics.jsonl").read_text() == "first", "what an attempt measured is kept"
    assert [attempt.attempt.name for attempt in attempts] == ["0001", "0002"]
    text = (attempts[0].attempt / "env.json").read_text()
    environment = json.loads(text)
    assert environment["environment"]["SLURM_JOB_ID"] == "77"
    assert {"torch", "deepspeed", "python"} <= environment["versions"].keys()
    assert "a secret" not in text


def test_the_first_cause_of_an_exit_stands(tmp_path: Path) -> None:
    assert exits.write_exit(tmp_path, 76, "the cause", rank=1) is None
    assert exits.write_exit(tmp_path, 1, "the follow-up", rank=0) == 76
    written = json.loads((tmp_path / "exit.json").read_text())
    assert (written["code"], written["cause"], written["rank"]) == (76, "the cause", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["exit.json"]


HOLDER = """
import pathlib, sys
from halfstep.launcher.rundir.lease import lease
with lease(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_launches_do_not_share_a_directory_and_a_dead_one_gives_it_back(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RequestError, match=f"in use by process {holder.pid}"), lease(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    with lease(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lease").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / "lease").exists()


def test_a_job_outlives_the_lease_of_its_dead_predecessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import halfstep.launcher.rundir.lease as page

    monkeypatch.setattr(page, "LEASE_STALE_SECONDS", 0.6)
    held = {"host": "lost", "pid": 1, "since": 0, "job": "7", "start": "0"}
    (tmp_path / "lease").write_text(json.dumps(held))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(RequestError, match="in use by process 1 on lost"), lease(tmp_path):
        pass  # no job: a person is told at once
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with lease(tmp_path):  # after 0.6 seconds
        assert json.loads((tmp_path / "lease").read_text())["job"] == "8"
    # The same job, started again by SLURM, needs less: its node has not touched the lease twice in a row.
    monkeypatch.setattr(page, "LEASE_STALE_SECONDS", 300)
    (tmp_path / "lease").write_text(json.dumps(held))
    os.utime(tmp_path / "lease", (time.time() - 130, time.time() - 130))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lease(tmp_path):
        holder = json.loads((tmp_path / "lease").read_text())
    assert (holder["job"], holder["start"]) == ("7", "1")


def test_a_job_does_not_wait_for_a_lease_whose_holder_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lease"
    file.write_text(json.dumps({"host": "other", "pid": 1, "since": 0, "job": "7", "start": "0"}))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    living = threading.Timer(0.3, lambda: os.utime(file, (time.time() + 1, time.time() + 1)))
    living.start()
    with pytest.raises(RequestError, match="in use by process 1 on other"), lease(tmp_path):
        pass
    living.join()


def test_a_lease_of_another_host_counts_until_it_is_stale(tmp_path: Path) -> None:
    file = tmp_path / "lease"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(RequestError, match="in use by process 1 on elsewhere"), lease(tmp_path):
        pass
    old = file.stat().st_mtime - LEASE_STALE_SECONDS - 1
    os.utime(file, (old, old))
    with lease(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "x"}'])
def test_a_damaged_plan_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RequestError):
        Run(tmp_path).require_as_asked()


def test_an_error_crosses_from_process_to_process_whole() -> None:
    error = Stalled("what", where="where", fix="fix").with_more([RequestError("more", where="there", fix="that")])
    for again in (pickle.loads(pickle.dumps(error)), HalfstepError.from_dict(json.loads(json.dumps(error.to_dict())))):
        assert (type(again), type(again.more[0]), str(again)) == (Stalled, RequestError, str(error))


def test_the_origins_of_a_request_survive_the_directory(decide: Callable, tmp_path: Path) -> None:
    run_directory.write_plan(tmp_path / "run", *decide("zero=3"))
    request, plan = Run(tmp_path / "run").require_as_asked()
    assert request.origins["zero"] == "the command line"
    run_directory.write_plan(tmp_path / "run", request, plan)
    assert Run(tmp_path / "run").request.origins == request.origins


def test_an_own_config_is_known_by_its_content_not_its_place(decide: Callable, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}')
    run_directory.write_plan(tmp_path / "run", *decide(f"--ds-config={tmp_path / 'one.json'}"))
    run_directory.write_plan(tmp_path / "run", *decide(f"--ds-config={tmp_path / 'two.json'}"))
    (tmp_path / "two.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}')
    with pytest.raises(RequestError, match="ds_config was"):
        run_directory.write_plan(tmp_path / "run", *decide(f"--ds-config={tmp_path / 'two.json'}"))


def rows(*steps: int, torn: str = "") -> str:
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps) + torn


def test_a_resume_keeps_the_rows_of_the_steps_that_are_done_and_loses_none(tmp_path: Path, decide: Callable) -> None:
    run_directory.write_plan(tmp_path / "run", *decide(f"out={tmp_path / 'run'}"))
    first = run_directory.start_attempt(tmp_path / "run", {})
    evaluated = json.dumps({"step": 2, "eval_loss": 1.0}) + "\n"
    first.metrics.write_text(rows(1, 2) + evaluated + rows(3, 4, torn='{"step": 5, "lo'))
    first.summary.write_text("{}")
    (tmp_path / "run/checkpoints").mkdir()
    second = run_directory.start_attempt(tmp_path / "run", {}, steps_done=2)
    assert second.metrics.read_text() == rows(1, 2) + evaluated
    redone = (first.attempt / "metrics-redone.jsonl").read_text()
    assert redone == rows(3, 4) + '{"step": 5, "lo\n'
    assert (first.attempt / "summary.json").exists()
    assert (tmp_path / "run/checkpoints").is_dir()
    assert json.loads((second.attempt / "env.json").read_text())["host"]


def test_a_start_from_the_first_step_puts_the_old_series_and_its_checkpoints_aside(
    tmp_path: Path, decide: Callable
) -> None:
    run_directory.write_plan(tmp_path / "run", *decide(f"out={tmp_path / 'run'}"))
    first = run_directory.start_attempt(tmp_path / "run", {})
    first.metrics.write_text(rows(1, 2))
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    second = run_directory.start_attempt(tmp_path / "run", {})
    assert not second.metrics.exists()
    assert (first.attempt / "metrics.jsonl").read_text() == rows(1, 2)
    assert (first.attempt / "checkpoints/step-00000002").is_dir()


FILES = ("request.toml", "ds_config.json", "origins.json", "plan.json")


@pytest.mark.parametrize("number", range(len(FILES)), ids=[f"before {name}" for name in FILES])
@pytest.mark.parametrize("how", ["killed", "in the middle"])
def test_a_start_that_is_killed_while_it_writes_the_plan_can_be_made_again(
    decide: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, how: str
) -> None:
    written: list[str] = []
    write = run_directory.write_atomic

    def dies(file: Path, text: str) -> None:
        if len(written) == number:
            if how == "in the middle":
                file.with_name(f".{file.name}.4711").write_text(text[: len(text) // 2])
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, text)

    monkeypatch.setattr(run_directory, "write_atomic", dies)
    monkeypatch.setattr(run_directory, "write_json", lambda file, value: dies(file, json.dumps(value)))
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "run", "a launch"):
        run_directory.write_plan(tmp_path / "run", *decide())
    assert tuple(written) == FILES[:number], "plan.json comes last"
    monkeypatch.undo()
    run_directory.write_plan(tmp_path / "run", *decide())
    assert Run(tmp_path / "run").plan == decide()[1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"identity": 7}'])
def test_a_damaged_plan_is_written_again_by_the_same_words(decide: Callable, tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "run"
    run_directory.write_plan(run, *decide())
    (run / "plan.json").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        Run(run).require_as_asked()
    assert caught.value.fix == "start the run again with its key=value words, which write it again"
    run_directory.write_plan(run, *decide())
    assert Run(run).plan == decide()[1]


def test_whose_a_directory_with_a_damaged_plan_is_its_last_attempt_tells(decide: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_directory.write_plan(run, *decide())
    run_directory.start_attempt(run, {}).metrics.write_text("")
    (run / "plan.json").write_text("{")
    with pytest.raises(RequestError, match="seed was 0 and is now 1"):
        run_directory.write_plan(run, *decide("seed=1"))
    (run / "plan.json").unlink()
    with pytest.raises(RequestError, match="seed was 0 and is now 1"):
        run_directory.write_plan(run, *decide("seed=1"))
    run_directory.write_plan(run, *decide())


def test_missing_or_damaged_origins_decide_nothing_about_whose_a_directory_is(decide: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_directory.write_plan(run, *decide())
    for spoil in (lambda file: file.unlink(), lambda file: file.write_text("{")):
        for name in ("origins.json", "request.toml", "ds_config.json"):
            spoil(run / name)
        run_directory.write_plan(run, *decide())
        assert Run(run).plan == decide()[1]


def test_a_launch_reserves_a_directory_until_its_ranks_hold_it(
    decide: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.delenv("HALFSTEP_LAUNCH", raising=False)
    with reserved(run, "the first"):
        run_directory.write_plan(run, *decide())
        for another in (lambda: reserved(run, "the second"), lambda: lease(run)):
            with pytest.raises(RequestError, match=f"is in use by process {os.getpid()}"), another():
                pass
        monkeypatch.setenv("HALFSTEP_LAUNCH", "the first")
        with lease(run), pytest.raises(RequestError, match="is in use"), reserved(run, "the second"):
            pass
        monkeypatch.delenv("HALFSTEP_LAUNCH")
    with lease(run):
        pass


RESERVER = """
import os, pathlib, sys
from halfstep.launcher.rundir.lease import reserved
with reserved(pathlib.Path(sys.argv[1]), "killed"):
    os.kill(os.getpid(), 9)
"""


def test_a_launch_that_is_killed_gives_its_reservation_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", RESERVER, str(run)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    assert json.loads((run / "lease").read_text())["launch"] == "killed"
    with reserved(run, "another"):
        pass


def test_two_starts_in_the_same_instant_are_one_run_and_one_refusal(decide: Callable, tmp_path: Path) -> None:
    request, plan = decide()
    for attempt in range(20):
        run = tmp_path / f"run-{attempt}"
        barrier, outcomes = threading.Barrier(2), []

        def begin(run: Path = run, barrier: threading.Barrier = barrier, outcomes: list = outcomes) -> None:
            barrier.wait()
            try:
                with reserved(run, threading.current_thread().name):
                    run_directory.write_plan(run, request, plan)
                    barrier.wait(5)
                    outcomes.append("started")
            except RequestError as error:
                outcomes.append(error.what)
                barrier.wait(5)

        threads = [threading.Thread(target=begin, name=f"launch {number}") for number in range(2)]
        for started in threads:
            started.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes)[1] == "started"
        assert sorted(outcomes)[0].startswith(f"{run} is in use by ")
