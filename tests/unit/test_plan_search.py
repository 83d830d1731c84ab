"""The search: what it tries, how it ranks, what it prints and refuses."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from halfstep.launcher.cli.main import main
from halfstep.launcher.forecast import hardware, search, step_time, time_table
from halfstep.launcher.forecast.calibration import Calibration
from halfstep.launcher.forecast.search import Start
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Topology

Make = Callable[..., Plan]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "search-gpt2-1.5b.txt"
H100 = hardware.find("H100")
TWO_NODES = Topology(world_size=16, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")


@dataclass(frozen=True)
class Fake:
    """A forecast of memory: weights by stage, activations by micro-batch."""

    peak_bytes: int

    def verdict(self, capacity_bytes: int | None) -> str | None:
        if capacity_bytes is None:
            return None
        return "fits" if self.peak_bytes <= capacity_bytes else "does not fit"


def needs(workload: Workload) -> Fake:
    activations = workload.micro * (2**30 if workload.activation_checkpointing else 8 * 2**30)
    return Fake(workload.parameters * (16 if workload.zero < 3 else 2) + activations)


def starts(plan: Make) -> list[Start]:
    starts = []
    for zero in (1, 2, 3):
        planned = plan("model=gpt2-1.5b", "batch.global=256", f"zero={zero}", topology=TWO_NODES)
        starts.append(Start(nodes=2, offload="none", workload=estimate.workload_of(planned)))
    return starts


def test_every_micro_batch_that_divides_is_tried_with_and_without_checkpointing(plan: Make) -> None:
    tried = list(search.candidates(starts(plan)[:1]))
    sizes = [(workload.micro, workload.accumulation, workload.activation_checkpointing) for _, workload in tried]
    assert sizes == [(m, 16 // m, again) for m in (1, 2, 4, 8, 16) for again in (False, True)]
    pinned = Start(nodes=2, offload="none", workload=starts(plan)[0].workload, micro=4, checkpointing=True)
    assert [(workload.micro, workload.activation_checkpointing) for _, workload in search.candidates([pinned])] == [
        (4, True)
    ]


def test_what_fits_comes_first_and_the_fastest_of_it_is_on_the_frontier(plan: Make) -> None:
    candidates = search.search(starts(plan), H100, 40 * 2**30, needs)
    assert len(candidates) == 30
    fits = [candidate.fits for candidate in candidates]
    assert fits == sorted(fits, reverse=True)
    assert any(fits)
    assert not all(fits)
    best = search.frontier(candidates)
    assert best[0] == candidates[0]
    for candidate in best:
        assert candidate.fits
        assert not any(
            other.fits and other.step_seconds < candidate.step_seconds and other.peak_bytes < candidate.peak_bytes
            for other in candidates
        )


def test_without_a_capacity_nothing_is_said_to_fit_or_not(plan: Make) -> None:
    candidates = search.search(starts(plan), H100, None, needs)
    assert {candidate.verdict for candidate in candidates} == {None}
    assert all(candidate.fits for candidate in candidates)


def test_the_table_of_a_search_is_the_recorded_one(plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shipped numbers move with every calibration; the unfitted ones do not.
    monkeypatch.setattr(step_time, "shipped", lambda accelerator: Calibration())
    candidates = search.search(starts(plan), H100, 40 * 2**30, needs)
    text = "\n".join(time_table.candidates(candidates)) + "\n"
    if os.environ.get("ACCEPT_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    heard = capsys.readouterr()
    return code, heard.out, heard.err


def test_the_command_searches_nodes_and_keeps_what_is_pinned(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--search", "--json", "model=gpt2-1.5b", f"data={corpus}", "hardware=H100", "nodes=1,2", "gpus=8"]
    code, out, _ = say(capsys, *arguments, "batch.global=64", "zero=2")
    tree = json.loads(out)
    assert code == 0
    assert tree["hardware"] == "h100"
    assert {candidate["zero"] for candidate in tree["candidates"]} == {2}
    assert {candidate["ranks"] for candidate in tree["candidates"]} == {8, 16}
    assert {candidate["offload"] for candidate in tree["candidates"]} == {"none", "optimizer-cpu"}
    assert all(
        candidate["micro"] * candidate["accumulation"] * candidate["ranks"] == 64 for candidate in tree["candidates"]
    )
    assert tree["frontier"][0]["step_seconds"] == min(
        candidate["step_seconds"] for candidate in tree["candidates"] if candidate["verdict"] == "fits"
    )


def test_the_words_of_the_fastest_make_that_plan(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=gpt2-124m", f"data={corpus}", "hardware=A100", "batch.global=64"]
    _, out, _ = say(capsys, "--search", "--json", *arguments, "nodes=1", "gpus=8")
    best = json.loads(out)["candidates"][0]
    _, out, _ = say(capsys, "--json", *arguments, *best["words"])
    assert json.loads(out)["time"]["step_seconds"] == pytest.approx(best["step_seconds"])


def test_a_default_batch_that_does_not_divide_is_no_obstacle(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--search", "model=gpt2-124m", f"data={corpus}", "hardware=H100", "nodes=128", "gpus=8"]
    code, out, _ = say(capsys, *arguments)
    assert code == 0
    assert "the fastest: nodes=128 gpus_per_node=8" in out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--search", "nodes=0"], "nodes=0: '0' is not a whole number from 1 on"),
        (["--search", "nodes=1", "gpus=8,x"], "gpus=8,x: 'x' is not a whole number from 1 on"),
        (["nodes=0"], "nodes=0: input should be greater than or equal to 1"),
        (["--price", "cheap"], "--price 'cheap' is not a price"),
        (["--time-limit", "soon"], "--time-limit: 'soon' is no SLURM time, such as 90, 12:00:00 or 2-12"),
        (["--time-limit", "0"], "--time-limit is zero"),
        (["hardware=H1000"], "hardware=H1000 is not in the table"),
        (["--rows", "x.csv"], "--rows belongs to `plan score`"),
    ],
)
def test_a_request_that_makes_no_sense_is_three_lines(
    corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    code, out, err = say(capsys, "model=gpt2-124m", f"data={corpus}", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {what}\n from: ")
    assert len(err.splitlines()) == 3


def test_a_model_too_large_for_every_candidate_is_refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--search", "model=llama-70b", "model.vocabulary=128256", "sequence=2048", f"data={corpus}"]
    code, _, err = say(capsys, *arguments, "hardware=L40S", "nodes=1", "gpus=2", "offload=none")
    assert code == 3
    assert "fits a l40s; the least needs" in err


def test_price_and_time_limit_are_in_the_plan(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=gpt2-1.5b", f"data={corpus}", "hardware=H100", "nodes=2", "gpus_per_node=8", "batch.global=512"]
    code, out, _ = say(capsys, *arguments, "steps=10000", "--price", "2.5", "--time-limit", "12:00:00", "--json")
    assert code == 0
    time = json.loads(out)["time"]
    assert time["price"] == pytest.approx(2.5 * time["device_hours"])
    assert time["jobs"] == -(-(time["hours"] * 3600) // (12 * 3600 - 300))
    _, out, _ = say(capsys, *arguments, "steps=10000", "--price", "2.5", "--time-limit", "12:00:00")
    assert "jobs of 12 h, costs" in out or "job of 12 h, costs" in out
    assert "matrix products" in out
