"""What each DeepSpeed key does: the ledger is whole, and plans refuse, warn and ask the gate by it."""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher import topology
from halfstep.launcher.cli.main import main
from halfstep.launcher.config.load import load
from halfstep.launcher.parity import cases, gate, verdict
from halfstep.launcher.parity.cell import Question, question_of
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.ds import dskeys, effects
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.study import proof
from halfstep.launcher.topology import Topology
from tools import new_deepspeed

Make = Callable[..., Plan]
GPUS = Topology(world_size=8, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")
SINGLE = {name for name, entry in dskeys.KEYS.items() if entry["type"] != "section"}
ROOT = Path(str(importlib.util.find_spec("deepspeed").submodule_search_locations[0]))  # type: ignore[union-attr,index]


def rules(plan: Plan) -> dict[str, str]:
    return {broken["rule"]: broken["sentence"] for broken in plan.refused_by}


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    assert set(effects.rows()) == SINGLE
    counts = Counter(row["effect"] for row in effects.rows().values())
    assert set(counts) <= set(effects.MEANINGS)
    assert counts[effects.UNKNOWN] == 0


CITED = [
    (key, *place.split(":"))
    for key, row in effects.rows().items()
    for said in (row, *row.get("cases", ()))
    for place in re.findall(r"[\w/]+\.(?:py|cpp):\d+", said["reads"])
]


def test_every_row_cites_a_line_that_is_there() -> None:
    lengths: dict[str, int] = {}
    for key, file, line in CITED:
        if file not in lengths:
            assert (ROOT / file).is_file(), f"{key}: {file}"
            lengths[file] = len((ROOT / file).read_text().splitlines())
        assert 0 < int(line) <= lengths[file], f"{key}: {file}:{line}"
    assert {key for key, *_ in CITED} == SINGLE, "each row says where it is read"


def test_conditions_name_what_there_is() -> None:
    known = {"zero", "precision", "accelerator", "ranks", "value", "offload_optimizer", "offload_param", "keys"}
    known.add("scaled")
    for key, row in effects.rows().items():
        for case in row.get("cases", ()):
            assert case["when"], key
            assert set(case["when"]) <= known, key
            for other in case["when"].get("keys", {}):
                assert other in SINGLE or other.startswith("optimizer.params."), f"{key}: {other}"
        assert row["because"].endswith("."), key
        assert len(row["because"]) <= 200, key
        if row["effect"] in (effects.FATAL, effects.OWNED):
            assert row.get("instead"), key


def test_a_case_wins_over_its_row_and_the_first_over_the_next(plan: Make) -> None:
    key = "ds.zero_optimization.overlap_comm=true"
    kinds = {
        (zero, precision): effects.of("zero_optimization.overlap_comm", cell.setting()).kind
        for zero in range(4)
        for precision in ("fp32", "bf16")
        for cell in [plan(f"zero={zero}", f"precision={precision}", key, topology=GPUS)]
    }
    assert {cell for cell, kind in kinds.items() if kind == effects.INERT} == {(0, "fp32"), (0, "bf16"), (1, "bf16")}
    assert set(kinds.values()) == {effects.INERT, effects.SPEED}


def test_the_default_of_a_key_that_breaks_runs_breaks_none(plan: Make) -> None:
    assert rules(plan("zero=2", "ds.zero_optimization.round_robin_gradients=false")) == {}
    broken = rules(plan("zero=2", "ds.zero_optimization.round_robin_gradients=true"))
    assert "masters" in broken["key-is-fatal"].lower()


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["activation_checkpointing.profile=true", "tensor_parallel.tp.tp_size=2", "checkpoint.load_universal=true"]
)
def test_a_key_that_does_nothing_anywhere_is_refused_with_what_to_use_instead(plan: Make, key: str) -> None:
    (broken,) = plan(f"ds.{key}").refused_by
    assert broken["rule"] == "key-is-inert"
    assert broken["sentence"].startswith(f"{key.partition('=')[0]} does nothing: ")
    assert broken["where"].startswith("ds.")
    assert broken["fix"]


def test_a_plan_shows_what_each_key_does_and_a_refusal_in_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    asked_for = ["model=gpt2-nano", "model.vocabulary=64", "zero=2", "ds.tensor_parallel.tp.tp_size=2"]
    assert main(["plan", *asked_for]) == 2
    said = capsys.readouterr().out
    refused, origin, remedy = said.splitlines()[-3:]
    assert refused.startswith("REFUSED by rule key-is-inert: tensor_parallel.tp.tp_size does nothing: ")
    assert origin == "     from: ds.tensor_parallel.tp.tp_size from the command line"
    assert remedy.startswith("      try: drop it")
    assert "\\n" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("  zero_optimization.reduce_bucket_size ")]
    assert line.split("#")[1].split() == ["memory", "scaled", "to", "the", "model"]


