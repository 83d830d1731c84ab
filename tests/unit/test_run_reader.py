"""One reader of a run: typed, and patient with runs that an older or a newer Halfstep wrote, or that were cut short."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from halfstep.launcher import errors
from halfstep.launcher.rundir import exits, metric_rows
from halfstep.launcher.rundir.exits import Kind
from halfstep.launcher.rundir.metric_rows import StepRecord
from halfstep.launcher.rundir.records import Damaged
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system.fields import Finite

ROW: dict[str, Any] = {
    "step": 1, "tokens": 64, "loss": 4.0, "lr": 1e-3, "grad_norm": 1.0, "loss_scale": None, "overflow": False,
    "skipped_steps": 0, "step_seconds": 0.5, "data_seconds": 0.1, "tokens_per_second": 128.0, "mfu": None,
    "peak_memory_bytes": 1, "time": 1.0,
}  # fmt: skip
EVALUATION = {"step": 0, "eval_loss": 5.0, "perplexity": 148.4, "time": 0.5}


def write(run: Path, name: str, *rows: dict[str, Any], torn: str = "") -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def test_a_run_is_read_by_its_parts(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", EVALUATION, ROW, {**ROW, "step": 2}, torn='{"step": 3, "lo')
    write(tmp_path, "events.jsonl", {"event": "start", "attempt": "0001"}, {"event": "saved", "step": 2})
    write(tmp_path, "summary.json", {"status": "done", "run_id": "abc", "steps": 2})
    write(tmp_path, "attempts/0001/env.json", {"host": "n1", "time": 1.0})
    write(tmp_path, "attempts/0002/exit.json", {"code": 0, "cause": "done", "kind": "done", "rank": 0, "time": 2.0})
    run = Run(tmp_path)
    assert [record.step for record in run.steps()] == [1, 2]
    assert [record.eval_loss for record in run.evaluations()] == [5.0]
    assert [(event.kind, event.step) for event in run.events()] == [("start", None), ("saved", 2)]
    assert [attempt.number for attempt in run.attempts] == [1, 2]
    assert run.attempts[0].environment is not None
    assert (run.attempts[0].environment.host, run.attempts[0].exit) == ("n1", None)
    assert run.exit == exits.Exit(code=0, cause="done", kind=Kind.DONE, rank=0, time=2.0)
    assert run.finished is not None
    assert run.finished.run_id == "abc"


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path / "none")
    assert (run.steps(), run.evaluations(), run.events(), run.attempts) == ([], [], [], [])
    assert (run.exit, run.summary, run.finished, run.planned, run.reached, run.proof) == (None,) * 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewerStep(StepRecord):
    """A record as a later version may have it, with a field that somebody gave no default."""

    entropy: Finite
    experts: int = 1


def test_a_field_that_is_added_to_the_records_does_not_break_the_resume_of_older_runs() -> None:
    record = metric_rows.read_as(NewerStep, ROW)
    assert (record.entropy, record.experts, record.loss) == (None, 1, 4.0)
    assert metric_rows.read_as(NewerStep, {**ROW, "entropy": 0.5}).entropy == 0.5
    with pytest.raises(ValueError, match="entropy = 'low'"):
        metric_rows.read_as(NewerStep, {**ROW, "entropy": "low"})


def test_a_field_of_a_newer_version_is_left_out() -> None:
    assert metric_rows.of_row({**ROW, "entropy": 0.5}) == metric_rows.of_row(ROW)


def test_a_row_that_is_older_than_the_routers_loss_has_none() -> None:
    rows = [metric_rows.of_row(row) for row in (ROW, {**ROW, "router_loss": 2.25})]
    assert [row.router_loss for row in rows if isinstance(row, StepRecord)] == [None, 2.25]


@pytest.mark.parametrize("name", sorted(ROW))
def test_a_row_without_what_every_version_writes_is_damaged(tmp_path: Path, name: str) -> None:
    write(tmp_path, "metrics.jsonl", {key: value for key, value in ROW.items() if key != name})
    with pytest.raises(Damaged, match=rf"metrics\.jsonl is damaged in line 1: it has no {name}"):
        Run(tmp_path).steps()


ERRORS = [
    (errors.RequestError, Kind.REQUEST),
    (errors.TopologyError, Kind.REQUEST),
    (errors.RefusedError, Kind.REFUSED),
    (errors.OutOfDeviceMemory, Kind.OUT_OF_DEVICE_MEMORY),
    (errors.OutOfHostMemory, Kind.OUT_OF_HOST_MEMORY),
    (errors.DiskFull, Kind.DISK_FULL),
    (errors.NumericsError, Kind.NUMERICS),
    (errors.Stopped, Kind.STOPPED),
    (errors.Stalled, Kind.STALL),
    (errors.Interrupted, Kind.INTERRUPTED),
    (errors.Fault, Kind.FAILED),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=[error.__name__ for error, _ in ERRORS])
def test_an_error_decides_the_kind_of_an_end(error: type[errors.HalfstepError], kind: Kind) -> None:
    assert exits.kind_of_error(error("what", where="where", fix="fix")) is kind


def test_no_error_that_ends_a_run_is_without_a_kind() -> None:
    known = {error for error, _ in ERRORS}
    below = [errors.HalfstepError]
    for error in below:
        below += error.__subclasses__()
    assert {error for error in below[1:] if error.__module__ == errors.__name__} == known


@pytest.mark.parametrize(
    ("code", "cause", "kind"),
    [
        (0, "done", Kind.DONE),
        (3, "out of device memory: CUDA out of memory. Tried to allocate", Kind.OUT_OF_DEVICE_MEMORY),
        (3, "out of host memory: DefaultCPUAllocator", Kind.OUT_OF_HOST_MEMORY),
        (137, "rank 1 was killed by signal 9 (SIGKILL): the host is out of memory", Kind.OUT_OF_HOST_MEMORY),
        (137, "rank 1 was killed by signal 9 (SIGKILL): by hand, by the system, or out of memory", Kind.SIGNAL),
        (3, "the disk is full", Kind.DISK_FULL),
        (3, "tensor parallelism is not there", Kind.REFUSED),
        (124, "it took longer than the 9 s it was given", Kind.TIMED_OUT),
        (1, "the launcher died: deepspeed, process 7", Kind.FAILED),
    ],
)
def test_a_record_of_an_older_version_has_the_kind_that_its_code_and_cause_say(
    tmp_path: Path, code: int, cause: str, kind: Kind
) -> None:
    (tmp_path / "exit.json").write_text(json.dumps({"code": code, "cause": cause, "rank": 0, "time": 1.0}))
    end = exits.read_exit(tmp_path)
    assert end is not None
    assert end.kind is kind


def test_the_kind_is_written_and_one_of_a_newer_version_is_that_of_the_code(tmp_path: Path) -> None:
    assert exits.write_exit(tmp_path, 1, "a connection broke", 0, Kind.LOST_RANK) is None
    written = json.loads((tmp_path / "exit.json").read_text())
    assert written["kind"] == "lost-rank"
    (tmp_path / "exit.json").write_text(json.dumps({**written, "code": 76, "kind": "of-tomorrow"}))
    end = exits.read_exit(tmp_path)
    assert end is not None
    assert end.kind is Kind.NUMERICS


def test_the_page_names_every_kind() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()
    assert [kind for kind in Kind if f"`{kind}`" not in page] == []
