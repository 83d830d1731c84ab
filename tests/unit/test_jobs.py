"""`halfstep jobs`: rows from what SLURM says and what lies in run directories, whatever that is, and nothing else."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import saved, scheduler

from halfstep.launcher.cli.main import main
from halfstep.launcher.errors import HalfstepError, RequestError
from halfstep.launcher.rundir import exits, layout
from halfstep.launcher.submit import inside, jobs, slurm
from halfstep.launcher.system.terminal import of_log

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\rgone"
SHOWN = "\\x1b[2J\\x1b]0;title\\x07\\u009b31m\\rgone"


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    return lambda **answers: scheduler.install(tmp_path / "bin", monkeypatch, **answers)


@pytest.fixture
def run(tmp_path: Path, slurm_says: Callable[..., Path]) -> Path:
    """A run that a study or a submission made, with three steps and an end."""
    slurm_says()
    run = tmp_path / "runs" / "one"
    attempt = run / "attempts" / "0001"
    attempt.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps({"steps": 40, "zero": 1, "precision": "bf16"}))
    rows = [{"step": step, "loss": 5.0 - step, "tokens_per_second": 100.0 * step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "jobs.jsonl").write_text(json.dumps({"job": "12", "script": str(run / "job.sbatch"), "time": 1.0}) + "\n")
    exits.write_exit(attempt, 1, "the node was lost", 0)
    return run


def row(run: Path) -> jobs.Row:
    (seen,) = jobs.survey([run])
    return seen


def test_a_run_is_one_row(run: Path) -> None:
    seen = row(run)
    assert (seen.state, seen.reason) == ("ended", "the node was lost (1)")
    assert (seen.step, seen.steps, seen.loss, seen.tokens_per_second) == (3, 40, 2.0, 300.0)
    assert (seen.attempts, seen.checkpoint) == (1, None)


# --- checkpoints that were set aside


@pytest.mark.parametrize(
    "odd",
    [
        "step-00000008.bad-0002",
        "step-00000008.bad-0002-2",
        "step-",
        "step-x",
        "step-²",
        "step-٣٣٣٣٣٣٣٣",
        "step-12",
        "step-00000008 ",
        ".writing-step-00000009-0001",
        "step-" + "9" * 200,
    ],
)
def test_the_newest_checkpoint_is_one_that_is_called_so(run: Path, odd: str) -> None:
    saved.save(run, {"a": np.ones(3, dtype=np.float32)}, step=6)
    (run / "checkpoints" / odd).mkdir(parents=True)
    (run / "checkpoints" / odd / "manifest.json").write_text("{}")
    assert row(run).checkpoint == 6
    assert main(["jobs", str(run.parent)]) == 0
    assert inside.main(["end", str(run), "1", ""]) == 75


def test_attempts_are_counted_by_their_numbers(run: Path) -> None:
    for name in ("0002", "0010", "10000", "9999", "²", "0003.old", "notes"):
        (run / "attempts" / name).mkdir()
    (run / "attempts" / "0004").write_text("no folder")
    names = [item.name for item in layout.attempts(run)]
    assert names == ["0001", "0002", "0010", "9999", "10000"]


# --- records that are damaged

DAMAGE: list[tuple[str, bytes, str]] = [
    ("plan.json", b"[]", "plan.json is damaged: it is no JSON object"),
    ("plan.json", b"{}", "plan.json is damaged: it has no steps"),
    ("plan.json", b'{"steps": "many"}', "plan.json is damaged: steps = 'many' should be a valid integer"),
    ("plan.json", b'{"steps": 1e3}', "plan.json is damaged: steps = 1000.0 should be a valid integer"),
    ("plan.json", b'{"steps": -1}', "plan.json is damaged: steps = -1 should be greater than or equal to 1"),
    ("plan.json", b'{"steps": ' + b"9" * 5000 + b"}", "plan.json is damaged: "),
    ("plan.json", b"[" * 100_000, "plan.json is damaged: it is nested too deep"),
    ("plan.json", b"\xff\xfe", "plan.json is damaged: it is not UTF-8 at byte 0"),
    ("plan.json", b'{"steps": 40, "steps": 50}', "plan.json is damaged: it has 'steps' twice"),
    (
        "metrics.jsonl",
        b'{"step": "x", "loss": 1.0}\n',
        "metrics.jsonl is damaged: step = 'x' should be a valid integer",
    ),
    (
        "metrics.jsonl",
        b'{"step": 3, "loss": "low"}\n',
        "metrics.jsonl is damaged: loss = 'low' should be a valid number",
    ),
    (
        "metrics.jsonl",
        b'{"step": 3, "loss": 1, "tokens_per_second": -5}\n',
        "metrics.jsonl is damaged: tokens_per_second = -5",
    ),
    ("metrics.jsonl", b'{"loss": 1.0}\n', "metrics.jsonl is damaged: it has no step"),
    ("summary.json", b'{"status": 7}', "summary.json is damaged: status = 7 should be a valid string"),
    ("summary.json", b'{"status": "done", "loss": NaN}', "summary.json is damaged: it holds NaN"),
    ("attempts/0001/exit.json", b'{"code": "2"}', "exit.json is damaged"),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGE, ids=[f"{name} {said}" for name, _, said in DAMAGE])
def test_a_damaged_record_is_named_and_the_other_runs_are_listed(
    run: Path, name: str, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "two"
    other.mkdir()
    (other / "plan.json").write_text('{"steps": 5}')
    (run / name).write_bytes(content)
    seen = row(run)
    assert seen.state == "damaged"
    assert said in seen.reason
    assert main(["jobs", str(run.parent)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["jobs", "--json", str(run.parent)]) == 0
    assert {item["state"] for item in json.loads(capsys.readouterr().out)} == {"damaged", "ended"}


@pytest.mark.parametrize(
    "name", ["plan.json", "metrics.jsonl", "summary.json", "jobs.jsonl", "attempts/0001/exit.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_what_is_no_file_is_not_waited_for(run: Path, name: str, kind: str) -> None:
    (run / name).unlink(missing_ok=True)
    {
        "pipe": os.mkfifo,
        "device": lambda path: os.symlink("/dev/zero", path),
        "link": lambda path: os.symlink("/etc/passwd", path),
        "folder": os.mkdir,
    }[kind](run / name)
    began = time.monotonic()
    assert main(["jobs", str(run)]) == 0
    assert time.monotonic() - began < 5


def test_lines_of_jobs_that_are_none_do_not_count(run: Path) -> None:
    with (run / "jobs.jsonl").open("a") as file:
        file.write('{"job": "13_2"}\n{"job": 7}\n{"job": "x; rm"}\n[]\n{"job": "14", "script": 5}\n{"jo')
    assert jobs.submitted(run) == ["12", "13_2"]


# --- what others wrote does not reach the terminal


def test_the_cause_of_an_end_a_name_and_a_reason_are_shown_not_obeyed(
    run: Path, slurm_says: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    exits.write_exit(next((run / "attempts").iterdir()), 1, "x", 0)
    (run / "attempts" / "0001" / "exit.json").write_text(json.dumps({"code": 2, "cause": EVIL, "time": 1.0}))
    evil = run.parent / "\x1b[31mrun\nname"
    evil.mkdir()
    (evil / "plan.json").write_text('{"steps": 5}')
    slurm_says(squeue=scheduler.line("77", "PENDING", f"halfstep:{evil}", reason="\x1b[5mblink"))
    assert main(["jobs", str(run.parent)]) == 0
    out = capsys.readouterr().out
    assert SHOWN in out
    assert "\\x1b[31mrun\\nname" in out
    assert len(out.splitlines()) == 3
    assert not [letter for letter in out if (ord(letter) < 32 and letter != "\n") or ord(letter) in range(0x7F, 0xA0)]


def test_a_log_is_shown_without_its_control_characters(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "slurm.log").write_bytes(b"\x1b[32mgreen\x1b[0m\tok\n10%\r20%\r\n\x1b]0;t\x07" + b"\xff\xfe\n")
    assert main(["jobs", "logs", str(run)]) == 0
    assert capsys.readouterr().out == "green\tok\n10%\n20%\n\\x1b]0;t\\x07\ufffd\ufffd\n"
    assert main(["jobs", "logs", "-n", "1", str(run)]) == 0
    assert capsys.readouterr().out == "\\x1b]0;t\\x07\ufffd\ufffd\n"
    assert main(["jobs", "logs", "-n", "-3", str(run)]) == 0
    assert capsys.readouterr().out == ""


def test_following_a_log_shows_what_is_added_a_letter_cut_in_two_included(run: Path) -> None:
    log, shown = run / "slurm.log", []
    log.write_text("one\n")
    stopped = threading.Event()

    class Enough(Exception):
        pass

    def show(text: str) -> None:
        shown.append(of_log(text))
        if stopped.is_set() and "ü" in "".join(shown):
            raise Enough

    def add() -> None:
        for part in (b"\xc3", b"\xbc\x1b[0m\n"):
            time.sleep(0.1)
            with log.open("ab") as file:
                file.write(part)
        stopped.set()

    thread = threading.Thread(target=add)
    thread.start()
    with pytest.raises(Enough):
        jobs.follow(log, show, lines=10, follow=True, poll=0.02)
    thread.join()
    assert "".join(shown).startswith("one\nü")


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: os.symlink("/etc/shadow", path), os.mkdir])
def test_a_log_that_is_no_file_is_refused(
    run: Path, plant: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run / "slurm.log")
    assert main(["jobs", "logs", str(run)]) == 2
    assert "the log cannot be read" in capsys.readouterr().err


# --- what SLURM says


@pytest.mark.parametrize(
    "output",
    [
        "",
        "\n\n",
        "garbage\n",
        "|||||\n",
        "1|RUNNING\n",
        "x|RUNNING|a|b|c|d|halfstep:/r\n",
        "\x00|||||||\n",
        "12_[3-5]|PENDING|a|b|c|d|halfstep:/r\n",
        "1+0|RUNNING|a|b|c|d|halfstep:/r\n",
        "1|RUNNING|a|b|c|d|other\n",
    ],
)
def test_lines_of_squeue_that_are_no_jobs_of_ours_are_passed_over(slurm_says: Callable[..., Path], output: str) -> None:
    slurm_says(squeue=output)
    assert slurm.queue() == []


def test_jobs_are_read_whatever_is_in_their_comments(slurm_says: Callable[..., Path]) -> None:
    slurm_says(squeue=scheduler.line("9_10", "RUNNING", "halfstep:/r|x", nodes="n1").encode() + b"\xff\xfe\n")
    (seen,) = slurm.queue()
    assert (seen.job, seen.state, seen.reason, seen.run) == ("9_10", "RUNNING", "n1", "/r|x")


def test_an_array_whose_list_is_no_list_is_one_run(tmp_path: Path, slurm_says: Callable[..., Path]) -> None:
    listed = tmp_path / "runs-1.txt"
    (tmp_path / "a").mkdir()
    listed.write_text(f"{tmp_path}/a\n{tmp_path}/b\n")
    job = slurm.Queued(job="5_1", state="RUNNING", reason="", run=str(listed), left="", partition="")
    assert jobs.runs_of(job) == [tmp_path / "b"]
    listed.write_bytes(b"\xff")
    assert jobs.runs_of(job) == [listed]
    listed.unlink()
    os.mkfifo(listed)
    assert jobs.runs_of(job) == [listed]
    slurm_says(squeue=scheduler.line("5_1", "RUNNING", f"halfstep:{listed}"))
    assert [item.job for item in jobs.survey([])] == ["5_1"]


@pytest.mark.parametrize("word", ["²", "12x", "1_", "99999999999999999999", "", "-1", "7;ls"])
def test_a_word_that_is_no_job_and_no_folder_is_said(slurm_says: Callable[..., Path], word: str) -> None:
    slurm_says()
    if word:
        with pytest.raises(RequestError, match="neither a run directory nor a job"):
            jobs.find(word)


def test_what_sbatch_says_has_to_be_a_job(tmp_path: Path, slurm_says: Callable[..., Path]) -> None:
    class Job:
        script = tmp_path / "job.sbatch"

        def dependency(self) -> list[str]:
            return []

    job: Any = Job()
    slurm_says(sbatch="4711;cluster\n")
    assert slurm.submit(job) == "4711"
    for answer in ("", "Submitted batch job 7\n", "\x1b[0m7\n", "-1\n"):
        slurm_says(sbatch=answer)
        with pytest.raises(HalfstepError, match="did not name the job"):
            slurm.submit(job)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("UNLIMITED", None), ("2-00:00:00", 172800), ("soon", None), ("", None), ("9" * 5000, None), ("٣", None)],
)
def test_a_partition_s_limit_that_is_no_time_is_none(
    slurm_says: Callable[..., Path], text: str, seconds: int | None
) -> None:
    slurm_says(scontrol=f"PartitionName=a Default=YES MaxNodes=² TotalNodes=x MaxTime={text} State=UP\nnonsense\n")
    (seen,) = slurm.partitions()
    assert (seen.name, seen.seconds, seen.nodes, seen.default) == ("a", seconds, None, True)


def test_a_command_that_hangs_is_not_waited_for_for_ever(
    slurm_says: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = slurm_says()
    (folder / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(slurm, "_SECONDS", 0.3)
    with pytest.raises(HalfstepError, match="squeue did not answer within"):
        slurm.queue()


# --- in the job itself


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b'{"environment": 5}',
        b'{"environment": ["SLURM_JOB_ID"]}',
        b"\xff",
        b"",
        b"[" * 100000,
        b'{"environment": {"SLURM_JOB_ID": 7}}',
        b'{"environment": null}',
    ],
    ids=lambda content: content[:20].decode(errors="replace"),
)
def test_a_damaged_env_json_keeps_no_job_from_its_queue(run: Path, content: bytes) -> None:
    env = run / "attempts" / "0001" / "env.json"
    env.write_bytes(content)
    assert inside.main(["end", str(run), "75", ""]) == 75
    assert inside.main(["end", str(run), "2", ""]) == 2
    env.unlink()
    os.mkfifo(env)
    assert inside.main(["end", str(run), "137", ""]) == 75


@pytest.mark.parametrize("name", ["refused.json", "starts.jsonl", "attempts/0001/exit.json", "summary.json"])
@pytest.mark.parametrize("content", [b"[]", b'{"job": "", "start": "0"}', b'{"code": "x"}', b"\x00", b"[" * 100_000])
def test_no_record_keeps_a_job_from_its_queue(run: Path, name: str, content: bytes) -> None:
    env = {"environment": {}}
    (run / "attempts" / "0001" / "env.json").write_text(json.dumps(env))
    (run / name).write_bytes(content)
    assert inside.main(["end", str(run), "75", ""]) == 75


def test_a_file_server_that_is_away_keeps_no_job_from_its_queue(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(*_: Any) -> Any:
        raise OSError(116, "Stale file handle", str(run))

    monkeypatch.setattr(inside, "read_refusal", stale)
    assert inside.main(["end", str(run), "137", ""]) == 75
    assert inside.main(["end", str(run), "2", ""]) == 2
    assert "Stale file handle" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["", "x", "²", "1" * 5000, "-1", "1;2"])
def test_whatever_slurm_calls_a_job_there_is_a_port(run: Path, number: str) -> None:
    assert 20000 <= inside.begin(run, {"SLURM_JOB_ID": number, "SLURM_ARRAY_TASK_ID": number}) < 32000


def test_what_the_job_prints_of_a_cause_is_shown_not_obeyed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "attempts" / "0001" / "env.json").write_text('{"environment": {}}')
    (run / "attempts" / "0001" / "exit.json").write_text(json.dumps({"code": 2, "cause": EVIL}))
    assert inside.main(["end", str(run), "1", ""]) == 2
    assert capsys.readouterr().out == f"--- the run ends: {SHOWN} (exit code 2)\n"
