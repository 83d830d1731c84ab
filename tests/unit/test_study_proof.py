"""What a run of a study is told of the parity gate's verdict, and what the gate is asked to run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher import topology
from halfstep.launcher.parity import gate, verdict
from halfstep.launcher.parity.cases import Case, cases_of, default_cases
from halfstep.launcher.parity.cell import offload_of
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.study import proof, run_status

Make = Callable[..., Plan]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def know(cases: list[Case], *, ok: bool = True) -> None:
    verdict.store(topology.describe(1, 1), [{**vars(case), "ok": ok} for case in cases])


def runnable(plan: Plan) -> list[Case]:
    ranks = topology.default_ranks_per_node()
    return [case for case in cases_of(plan.zero, plan.precision, offload_of(plan)) if case.world_size <= ranks]


def test_a_cell_is_proved_when_all_its_cases_are(plan: Make, tmp_path: Path) -> None:
    cell = plan("zero=2", "precision=bf16")
    assert proof.needed([cell, cell]) == runnable(cell)
    assert proof.tell(tmp_path, cell)["proved"] is None
    know(runnable(cell)[1:])
    assert proof.needed([cell]) == runnable(cell)[:1]
    know(runnable(cell)[:1])
    assert proof.needed([cell]) == []
    record = proof.tell(tmp_path, cell)
    assert (record["proved"], record["refused"], record["cases"]) == (True, None, len(runnable(cell)))
    assert json.loads((tmp_path / "proof.json").read_text())["conditions"]["versions"]["deepspeed"]
    assert proof.tell(tmp_path, plan("zero=3", "precision=bf16"))["proved"] is None, "another cell is not proved by it"


def test_one_case_that_fails_takes_the_proof_away(plan: Make, tmp_path: Path) -> None:
    cell = plan("zero=0", "precision=fp16")
    know(runnable(cell))
    know(runnable(cell)[-1:], ok=False)
    record = proof.tell(tmp_path, cell)
    assert (record["proved"], record["reason"]) == (False, "the parity gate found that it trains another model")


def test_stage_0_in_half_precision_without_repairs_is_never_proved(plan: Make, tmp_path: Path) -> None:
    bare = plan("zero=0", "precision=bf16", "numerics.repairs=false")
    know(runnable(bare))
    assert proof.needed([bare]) == []
    assert proof.tell(tmp_path, bare)["proved"] is False
    full = plan("zero=0", "precision=fp32", "numerics.repairs=false")
    know(runnable(full))
    assert proof.tell(tmp_path, full)["proved"] is True, "fp32 needs no repair"


def test_offload_runs_only_where_the_gate_holds_for_it(plan: Make, tmp_path: Path) -> None:
    cell = plan("zero=2", "precision=bf16", "offload=optimizer-cpu")
    know(cases_of(2, "bf16", "none"))
    refused = proof.tell(tmp_path, cell)["refused"]
    assert refused.startswith("offload-proved-here: offload=optimizer-cpu is not proved")
    row = {"run": ".", "refused": None}
    assert (run_status.of(row, tmp_path).status, run_status.of(row, tmp_path).reason) == ("refused", refused)
    know(runnable(cell))
    assert proof.tell(tmp_path, cell)["refused"] is None


def test_the_gate_runs_what_is_missing_and_keeps_what_it_finds(
    plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Case]] = []

    def verify(cases: list[Case], *, repairs: bool, quiet: bool) -> gate.Outcome:
        asked.append(cases)
        cells = [{**vars(case), "ok": case.offload == "none"} for case in cases]
        return gate.Outcome(cells=cells, not_run=[], seconds=1.0, repairs=repairs)

    monkeypatch.setattr(gate, "verify", verify)
    cells = [plan("zero=1", "precision=fp32"), plan("zero=2", "precision=fp32", "offload=optimizer-cpu")]
    said: list[str] = []
    proof.run(cells, said.append)
    assert [{case.offload for case in cases} for cases in asked] == [{"none"}, {"optimizer-cpu"}]
    assert [proof.tell(tmp_path, cell)["proved"] for cell in cells] == [True, False]
    proof.run(cells, said.append)
    assert len(asked) == 2, "nothing is asked twice"


def test_cases_of_a_cell_are_those_of_the_gate(plan: Make) -> None:
    assert set(cases_of(0, "fp16", "none")) == {
        case for case in default_cases() if (case.zero, case.precision) == (0, "fp16")
    }
    assert {case.world_size for case in cases_of(3, "bf16", "cpu")} == {1, 2}
