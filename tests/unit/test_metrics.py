"""Quantities by hand, and the files they go to."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfstep.launcher.errors import RequestError
from halfstep.launcher.metrics import derive
from halfstep.launcher.metrics.sinks import ConsoleSink, JsonLines
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import records
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, StepRecord
from halfstep.launcher.rundir.run_directory import RunDir, note_proof
from halfstep.launcher.rundir.run_reader import Run

RECORD = StepRecord(
    step=1, tokens=4096, loss=8.5, lr=1e-3, grad_norm=2.0, loss_scale=65536.0, overflow=False, skipped_steps=0,
    step_seconds=0.5, data_seconds=0.01, tokens_per_second=8192.0, mfu=None, peak_memory_bytes=2**30, time=0.0,
)  # fmt: skip


def test_derived_quantities_by_hand() -> None:
    assert derive.tokens_per_second(4096, 0.5) == 8192
    assert derive.mfu(1000, 6e9, 12e12, 2) == 0.25
    assert derive.mfu(1000, 6e9, None, 2) is None
    assert derive.mfu(1000, None, 12e12, 2) is None
    assert derive.perplexity(0.0) == 1.0
    assert derive.perplexity(1e4) is None
    assert derive.perplexity(math.nan) is None
    assert [derive.finite(x) for x in (1.0, math.inf, math.nan, None)] == [1.0, None, None, None]


def test_a_median_leaves_the_warm_up_out() -> None:
    assert derive.median_of_steady([100, 100, 100, 100, 100, 1, 2, 3]) == 2
    assert derive.median_of_steady([5.0]) == 5.0
    assert derive.median_of_steady([]) is None


def test_records_are_whole_lines_of_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(RECORD)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == dataclasses.asdict(RECORD), (
        "before it is closed, too"
    )
    with pytest.raises(ValueError, match="Out of range"):
        sink.write(dataclasses.replace(RECORD, loss=math.nan))
    sink.close()


def test_a_file_gets_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(ConsoleSink(steps=25, every=10)) as screen:
        for step in range(1, 26):
            screen.record(dataclasses.replace(RECORD, step=step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[0] == "step      1/25  loss 8.5000  lr 1.00e-03  norm 2.000  scale 65536  8,192 tok/s  1.00 GiB"


def test_a_skipped_step_is_shown_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(ConsoleSink(steps=25, every=10)) as screen:
        screen.record(dataclasses.replace(RECORD, step=3, overflow=True, grad_norm=None))
    assert capsys.readouterr().out == (
        "step      3/25  loss 8.5000  lr 1.00e-03  norm not finite  scale 65536 SKIPPED  8,192 tok/s  1.00 GiB\n"
    )


def test_what_others_wrote_is_shown_not_obeyed_by_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(ConsoleSink(steps=25, every=10)) as screen:
        screen.say("WARNING: checkpoint step-1 is damaged: \x1b[2J\x07\x9b31m")
    assert capsys.readouterr().out == "WARNING: checkpoint step-1 is damaged: \\x1b[2J\\x07\\u009b31m\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "1"}, "step = '1'"),
        ({"loss": [1]}, "loss should be a valid number"),
        ({"step_seconds": -1.0}, "step_seconds = -1.0"),
        ({"time": 1e300}, "time = 1e+300"),
        ({"overflow": 0}, "overflow = 0"),
    ],
)
def test_a_resume_takes_over_no_row_that_was_not_written_by_us(
    plan: Callable[..., Plan], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    from halfstep.launcher.engine.recorder import Recorder

    rows = [dataclasses.asdict(RECORD), {"step": 1, "eval_loss": 8.0, "perplexity": 1e300, "time": 1.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({**row, "more": 1}) + "\n" for row in rows))
    recorder = Recorder(RunDir(path=tmp_path, attempt=tmp_path / "attempts" / "0001"), plan(), writes=True)
    recorder.take_over()
    assert recorder.evaluated(1)
    file.write_text(json.dumps({**rows[0], **change}) + "\n")
    with pytest.raises(RequestError, match=r"metrics\.jsonl is damaged in line 1: ") as caught:
        recorder.take_over()
    assert said in caught.value.what


def test_every_record_goes_to_every_sink_whatever_it_is(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfstep.launcher.engine.recorder import Recorder
    from halfstep.launcher.metrics import sinks

    class Tracker(sinks.Sink):
        def __init__(self) -> None:
            self.taken: list[Any] = []

        def record(self, row: StepRecord | EvaluationRecord) -> None:
            self.taken.append(row.step)

        def event(self, row: dict[str, Any]) -> None:
            self.taken.append(row["event"])

        def summary(self, tree: dict[str, Any]) -> None:
            self.taken.append(tree["status"])

        def close(self) -> None:
            self.taken.append("closed")

    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    where, tracker = RunDir(path=tmp_path, attempt=tmp_path / "attempts" / "0001"), Tracker()
    listed = sinks.of_run
    monkeypatch.setattr(sinks, "of_run", lambda *about, **more: [*listed(*about, **more), tracker])
    evaluation = EvaluationRecord(step=1, eval_loss=8.0, perplexity=2981.0, time=1.0)
    with Recorder(where, plan(), writes=True) as recorder:
        recorder.step(RECORD)
        recorder.evaluation(evaluation)
        recorder.say("for people")
        recorder.sync()
        recorder.summarise("done", 5, 1)
    assert tracker.taken == ["start", 1, 1, "done", "done", "closed"]
    assert (Run(tmp_path).steps(), Run(tmp_path).evaluations()) == ([RECORD], [evaluation])
    assert [event.kind for event in Run(tmp_path).events()] == ["start", "done"]


@pytest.mark.parametrize(
    ("written", "known", "expected"),
    [
        (None, None, (None, "the parity gate was not asked")),
        (None, records.Proof(proved=None, reason="it does not know Muon"), (None, "it does not know Muon")),
        ({"proved": False, "reason": "another model"}, records.Proof(proved=True), (False, "another model")),
        ({"proved": True, "reason": ""}, None, (True, "")),
        ("{", records.Proof(proved=True), (True, "")),
    ],
    ids=["nobody asked", "a run by itself", "its study knows better", "a study's", "damaged"],
)
def test_a_summary_says_whether_the_runs_cell_is_proved(
    plan: Callable[..., Plan],
    tmp_path: Path,
    written: Any,
    known: records.Proof | None,
    expected: tuple[bool | None, str],
) -> None:
    from halfstep.launcher.engine.recorder import Recorder

    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    if written is not None:
        (tmp_path / "proof.json").write_text(written if isinstance(written, str) else json.dumps(written))
    where = RunDir(path=tmp_path, attempt=tmp_path / "attempts" / "0001")
    with Recorder(where, plan(), writes=True, proof=known) as recorder:
        recorder.step(RECORD)
        recorder.summarise("done", 5, 1)
    summary = Run(tmp_path).summary
    assert summary is not None
    assert (summary.proved, summary.unproved_because) == expected


def test_a_summary_that_is_older_says_nothing_of_the_gate(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "done"}')
    written = Run(tmp_path).summary
    assert written is not None
    assert (written.proved, written.unproved_because) == (None, None)
    note_proof(tmp_path, False, "another model")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "status": "done",
        "proved": False,
        "unproved_because": "another model",
    }
    (tmp_path / "summary.json").unlink()
    note_proof(tmp_path, True, "")
    assert not (tmp_path / "summary.json").exists(), "a run that has none is not over"


def test_a_rank_that_does_not_write_leaves_nothing(plan: Callable[..., Plan], tmp_path: Path) -> None:
    from halfstep.launcher.engine.recorder import Recorder

    where = RunDir(path=tmp_path / "run", attempt=tmp_path / "run" / "attempts" / "0001")
    with Recorder(where, plan(), writes=False) as recorder:
        recorder.step(RECORD)
        recorder.summarise("done", 5, 1)
    assert not where.path.exists()
