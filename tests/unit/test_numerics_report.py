"""`halfstep numerics`: what it prints, draws and refuses, on run directories made by hand."""

import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from halfstep.launcher.cli import main
from halfstep.launcher.errors import RequestError
from halfstep.launcher.metrics import numerics_history, numerics_report, plots

MakeRun = Callable[..., Path]
Show = Callable[..., tuple[int, str, str]]
SKIPPED = {"grad_norm": None, "overflow": True}


def step(number: int, scale: float | None, skipped: int = 0, **others: Any) -> dict[str, Any]:
    row = {"step": number, "loss": 4.0 - number / 10, "loss_scale": scale, "overflow": False, "skipped_steps": skipped}
    timing = {"step_seconds": 0.5, "data_seconds": 0.1, "tokens_per_second": 100.0, "mfu": None, "time": 0.0}
    return {**row, "grad_norm": 1.5, "lr": 1e-3, "tokens": number, "peak_memory_bytes": 1, **timing, **others}


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "eval_loss": loss, "perplexity": 2.0, "time": 0.0}


def event(kind: str, **details: Any) -> dict[str, Any]:
    return {"event": kind, **details, "time": 0.0}


def layer(unscaled: float, scaled: float, *, elements: int = 100, **others: Any) -> dict[str, Any]:
    shares = {"zero": 0.0, "underflow_unscaled": unscaled, "underflow_scaled": scaled}
    return {"elements": elements, "grad_max": 0.013, **shares, **others}


def reading(number: int, scale: float, **layers: dict[str, Any]) -> dict[str, Any]:
    named = {f"transformer.{name.replace('_', '.', 1)}": shares for name, shares in layers.items()}
    return event("numerics", step=number, scale=scale, layers=named)


def origin(parameter: str, rank: int) -> dict[str, Any]:
    return {"parameter": parameter, "layer": parameter.rpartition(".")[0], "rank": rank, "micro_step": 1}


FP16_STEPS = [
    evaluation(0, 4.1),
    step(1, 262144.0, 1, **SKIPPED),
    step(2, 262144.0, 2, **SKIPPED, loss=None),
    step(3, 131072.0, 3, **SKIPPED),
    step(4, 65536.0, 3),
    evaluation(4, 3.5),
    step(5, 65536.0, 3),
    step(6, 131072.0, 3),
]
FP16_EVENTS = [
    event("start", attempt="0001"),
    event("repaired", repairs=["false-optimizer-step", "unscaled-loss"]),
    event("overflow", step=1, loss_scale=262144.0, skipped_steps=1, non_finite=12, first=[origin("h.1.mlp.weight", 0)]),
    event("overflow", step=2, loss_scale=262144.0, skipped_steps=2, non_finite=40, first=[]),
    event("loss_not_finite", step=2, ranks=[1], first_activation={"module": "transformer.h.1.attn", "rank": 1}),
    # The row of step 3 has no event yet: a run that is running writes the row first.
    reading(
        2,
        262144.0,
        wte=layer(0.5, 0.01, elements=300, zero=0.25),
        h_0=layer(0.0, 0.0, grad_max=None),
        h_1=layer(0.25, 0.125),
    ),
    reading(
        4,
        65536.0,
        wte=layer(0.41, 0.0003, elements=300, zero=0.5),
        h_0=layer(0.0, 0.0),
        h_1=layer(0.1, 0.00002, grad_max=2.5),
    ),
]


