"""The gate's own logic: which cases there are, and what counts as the same."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfstep.launcher.errors import Fault, RefusedError, RequestError
from halfstep.launcher.parity import cases, distance, gate, verdict
from halfstep.launcher.parity.cases import Case
from halfstep.launcher.parity.trial import Series
from halfstep.launcher.topology import Topology

CASE = Case(zero=2, precision="bf16", accumulation=1, clip=0.0, world_size=1, optimizer="adamw", family="gpt2")
CPU = Topology(world_size=1, ranks_per_node=1, accelerator="cpu")


def series(**changed) -> Series:
    same = {
        "loss": [2.0, None, 1.0],
        "grad_norm": [1.0, None, 1.0],
        "loss_scale": [8.0, 8.0, 4.0],
        "skipped": [False, True, False],
        "first_update": torch.tensor([3.0, 4.0]),
        "optimizer_steps": 1.0,
    }
    return Series(**{**same, **changed})


def test_every_combination_is_there_once() -> None:
    every = cases.every_case()
    assert len(every) == len(set(every)) == 12 * 2 * 2 * 2 * 2 * 2 + 12 + 12 + 12 + 16 + 57 + 6 * 12 + 2 * 2 * 12
    for name, values in {
        "zero": {0, 1, 2, 3},
        "precision": {"fp32", "fp16", "bf16", "fp16-autocast", "bf16-autocast"},
        "accumulation": {1, 2},
        "clip": {0.0, cases.BINDING_CLIP},
        "world_size": {1, 2},
        "optimizer": {"adamw", "sgd"},
        "family": {"gpt2", "llama"},
    }.items():
        also = {"optimizer": {"adagrad", "muon"}, "family": {"qwen2", "qwen3_moe"}}.get(name, set())
        assert {getattr(case, name) for case in every} == values | also
        for cell in {(case.zero, case.precision) for case in every if case.precision in cases.GRID}:
            met = {getattr(c, name) for c in cases.default_cases() if (c.zero, c.precision) == cell}
            assert name in ("zero", "precision") or met == values, f"the default subset never varies {name} in {cell}"
    assert sum(case.activation_checkpointing for case in every) == 12
    assert len({(case.zero, case.precision) for case in every if case.compile}) == 12
    assert not any(case.compile for case in cases.default_cases()), "a compiler takes longer than the rest of them"
    assert set(cases.default_cases()) <= set(every)


def test_a_selection_keeps_what_every_word_admits_and_refuses_what_nothing_does() -> None:
    kept = cases.select(cases.every_case(), ["zero=0|3", "precision=fp16", "activation_checkpointing=true"])
    assert [(case.zero, case.precision) for case in kept] == [(0, "fp16"), (3, "fp16")]
    with pytest.raises(RequestError) as caught:
        cases.select(cases.every_case(), ["precison=fp16"])
    assert caught.value.fix == "did you mean precision?"
    with pytest.raises(RequestError) as caught:
        cases.select(cases.every_case(), ["zero=4"])
    assert caught.value.fix == "zero is 1 or 0 or 2 or 3"
    assert {case.clip for case in cases.select(cases.every_case(), ["clip=0"])} == {0.0}


def test_equal_series_do_not_deviate() -> None:
    deviations = distance.deviations(CASE, series(), series(), "oracle")
    assert [deviation.measure for deviation in deviations] == [
        "loss",
        "grad_norm",
        "loss_scale",
        "skipped",
        "optimizer_steps",
        "first_update",
    ]
    assert all(deviation.ok and deviation.value == 0 for deviation in deviations)


@pytest.mark.parametrize(
    ("changed", "measure", "value", "step"),
    [
        ({"loss": [2.0, None, 1.002]}, "loss", 0.002, 3),
        ({"loss": [2.0, 1.0, 1.0]}, "loss", 1.0, 2),
        ({"loss": [2.0, None, float("nan")]}, "loss", 1e9, 3),
        ({"grad_norm": [1.05, None, 1.0]}, "grad_norm", 0.05, 1),
        ({"loss_scale": [8.0, 4.0, 4.0]}, "loss_scale", 1, 2),
        ({"skipped": [False, False, False]}, "skipped", 1, 2),
        ({"optimizer_steps": 2.0}, "optimizer_steps", 1, 1),
        ({"first_update": torch.tensor([3.0, 4.5])}, "first_update", 0.1, 1),
        ({"first_update": torch.tensor([3.0, float("nan")])}, "first_update", 1e9, 1),
    ],
)
def test_a_difference_is_found_in_its_measure_and_step(changed: dict, measure: str, value: float, step: int) -> None:
    deviations = distance.deviations(CASE, series(**changed), series(), "stage 1")
    (bad,) = [deviation for deviation in deviations if not deviation.ok]
    assert (bad.measure, bad.against, bad.step) == (measure, "stage 1", step)
    assert bad.value == pytest.approx(value, rel=1e-6)
    assert distance.worst(deviations) == bad


def test_a_count_that_differs_never_hides_how_far_the_runs_are_apart() -> None:
    deviations = distance.deviations(CASE, series(optimizer_steps=2.0, loss=[2.0, None, 1.5]), series(), "oracle")
    assert distance.worst(deviations).measure == "loss"


def test_fp32_has_more_room_where_two_ranks_add_in_another_order() -> None:
    apart = series(loss=[2.0, None, 1.00005])
    alone, pair = (replace(CASE, precision="fp32", world_size=size) for size in (1, 2))
    assert not distance.deviations(alone, apart, series(), "oracle")[0].ok
    assert distance.deviations(pair, apart, series(), "oracle")[0].ok


def test_documents_apart_have_more_room_against_the_reference_alone() -> None:
    turned = series(first_update=torch.tensor([3.0, 4.25]))  # 0.05 apart, as of half precision
    judged = {
        (documents, against): distance.deviations(replace(CASE, documents=documents), turned, series(), against)[-1].ok
        for documents in ("plain", "masked")
        for against in (distance.ORACLE, distance.STAGE_1)
    }
    assert [key for key, ok in judged.items() if ok] == [("masked", distance.ORACLE)]


def test_muon_is_judged_by_tolerances_of_its_own_and_clipping_after_it_fails() -> None:
    muon = replace(CASE, optimizer="muon", zero=0, precision="fp32")
    within = series(loss=[2.0, None, 1.00005], first_update=torch.tensor([3.0, 4.04]))
    assert all(deviation.ok for deviation in distance.deviations(muon, within, series(), "oracle"))
    assert not all(
        deviation.ok for deviation in distance.deviations(replace(muon, optimizer="sgd"), within, series(), "oracle")
    )
    clipped = distance.deviations(muon, series(loss=[2.0, None, 1.014]), series(), "oracle")
    assert [deviation.measure for deviation in clipped if not deviation.ok] == ["loss"]


def _cell(case: Case, *, ok: bool) -> dict:
    deviations = distance.deviations(case, series(loss=[2.0, None, 1.0 if ok else 1.5]), series(), "oracle")
    rows = [{**vars(deviation), "ok": deviation.ok} for deviation in deviations]
    worst = distance.worst(deviations)
    return {
        **vars(case), "ok": ok, "deviations": rows, "worst": worst.value, "tolerance": worst.tolerance,
        "measure": worst.measure, "against": worst.against, "step": worst.step,
    }  # fmt: skip


def test_the_table_names_the_cell_the_gap_and_the_case() -> None:
    cells = [_cell(CASE, ok=True), _cell(replace(CASE, zero=0), ok=False)]
    lines = gate.table(gate.Outcome(cells=cells, not_run=[], seconds=12.4, repairs=False))
    assert [line.split()[-1] for line in lines[1:3]] == ["FAIL", "ok"]
    assert "5.0e-01 / 3e-04" in lines[1]
    assert lines[4] == (
        "FAIL zero=0 precision=bf16, gpt2 adamw, accumulation 1, no clip, 1 rank: "
        "loss 0.5 (tolerance 0.0003) against oracle at step 3"
    )
    assert lines[-1] == "1 of 2 cases train the same model in 12 s, without repairs: DeepSpeed as it is"


def test_no_condition_of_a_case_shares_its_verdict_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other: dict[str, object] = {"zero": 0, "precision": "bf16", "accumulation": 3, "clip": 0.7, "world_size": 4}
    other |= {"optimizer": "sgd", "family": "llama", "activation_checkpointing": True, "offload": "cpu"}
    other |= {
        "compile": True,
        "fused_head": True,
        "keep_fp32": ("ln_f",),
        "documents": "masked",
        "lora": ("lora.rank=4",),
        "keys": ("ds.x=1",),
        "config": "{}",
        "router_loss": 0.01,
    }
    assert set(other) == set(Case.__dataclass_fields__), "a new field has to be told apart, too"
    plain = Case(zero=1, precision="fp32", accumulation=1, clip=0.0, world_size=1, optimizer="adamw", family="gpt2")
    verdict.store(CPU, [_cell(plain, ok=True)])
    for name, value in other.items():
        assert verdict.proved(CPU, [vars(replace(plain, **{name: value}))]) is None, name  # type: ignore[arg-type]


def test_a_verdict_is_kept_with_its_conditions(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    both = [vars(CASE), vars(replace(CASE, family="llama"))]
    assert verdict.proved(CPU, both) is None
    kept = verdict.store(CPU, [_cell(CASE, ok=True)])
    assert verdict.proved(CPU, both[:1]) is True
    assert verdict.proved(CPU, both) is None, "one of the two was not run"
    verdict.store(CPU, [_cell(replace(CASE, family="llama"), ok=False)])
    assert verdict.proved(CPU, both) is False
    verdict.store(CPU, [_cell(replace(CASE, family="llama"), ok=True)])
    assert verdict.proved(CPU, both) is True, "a later result replaces the earlier one of the same case"
    assert len(verdict.read(CPU)) == 2
    assert verdict.proved(replace(CPU, accelerator="cuda", device_name="NVIDIA H100"), both) is None
    monkeypatch.setattr(verdict, "version", lambda name: "0.0")
    assert verdict.proved(CPU, both) is None, "other versions are another question"
    assert kept.parent == tmp_path / "halfstep" / "verdicts"


def test_a_run_that_ended_early_has_no_first_update_and_fails() -> None:
    deviations = distance.deviations(CASE, series(first_update=None), series(), "oracle")
    assert [deviation.measure for deviation in deviations if not deviation.ok] == ["first_update"]


def test_more_ranks_than_devices_is_refused_and_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.topology, "default_ranks_per_node", lambda: 1)
    with pytest.raises(RefusedError, match="all 1 cases need more ranks than the 1 that can run here"):
        gate.verify([replace(CASE, world_size=2)], repairs=True, quiet=True)


def test_a_worker_that_is_killed_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(gate, "_command", lambda job, size: [sys.executable, "-c", kill])
    with pytest.raises(Fault, match="ended by signal 9 before it had reported"):
        gate.verify([CASE], repairs=True, quiet=True)