def test_a_key_that_does_nothing_in_this_cell_is_warned_of_so_that_studies_can_pin_it(plan: Make) -> None:
    key = "ds.zero_optimization.overlap_comm=true"
    idle, busy = plan("zero=0", key, topology=GPUS), plan("zero=2", key, topology=GPUS)
    assert rules(idle) == rules(busy) == {}
    assert [line for line in idle.warnings if "overlap_comm" in line and "does nothing in this run" in line]
    assert not [line for line in busy.warnings if "overlap_comm" in line]


def test_a_file_may_hold_what_does_nothing_here_and_is_told_so(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "shared.json"
    file.write_text(json.dumps({"activation_checkpointing": {"partition_activations": True}, "train_batch_size": 8}))
    request = load(["model=gpt2-nano", f"data={corpus}", f"--ds-config={file}"])
    made = resolve(request, Topology(world_size=2, ranks_per_node=2, accelerator="cpu"), facts.read(request.spec))
    assert rules(made) == {}
    (line,) = [line for line in made.warnings if "partition_activations" in line]
    assert "from --ds-config shared.json does nothing in this run" in line


def test_what_halfstep_composes_by_itself_is_never_refused_or_warned_of(plan: Make) -> None:
    for zero in range(4):
        for precision in ("fp32", "fp16", "bf16"):
            for world in (None, GPUS):
                made = plan(f"zero={zero}", f"precision={precision}", topology=world)
                assert (made.refused_by, made.warnings) == ([], plan(topology=world).warnings)


def test_a_run_goes_on_without_the_key_that_did_nothing(plan: Make, tmp_path: Path) -> None:
    """It was accepted once; that it is refused now must not lock the run's directory."""
    old = plan("zero=1", "ds.activation_checkpointing.profile=true")
    (tmp_path / "plan.json").write_text(json.dumps(old.to_dict()))
    run_directory.refuse_another_run(tmp_path, plan("zero=1"))
    other = plan("zero=1", "ds.communication_data_type=bf16")
    assert plan("zero=1").changed_from(other.identity) == ["ds.communication_data_type"]


HPZ = "ds.zero_optimization.zero_hpz_partition_size=2"
# --- what the gate is asked ------------------------------------------------------------------------------------------


def asked(plan: Plan) -> Question:
    return question_of(plan)


@pytest.mark.parametrize(
    ("asked_for", "field", "value"),
    [
        (("zero=3", HPZ), "keys", (HPZ,)),
        (("zero=2", "compile=true"), "compile", True),
        (("zero=2", "fused_head=true"), "fused_head", True),
        (("zero=0", "ds.optimizer.type=Adagrad"), "optimizer", "adagrad"),
        (("zero=2", "ds.data_types.grad_accum_dtype=bf16"), "keys", ('ds.data_types.grad_accum_dtype="bf16"',)),
        (("zero=1", "precision=bf16-autocast", "keep_fp32=ln_f"), "keep_fp32", ("ln_f",)),
        (("zero=2", "ds.communication_data_type=bf16"), "keys", ('ds.communication_data_type="bf16"',)),
    ],
)  # fmt: skip
def test_a_cell_is_asked_about_as_it_is_run(plan: Make, asked_for: tuple[str, ...], field: str, value: object) -> None:
    question = asked(plan(*asked_for))
    assert question.cases
    assert {getattr(case, field) for case in question.cases} == {value}
    plain = asked(plan(*[word for word in asked_for if word.partition("=")[0] in ("zero", "precision")]))
    assert set(question.cases).isdisjoint(plain.cases), "a proof of something else proves nothing"


def test_a_plan_for_another_machine_is_asked_about_on_that_one(plan: Make) -> None:
    made = plan("zero=3", "ds.zero_optimization.zero_hpz_partition_size=8", topology=GPUS)
    (case,) = question_of(made, GPUS).cases
    assert (case.world_size, case.keys) == (8, ("ds.zero_optimization.zero_hpz_partition_size=8",))
    quantised = plan("zero=3", "ds.zero_optimization.zero_quantized_weights=true", topology=GPUS)
    assert {case.world_size for case in question_of(quantised, GPUS).cases} == {1, 2}


def test_deepspeeds_adam_is_proved_as_the_adamw_that_it_builds(plan: Make) -> None:
    adam = plan("zero=2", "ds.optimizer.type=Adam")
    assert question_of(adam) == question_of(plan("zero=2"))
    other = question_of(plan("zero=2", "ds.optimizer.type=Adam", "ds.optimizer.params.adam_w_mode=false"))
    assert other.unknown == ("the optimizer Adam",)


def test_a_muon_run_is_proved_by_muons_cases_whatever_its_rates(plan: Make) -> None:
    rates = ("ds.optimizer.params.muon_lr=0.02", "ds.optimizer.params.adam_lr=3e-4")
    for cell in (("zero=0", "precision=fp16"), ("zero=1", "precision=bf16")):
        question = question_of(plan(*cell, "ds.optimizer.type=Muon", *rates), topology.describe(2, 2))
        assert {(case.optimizer, case.keys, case.world_size) for case in question.cases} == {
            ("muon", (), 1),
            ("muon", (), 2),
        }


def test_what_changes_no_number_asks_for_nothing_more(plan: Make) -> None:
    plain = asked(plan("zero=2"))
    keys = ("ds.zero_optimization.reduce_bucket_size=1000", "ds.wall_clock_breakdown=true")
    same = ("optimizer.lr=3e-4", "optimizer.beta2=0.99", "schedule.kind=wsd", "batch.global=16")
    assert asked(plan("zero=2", *keys, *same)) == plain
    assert {case.optimizer for case in plain.cases} == {"adamw", "sgd"}


@pytest.mark.parametrize(
    ("asked_for", "unknown"),
    [
        (("zero=0", "ds.optimizer.type=RAdam"), "the optimizer RAdam"),
        (("zero=3", "ds.zero_optimization.zero_hpz_partition_size=4"), "zero_hpz_partition_size=4"),
    ],
)
def test_what_the_gate_does_not_know_is_not_proved_and_is_named(
    plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_for: tuple[str, ...], unknown: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = plan(*asked_for, topology=Topology(world_size=4, ranks_per_node=4, accelerator="cpu"))
    question = asked(made)
    assert question.cases == ()
    assert unknown in question.unknown[0]
    verdict.store(topology.describe(1, 1), [{**vars(case), "ok": True} for case in cases.default_cases()])
    record = proof.tell(tmp_path, made)
    assert record["proved"] is None
    assert record["reason"].startswith("the parity gate does not know")
    assert unknown in record["reason"]


def test_the_gates_own_config_leaves_nothing_to_ask(plan: Make) -> None:
    """Else every run would be another question."""
    for zero in range(4):
        for precision in ("fp32", "fp16", "bf16"):
            for case in asked(plan(f"zero={zero}", f"precision={precision}")).cases:
                assert (case.keys, case.compile, case.fused_head) == ((), False, False)


def test_a_run_is_verified_by_the_cases_of_what_it_is(
    plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran: list[cases.Case] = []

    def verify(chosen: list[cases.Case], *, repairs: bool, quiet: bool) -> gate.Outcome:
        ran.extend(chosen)
        return gate.Outcome(cells=[{**vars(case), "ok": True} for case in chosen], not_run=[], seconds=1, repairs=True)

    made = plan("zero=2", "ds.communication_data_type=bf16")
    monkeypatch.setattr(gate, "verify", verify)
    monkeypatch.setattr(Run, "require_as_asked", lambda self: (None, made))
    assert main(["verify", "--json", "--run", str(tmp_path)]) == 0
    assert tuple(ran) == question_of(made).cases
    assert {case.keys for case in ran} == {('ds.communication_data_type="bf16"',)}
    assert proof.tell(tmp_path, made)["proved"] is True
    monkeypatch.setattr(Run, "require_as_asked", lambda self: (None, plan("zero=0", "ds.optimizer.type=RAdam")))
    capsys.readouterr()
    assert main(["verify", "--run", str(tmp_path)]) == 3
    assert "does not know the optimizer RAdam" in capsys.readouterr().err


# --- a new DeepSpeed -------------------------------------------------------------------------------------------------


def test_what_a_new_version_brings_takes_and_changes_is_listed() -> None:
    old = {"a": {"type": "bool", "default": True}, "b": {"type": "int", "default": 1}, "s": {"type": "section"}}
    new = {"b": {"type": "int", "default": 2, "minimum": 0}, "c": {"type": "str", "default": None}, "s": old["s"]}
    assert new_deepspeed.differences(old, new) == {
        "new, unknown": ["c = null"],
        "gone": ["a"],
        "another default": ["b: 1 -> 2"],
        "other values": ['b: {"type": "int"} -> {"minimum": 0, "type": "int"}'],
    }
    assert not any(new_deepspeed.differences(dskeys.KEYS, dskeys.KEYS).values())


def test_every_citation_names_its_key_in_the_version_of_the_ledger(tmp_path: Path) -> None:
    assert [line for key in effects.rows() for line in new_deepspeed.misplaced(key, ROOT)] == []
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "engine.py").write_text("\n" * 5000)
    lost = [line for key in effects.rows() for line in new_deepspeed.misplaced(key, tmp_path)]
    assert len(lost) > 300
    assert "log_level: runtime/engine.py:584" in lost