@pytest.fixture
def make(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run directory; rows are dictionaries, or bytes written as they are."""

    def write(
        steps: list[Any],
        events: list[Any] | None = None,
        *,
        name: str = "demo",
        precision: str = "fp16",
        planned: int = 6,
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        decided = {"model": {"name": "gpt2-nano"}, "precision": precision, "zero": 2, "steps": planned}
        (path / "plan.json").write_text(json.dumps(decided))
        for file, rows in (("metrics.jsonl", steps), ("events.jsonl", events)):
            if rows is not None:
                content = (row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
                (path / file).write_bytes(b"".join(content))
        return path

    return write


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Return a function that runs the verb and returns its exit code, what it printed, and its errors."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = main.main(["numerics", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_a_scaled_run_is_told_by_its_moves_and_its_last_reading(make: MakeRun, show: Show) -> None:
    path = make(FP16_STEPS, FP16_EVENTS)
    expected = f"""\
{path}: gpt2-nano, 6 steps, fp16, zero=2, loss scale 262,144 -> 131,072, 3 skipped, \
repaired false-optimizer-step and unscaled-loss

step    scale         next  why
   1  262,144  ->  262,144  overflow in h.1.mlp.weight on rank 0
   2  262,144  ->  131,072  overflow in the sum over micro-steps or ranks; \
loss not finite on rank 1, first in transformer.h.1.attn
   3  131,072  ->   65,536  overflow
   5   65,536  ->  131,072  grown

gradients at step 4 (reading 2), in percent of each layer's elements
zero: as computed; unscaled: lost in fp16 without scaling; scaled: lost at 65,536; most: of all readings
layer            grad max   zero  unscaled  scaled  most unscaled  most scaled
transformer.wte  1.30e-02  50.00     41.00    0.03          50.00         1.00
transformer.h.0  1.30e-02      0         0       0              0            0
transformer.h.1  2.50e+00      0     10.00   <0.01          25.00        12.50
all layers       2.50e+00  30.00     26.60    0.02          43.75         3.88

fp16 loses more than 1.00 % of the gradients of 1 layer even with the scale; to compute them in fp32:
  precision=fp16-autocast 'keep_fp32=["transformer.h.1"]'

picture {path / "numerics.png"}
"""
    assert show(path) == (0, expected, "")


def test_an_overflow_that_a_second_look_did_not_find_is_not_put_down_to_a_sum(make: MakeRun) -> None:
    gone = event("overflow", step=1, loss_scale=1024.0, skipped_steps=1, non_finite=0, first=[], repeated=False)
    path = make([step(1, 1024.0, overflow=True)], [event("start", attempt="0001"), gone])
    assert any(
        line.endswith("overflow that was not there a second time")
        for line in numerics_report.lines(numerics_history.read(path))
    )


def test_a_run_without_a_loss_scale_says_so(make: MakeRun) -> None:
    lost = event("loss_not_finite", step=2, ranks=[0, 1, 2, 3, 4], first_activation={"module": "h.0", "rank": 3})
    measured = reading(2, 65536.0, wte=layer(0.0, 0.0, grad_max=None), h_0=layer(0.5, 0.25))
    steps = [step(1, None), step(2, None, loss=None, grad_norm=None)]
    path = make(steps, [event("start", attempt="0001"), lost, measured], precision="bf16", planned=1000)
    assert numerics_report.lines(numerics_history.read(path)) == [
        f"{path}: gpt2-nano, 2 of 1,000 steps, bf16, zero=2, no loss scale, 0 skipped, no repairs",
        "",
        "bf16 trains without a loss scale",
        "step  why",
        "   2  loss not finite on ranks 0, 1, 2, 3 and 1 more, first in h.0 on rank 3",
        "",
        "gradients at step 2 (reading 1), in percent of each layer's elements",
        "zero: as computed; unscaled: lost in fp16 without scaling; scaled: lost in fp16 at 65,536; "
        "most: of all readings",
        "layer              grad max  zero  unscaled  scaled  most unscaled  most scaled",
        "transformer.wte  not finite     -         -       -              -            -",
        "transformer.h.0    1.30e-02     0     50.00   25.00          50.00        25.00",
        "all layers       not finite     0     50.00   25.00          50.00        25.00",
    ]


def test_without_readings_it_is_told_how_to_get_them(make: MakeRun) -> None:
    path = make([step(1, 65536.0)], planned=1)
    assert numerics_report.lines(numerics_history.read(path)) == [
        f"{path}: gpt2-nano, 1 step, fp16, zero=2, loss scale 65,536 -> 65,536, 0 skipped, no repairs",
        "",
        "the loss scale never moved, no step was skipped",
        "",
        "no reading of the gradients: a run started with numerics.every=10 takes one every 10 steps",
    ]


def test_of_many_moves_the_first_and_the_last_ten_are_shown(make: MakeRun) -> None:
    # The scale grows after step 15; every other step is skipped.
    steps = [step(n, 8.0 if n <= 15 else 16.0, **({} if n == 15 else SKIPPED)) for n in range(1, 31)]
    lines = numerics_report.lines(numerics_history.read(make(steps, planned=30)))[2:-2]
    assert lines == [
        "step  scale      next  why",
        *(f"{n:>4}      8  ->     8  overflow" for n in range(1, 11)),
        "... 10 more, 9 of them skipped ...",
        *(f"{n:>4}     16  ->    16  overflow" for n in range(21, 30)),
        "  30     16  ->     -  overflow",
    ]


def test_twenty_moves_are_shown_whole(make: MakeRun) -> None:
    steps = [step(n, 1.0, n, **SKIPPED) for n in range(1, 21)]
    assert len(numerics_report.lines(numerics_history.read(make(steps)))[2:-2]) == 21


@pytest.mark.parametrize(
    ("before", "after", "why"), [(2.0, 4.0, "grown"), (4.0, 2.0, "lowered")], ids=["grown", "lowered"]
)
def test_a_scale_that_moves_by_itself_is_told(make: MakeRun, before: float, after: float, why: str) -> None:
    (move,) = numerics_history.read(make([step(1, before), step(2, after)])).moves
    assert (move.step, move.before, move.after, move.skipped, move.why) == (1, before, after, False, why)


def test_a_diverged_run_is_told(make: MakeRun) -> None:
    path = make([step(1, 0.5)], [event("diverged", step=1)], planned=1)
    assert numerics_report.lines(numerics_history.read(path))[0].endswith(
        "loss scale 0.5 -> 0.5, 0 skipped, no repairs, diverged"
    )


def test_only_what_is_zero_reads_zero() -> None:
    shares = [0.0, 1e-9, 0.00009, 0.0001, 0.5, 1.0, None]
    assert [numerics_report.percent_text(share) for share in shares] == [
        "0",
        "<0.01",
        "<0.01",
        "0.01",
        "50.00",
        "100.00",
        "-",
    ]


def test_what_neither_plan_nor_summary_tells_is_left_out(make: MakeRun) -> None:
    path = make([step(1, 65536.0)])
    (path / "plan.json").unlink()
    said = f"{path}: 1 step, precision not recorded, loss scale 65,536 -> 65,536, 0 skipped, no repairs"
    assert numerics_report.lines(numerics_history.read(path))[0] == said
    (path / "summary.json").write_text(json.dumps({"model": "llama-nano", "precision": "fp16", "zero": 3, "steps": 1}))
    said = f"{path}: llama-nano, 1 step, fp16, zero=3, loss scale 65,536 -> 65,536, 0 skipped, no repairs"
    assert numerics_report.lines(numerics_history.read(path))[0] == said


def test_events_of_an_earlier_attempt_do_not_count(make: MakeRun) -> None:
    steps = [step(1, 65536.0, 1, **SKIPPED)]
    old = [
        event("start", attempt="0001"),
        event("repaired", repairs=["unscaled-loss"]),
        event("overflow", step=1, first=[origin("of.the.first.attempt", 0)]),
        b"damaged\n",
        # Killed half-way through a line: the next attempt's start is written behind it.
        b'{"event": "overflow", "st',
    ]
    run = numerics_history.read(make(steps, [*old, event("start", attempt="0002")]))
    assert (run.repairs, [move.why for move in run.moves], run.gradients) == ([], ["overflow"], None)


def test_half_a_last_line_is_of_a_run_that_is_writing_it(make: MakeRun) -> None:
    whole, half = json.dumps(step(2, 65536.0)).encode(), b'{"step": 3, "loss": 3.\xc3'
    assert len(numerics_history.read(make([step(1, 65536.0), whole + b"\n", half], name="half")).steps) == 2
    assert len(numerics_history.read(make([step(1, 65536.0), whole], name="whole but for its end")).steps) == 2
    events = [event("start", attempt="0001"), b'{"event": "repaired", "repa']
    assert numerics_history.read(make([step(1, 65536.0)], events, name="events")).repairs == []


NO_LOSS = {key: value for key, value in step(2, 65536.0).items() if key != "loss"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b'{"step": 2, "lo\n', "Unterminated string"),
        (b"\n", "Expecting value"),
        (b'{"step": \xff\n', "it is not UTF-8 at byte"),
        (b"[2]\n", "it is no object"),
        (NO_LOSS, "it has no loss"),
    ],
    ids=["cut", "empty", "not UTF-8", "a list", "without a loss"],
)
def test_a_damaged_line_is_named(make: MakeRun, damage: Any, reason: str) -> None:
    path = make([step(1, 65536.0), damage, step(3, 65536.0)])
    with pytest.raises(RequestError) as caught:
        numerics_history.read(path)
    assert caught.value.what.startswith("metrics.jsonl is damaged in line 2: ")
    assert reason in caught.value.what
    assert caught.value.where == f"{path / 'metrics.jsonl'}:2"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"nonsense\n", "Expecting value"),
        ({"step": 1}, "it has no event"),
        ({"event": "numerics", "step": 1, "scale": 1.0}, "it has no layers"),
        ({"event": "repaired"}, "it has no repairs"),
    ],
    ids=["nonsense", "no event", "no layers", "no repairs"],
)
def test_a_damaged_event_is_named_by_its_line_in_the_whole_file(make: MakeRun, damage: Any, reason: str) -> None:
    starts = [event("start", attempt="0001"), event("done", step=1), event("start", attempt="0002")]
    path = make([step(1, 65536.0)], [*starts, damage, event("done", step=1)])
    with pytest.raises(RequestError) as caught:
        numerics_history.read(path)
    assert caught.value.what.startswith("events.jsonl is damaged in line 4: ")
    assert reason in caught.value.what
    assert caught.value.where == f"{path / 'events.jsonl'}:4"


def test_json_holds_every_move_and_every_reading(make: MakeRun, show: Show) -> None:
    path = make(FP16_STEPS, FP16_EVENTS)
    code, printed, _ = show(path, "--json")
    assert code == 0
    no_event = {"overflow": None, "loss_not_finite": None}
    assert json.loads(printed) == {
        "run": str(path),
        "model": "gpt2-nano",
        "precision": "fp16",
        "zero": 2,
        "steps": 6,
        "planned_steps": 6,
        "loss_scale_first": 262144.0,
        "loss_scale_last": 131072.0,
        "skipped_steps": 3,
        "repairs": ["false-optimizer-step", "unscaled-loss"],
        "diverged": False,
        "moves": [
            {
                "step": 1,
                "before": 262144.0,
                "after": 262144.0,
                "skipped": True,
                "loss_finite": True,
                "why": "overflow in h.1.mlp.weight on rank 0",
                "overflow": FP16_EVENTS[2],
                "loss_not_finite": None,
            },
            {
                "step": 2,
                "before": 262144.0,
                "after": 131072.0,
                "skipped": True,
                "loss_finite": False,
                "why": "overflow in the sum over micro-steps or ranks; "
                "loss not finite on rank 1, first in transformer.h.1.attn",
                "overflow": FP16_EVENTS[3],
                "loss_not_finite": FP16_EVENTS[4],
            },
            {"step": 3, "before": 131072.0, "after": 65536.0, "skipped": True, "loss_finite": True, "why": "overflow"}
            | no_event,
            {"step": 5, "before": 65536.0, "after": 131072.0, "skipped": False, "loss_finite": True, "why": "grown"}
            | no_event,
        ],
        "gradients": {
            "steps": [2, 4],
            "scales": [262144.0, 65536.0],
            "layers": ["transformer.wte", "transformer.h.0", "transformer.h.1"],
            "elements": [300, 100, 100],
            "grad_max": [[0.013, 0.013], [None, 0.013], [0.013, 2.5]],
            "zero": [[0.25, 0.5], [None, 0.0], [0.0, 0.0]],
            "underflow_unscaled": [[0.5, 0.41], [None, 0.0], [0.25, 0.1]],
            "underflow_scaled": [[0.01, 0.0003], [None, 0.0], [0.125, 0.00002]],
        },
        "keep_fp32": ["transformer.h.1"],
        "picture": str(path / "numerics.png"),
    }


def test_json_of_a_run_without_readings_has_null_for_them(make: MakeRun) -> None:
    tree = numerics_history.to_dict(numerics_history.read(make([step(1, None)], precision="fp32")))
    assert (tree["gradients"], tree["moves"], tree["loss_scale_first"]) == (None, [], None)


def size_of(picture: bytes) -> tuple[int, int]:
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def test_the_picture_is_a_png_for_a_page_and_shorter_without_maps(make: MakeRun, tmp_path: Path, show: Show) -> None:
    assert show(make(FP16_STEPS, FP16_EVENTS))[0] == 0
    assert size_of((tmp_path / "demo" / "numerics.png").read_bytes()) == (1500, 1350)
    other = tmp_path / "elsewhere.PNG"
    code, printed, _ = show(make(FP16_STEPS, name="off"), "--out", other)
    assert (code, printed.splitlines()[-1]) == (0, f"picture {other}")
    assert size_of(other.read_bytes()) == (1500, 675)
    assert not (tmp_path / "off" / "numerics.png").exists()


@pytest.mark.parametrize("name", ["it's $5_{ $x^{", "\u8fd0\u884c"], ids=["mathematics", "no glyph"])
def test_a_run_may_have_any_name(make: MakeRun, name: str) -> None:
    run = numerics_history.read(make(FP16_STEPS, FP16_EVENTS, name=name))
    assert size_of(plots.png(run)) == (1500, 1350)
    assert plots.draw(run).get_suptitle() == f"{name}: gpt2-nano, fp16, zero=2"


def test_the_title_is_the_folder_s_name_also_for_a_dot(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(FP16_STEPS))
    assert plots.draw(numerics_history.read(Path("."))).get_suptitle() == "demo: gpt2-nano, fp16, zero=2"


def test_the_picture_does_not_depend_on_somebody_s_style_nor_change_it(make: MakeRun) -> None:
    run = numerics_history.read(make(FP16_STEPS, FP16_EVENTS))
    picture = plots.png(run)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert plots.png(run) == picture
        assert matplotlib.rcParams["font.size"] == 30


def map_of(panel: Axes) -> QuadMesh:
    (mesh,) = (drawn for drawn in panel.collections if isinstance(drawn, QuadMesh))
    return mesh


def line_of(panel: Axes, label: str) -> Line2D:
    (line,) = (drawn for drawn in panel.lines if str(drawn.get_label()).startswith(label))
    return line


def points_of(panel: Axes, label: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line_of(panel, label).get_xydata())]


def labels_of(panel: Axes) -> list[str]:
    return [label.get_text() for label in panel.get_yticklabels()]


def test_the_scale_is_a_staircase_with_its_skipped_steps_on_it(make: MakeRun) -> None:
    top, loss, *_ = plots.draw(numerics_history.read(make(FP16_STEPS, FP16_EVENTS))).axes
    stairs = top.lines[0]
    # The scale of step 4 holds from 3 to 4.
    assert stairs.get_drawstyle() == "steps-pre"
    assert list(stairs.get_xdata()) == [0, 1, 2, 3, 4, 5, 6]
    assert [y / 65536 for y in np.asarray(stairs.get_ydata())] == [4, 4, 4, 2, 1, 1, 2]
    assert top.get_yscale() == "log"
    assert top.get_ylim() == (16384, 1048576)
    assert top.get_xlim() == (0, 6)
    assert points_of(top, "skipped (3)") == [(1, 262144), (2, 262144), (3, 131072)]
    assert line_of(top, "skipped").get_marker() == "x"
    for panel in (top, loss):
        assert points_of(panel, "loss not finite (1)") == [(2, 0.93)]
        assert line_of(panel, "loss not finite").get_marker() == "v"
    assert points_of(loss, "validation") == [(0, 4.1), (4, 3.5)]
    drawn = np.asarray(line_of(loss, "training").get_ydata())
    assert [round(float(y), 3) for y in drawn if not np.isnan(y)] == [3.9, 3.7, 3.6, 3.5, 3.4]
    assert np.isnan(drawn[1])


def test_without_a_scale_the_gradient_norm_stands_in_its_place(make: MakeRun) -> None:
    steps = [step(1, None, grad_norm=2.0), step(2, None, 1, **SKIPPED), step(3, None, 1, grad_norm=0.5)]
    top, loss = plots.draw(numerics_history.read(make(steps, precision="bf16"))).axes
    assert top.get_title("left") == "No loss scale in bf16: gradient norm before clipping"
    drawn = [float(y) for y in np.asarray(top.lines[0].get_ydata())]
    assert (drawn[0], np.isnan(drawn[1]), drawn[2]) == (2.0, True, 0.5)
    assert points_of(top, "skipped (1)") == [(2, 0.08)], "at the panel's foot, for want of a norm"
    assert loss.get_xlabel() == "optimizer step"


def test_a_run_whose_every_number_is_lost_is_drawn(make: MakeRun) -> None:
    steps = [step(n, None, loss=None, grad_norm=None) for n in (1, 2)]
    nothing = reading(2, 65536.0, wte=layer(0.0, 0.0, grad_max=None))
    assert size_of(plots.png(numerics_history.read(make(steps, [nothing], precision="fp32")))) == (1500, 1350)


def test_the_maps_have_layers_in_model_order_from_the_top_and_steps_from_the_left(make: MakeRun) -> None:
    figure = plots.draw(numerics_history.read(make(FP16_STEPS, FP16_EVENTS)))
    unscaled, scaled = figure.axes[2:4]
    unknown = -1  # a gradient was not finite
    for panel, shares in (
        (unscaled, [[0.5, 0.41], [unknown, 0], [0.25, 0.1]]),
        (scaled, [[0.01, 3e-4], [unknown, 0], [0.125, 2e-5]]),
    ):
        mesh = map_of(panel)
        drawn = np.ma.filled(mesh.get_array(), unknown)
        assert np.where((drawn > 0) & (drawn < 1e-5), 0, drawn).tolist() == shares
        corners = mesh.get_coordinates()
        assert corners[0, :, 0].tolist() == [0, 2, 4], "a reading's cell ends at its step"
        assert corners[:, 0, 1].tolist() == [-0.5, 0.5, 1.5, 2.5]
        assert panel.get_ylim() == (2.5, -0.5), "the first layer is on top"
        assert panel.get_xlim() == (0, 6)
        assert labels_of(panel) == ["wte", "h.0", "h.1"]
    assert unscaled.get_title("left") == "Gradient elements lost in fp16 without scaling: 26.60 % of all at step 4"
    assert (
        scaled.get_title("left") == "Gradient elements lost in fp16 at the step's loss scale: 0.02 % of all at step 4"
    )
    assert scaled.get_xlabel() == "optimizer step (hatched: gradients not finite)"


def colours_of(figure: Figure, panel: int) -> list[list[tuple[float, ...]]]:
    """Return the colour of every cell, by row."""
    mesh = map_of(figure.axes[panel])
    shares = mesh.get_array()
    assert shares is not None
    return [[tuple(cell) for cell in row] for row in mesh.to_rgba(shares)]


def test_zero_is_white_small_is_not_and_what_is_not_known_is_hatched(make: MakeRun) -> None:
    shares = {"h_0": 0.0, "h_1": 1e-9, "h_2": 1e-4, "h_3": 0.01, "h_4": 0.5, "h_5": 1.0}
    first = reading(1, 1.0, **{name: layer(share, 1 - share) for name, share in shares.items()})
    second = reading(2, 1.0, h_0=layer(0.0, 0.0))
    figure = plots.draw(numerics_history.read(make([step(1, 1.0), step(2, 1.0)], [first, second])))
    colours = colours_of(figure, 2)
    ladder = [row[0] for row in colours]
    assert ladder[0] == (1, 1, 1, 1)
    luminance = [0.21 * red + 0.72 * green + 0.07 * blue for red, green, blue, _ in ladder]
    assert all(above - below > 0.05 for above, below in itertools.pairwise(luminance)), "each darker"
    assert all(row[1][3] == 0 for row in colours[1:]), "clear, so that the hatches show"
    assert figure.axes[2].patch.get_hatch() == "////"
    assert colours_of(figure, 3)[5][0] == ladder[0], "both maps have the same colours"
    assert colours_of(figure, 3)[0][0] == ladder[5]


def test_the_colour_bar_is_in_percent_and_shows_zero(make: MakeRun) -> None:
    bar = plots.draw(numerics_history.read(make(FP16_STEPS, FP16_EVENTS))).axes[4]
    assert labels_of(bar) == ["0.001", "0.01", "0.1", "1", "10", "100"]
    assert [text.get_text() for text in bar.texts] == ["0"]
    assert bar.get_ylabel() == "percent of the layer's gradient elements"


def test_of_many_layers_some_are_named_the_first_and_the_last_among_them(make: MakeRun) -> None:
    names = ["wte", "wpe", *(f"h_{n}" for n in range(96)), "ln_f"]
    layers = {name: layer(0.5, 0.0) for name in names}
    run = numerics_history.read(make([step(1, 1.0)], [reading(1, 1.0, **layers)]))
    named = labels_of(plots.draw(run).axes[2])
    assert (named[0], named[1], named[-1], len(named)) == ("wte", "h.5", "ln.f", 16)


def test_names_lose_what_all_share_and_long_ones_their_beginning(make: MakeRun) -> None:
    layers = {name: layer(0.5, 0.0) for name in ("a.b.one", "a.b.two.x", "a.b.a_very_long_name_of_a_layer.7")}
    measured = event("numerics", step=1, scale=1.0, layers=layers)
    run = numerics_history.read(make([step(1, 1.0)], [measured]))
    assert labels_of(plots.draw(run).axes[2]) == ["one", "two.x", "\u2026_long_name_of_a_layer.7"]


def three_lines(said: str) -> list[str]:
    lines = said.splitlines()
    assert [line.partition(":")[0].strip() for line in lines] == ["error", "from", "try"], said
    return [line.partition(": ")[2] for line in lines]


def test_a_folder_that_is_no_run_is_refused(show: Show, tmp_path: Path) -> None:
    code, printed, said = show(tmp_path)
    assert (code, printed) == (2, "")
    fix = "name a directory made by `halfstep run` or `launcher/train.py`"
    assert three_lines(said) == [f"{tmp_path} is not a run directory", f"halfstep numerics {tmp_path}", fix]
    missing = tmp_path / "missing"
    code, _, said = show(missing)
    assert code == 2
    assert three_lines(said)[0] == f"{missing} is not a run directory: there is no such folder"


def test_a_run_without_metrics_or_steps_is_told_to_wait_for(make: MakeRun, show: Show) -> None:
    for name, rows in (("empty", []), ("evaluated", [evaluation(0, 8.0)]), ("writing", [b'{"step": 1, "lo'])):
        path = make(rows, name=name)
        code, printed, said = show(path)
        assert (code, printed) == (2, "")
        assert three_lines(said) == [
            f"{path} has not made a step yet",
            str(path / "metrics.jsonl"),
            "look again once the run has made one",
        ]
    (path / "metrics.jsonl").unlink()
    code, _, said = show(path)
    assert code == 2
    assert three_lines(said)[0] == f"{path} has no metrics.jsonl: its training has not begun"


def test_a_damaged_plan_is_named(make: MakeRun, show: Show) -> None:
    path = make(FP16_STEPS)
    (path / "plan.json").write_text("{")
    code, _, said = show(path)
    assert code == 2
    assert three_lines(said)[0].startswith("plan.json is damaged: ")
    assert three_lines(said)[1] == str(path / "plan.json")


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "plan.json"])
def test_a_file_that_cannot_be_read_is_named(make: MakeRun, show: Show, name: str) -> None:
    path = make(FP16_STEPS, FP16_EVENTS)
    (path / name).unlink()
    (path / name).mkdir()  # what root cannot read either
    code, _, said = show(path)
    assert code == 2
    assert three_lines(said) == [
        f"{path / name} cannot be read: Is a directory",
        str(path / name),
        "check its permissions",
    ]


def test_a_picture_that_cannot_be_written_leaves_the_rest_told(make: MakeRun, show: Show) -> None:
    path = make(FP16_STEPS, FP16_EVENTS)
    (path / "numerics.png").mkdir()  # as good as a directory that nobody may write to, for root too
    code, printed, said = show(path)
    assert code == 2
    assert printed.splitlines() == numerics_report.lines(numerics_history.read(path))
    assert three_lines(said) == [
        "the picture cannot be written: Is a directory",
        str(path / "numerics.png"),
        "name another file: --out FILE.png",
    ]
    code, printed, _ = show(path, "--json")
    assert (code, json.loads(printed)["picture"]) == (2, None)


def test_a_picture_of_another_kind_is_refused(make: MakeRun, show: Show, tmp_path: Path) -> None:
    code, _, said = show(make(FP16_STEPS), "--out", tmp_path / "plot.pdf")
    assert code == 2
    assert three_lines(said)[0] == "the picture is a PNG, not plot.pdf"
    assert not (tmp_path / "plot.pdf").exists()


def test_other_verbs_do_not_load_matplotlib() -> None:
    program = (
        "import sys, halfstep.launcher.cli.main, halfstep.launcher.metrics.numerics_history\n"
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(main.__file__).parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr
