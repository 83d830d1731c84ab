"""DeepSpeed files that other projects publish, given to `halfstep plan`: accepted, or told what to change."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from public_configs import CONFIGS, FILE, PublicConfig

from halfstep.launcher.cli.main import main
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.ds import dskeys, effects, former_keys
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import run_directory
from halfstep.launcher.system import machine

GOLDEN = Path(__file__).parents[1] / "golden" / "public-deepspeed-configs.json"
ROUND_ROBIN = "zero_optimization.round_robin_gradients"
MUST_WORK = (
    *(f"axolotl/deepspeed_configs/{name}.json" for name in ("zero1", "zero2", "zero3", "zero3_bf16")),
    "axolotl/deepspeed_configs/zero3_bf16_cpuoffload_all.json",
    *(f"LLaMA-Factory/examples/deepspeed/ds_{name}_config.json" for name in ("z0", "z2", "z2_offload", "z3")),
    "LLaMA-Factory/examples/deepspeed/ds_z3_offload_config.json",
    "transformers/tests/deepspeed/ds_config_zero2.json",
    "transformers/tests/deepspeed/ds_config_zero2_bf16.json",
    "accelerate/tests/deepspeed/ds_config_zero2.json",
    "accelerate/tests/deepspeed/ds_config_zero3.json",
)
"""What people bring who come from the trainers of transformers."""


def named(name: str) -> PublicConfig:
    return next(public for public in CONFIGS if str(public) == name)


@pytest.fixture
def planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Return a function that gives a file to `halfstep plan` for two CPU ranks, and its exit code and lines."""
    monkeypatch.setattr(machine, "gpu_count", lambda environ=os.environ: 0)

    def plan(public: PublicConfig, *more: str) -> tuple[int, list[str]]:
        arguments = ["model=gpt2-nano", "model.vocabulary=512", "gpus_per_node=2"]
        code = main(["plan", *arguments, f"--ds-config={public.write(tmp_path)}", *more])
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return plan


Planned = Callable[..., tuple[int, list[str]]]


def outcome(code: int, lines: list[str]) -> list[str]:
    """Return what decides: the cell and the batch, and what is left out; or each refusal, in its three lines."""
    if code == 0:
        kept = ("cell  ", "batch  ")
        return [
            *(re.sub(" +", " ", line) for line in lines if line.startswith(kept)),
            *(line.partition(", which")[0] for line in lines if line.startswith("WARNING") and "is left out" in line),
        ]
    refused = [number for number, line in enumerate(lines) if line.startswith(("error: ", "REFUSED by rule "))]
    return [line for number in refused for line in lines[number : number + 3]]


@pytest.mark.parametrize("public", CONFIGS, ids=str)
def test_a_public_file_is_planned_or_says_what_to_change(planned: Planned, public: PublicConfig) -> None:
    code, lines = planned(public)
    seen = outcome(code, lines)
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("ACCEPT_GOLDEN"):
        known = {str(other) for other in CONFIGS}
        golden = {name: said for name, said in {**golden, str(public): seen}.items() if name in known}
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n", encoding="utf-8")
    assert code in (0, 2)
    assert seen == golden[str(public)]
    if code:
        assert {line.strip().partition(": ")[0] for line in seen[1::3]} == {"from"}
        assert {line.strip().partition(": ")[0] for line in seen[2::3]} == {"try"}


@pytest.mark.parametrize("name", MUST_WORK)
def test_the_files_of_the_trainers_of_transformers_simply_work(name: str) -> None:
    assert json.loads(GOLDEN.read_text("utf-8"))[name][0].startswith("cell zero=")


def test_the_data_stay_small_and_say_where_they_are_from() -> None:
    assert FILE.stat().st_size < 100_000
    assert len({str(public) for public in CONFIGS}) == len(CONFIGS) > 45
    assert all(re.fullmatch("[0-9a-f]{40}", public.commit) for public in CONFIGS)


@pytest.mark.parametrize("public", CONFIGS, ids=str)
def test_every_key_is_in_the_ledger_or_its_refusal_names_it(public: PublicConfig) -> None:
    said = "\n".join(json.loads(GOLDEN.read_text("utf-8"))[str(public)])
    for key in public.keys:
        row = effects.row_of(key)
        if row is not None and key.rpartition(".")[0] != "optimizer.params":
            assert row["effect"] != effects.UNKNOWN, key
        elif not key.startswith(("optimizer.params.", "scheduler.params.")):
            parts = key.split(".")
            prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            assert any(f"{prefix}: " in said for prefix in prefixes), key


def test_what_deepspeed_took_once_is_told_what_does_it_now() -> None:
    """DeepSpeed's own word for curriculum_learning leads to a key that does nothing in a run of Halfstep."""
    removed = {path: former_keys.instead(path) for path in former_keys.INSTEAD}
    assert all(fix.startswith(f"remove {path}; ") for path, fix in removed.items())
    config = {"compile": {"backend": "inductor"}, "curriculum_learning": {"enabled": True}, "_comment": "mine"}
    fixes = {problem.path: problem.suggestion for problem in dskeys.problems(config)}
    assert fixes == {
        "compile.backend": "use the run key compile=true, which compiles each block, and remove compile.backend",
        "curriculum_learning": "remove curriculum_learning; Halfstep has no curriculum, and DeepSpeed's other one does "
        "nothing in it",
        "_comment": "remove _comment, or write it as a comment: // in a line of its own",
    }
    for path in (*former_keys.RENAMED, *former_keys.FOREIGN):
        assert path not in dskeys.KEYS, "DeepSpeed knows it again"
    assert set(former_keys.INSTEAD) <= set(dskeys._TABLE["removed"])


@pytest.mark.parametrize("name", ["OneBitAdam", "OnebitAdam", "ZeroOneAdam", "OneBitLamb"])
def test_an_optimizer_that_deepspeed_had_is_not_called_a_misspelling(name: str) -> None:
    (problem,) = dskeys.problems({"optimizer": {"type": name}})
    assert problem.sentence == f"DeepSpeed 0.19.8 has {name} no longer"
    assert problem.suggestion.startswith("use Lamb" if "Lamb" in name else "use AdamW")


# --- a key that is left out of a file --------------------------------------------------------------------------------

LLAMA_FACTORY_2 = "LLaMA-Factory/examples/deepspeed/ds_z2_config.json"


def test_a_key_that_breaks_checkpoints_for_nothing_is_left_out_of_a_file_and_refused_as_a_word(
    planned: Planned,
) -> None:
    code, lines = planned(named(LLAMA_FACTORY_2))
    assert code == 0
    (warning,) = [line for line in lines if ROUND_ROBIN in line]
    assert warning.startswith(f"WARNING: {ROUND_ROBIN} from --ds-config public.json is left out")
    code, lines = planned(named(LLAMA_FACTORY_2), f"ds.{ROUND_ROBIN}=true")
    assert code == 2
    assert outcome(code, lines)[0].startswith(f"REFUSED by rule key-is-fatal: {ROUND_ROBIN} ends or breaks a run")


def test_a_run_that_was_made_with_what_is_left_out_now_is_not_mixed_with_it(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """Its checkpoints hold masters in that order; the file, and so the identity, is the same."""
    file = named(LLAMA_FACTORY_2).write(tmp_path)
    new = plan(f"--ds-config={file}")
    assert "round_robin_gradients" not in new.deepspeed["zero_optimization"]
    old = new.to_dict()
    old["deepspeed"]["zero_optimization"]["round_robin_gradients"] = True
    (tmp_path / "plan.json").write_text(json.dumps(new.to_dict()))
    run_directory.refuse_another_run(tmp_path, new)
    (tmp_path / "plan.json").write_text(json.dumps(old))
    with pytest.raises(RequestError, match=f"was made with {ROUND_ROBIN}, which is left out now") as caught:
        run_directory.refuse_another_run(tmp_path, new)
    assert "run=" in caught.value.fix
    run_directory.refuse_another_run(tmp_path, Plan.from_dict(old))  # as it is


def test_where_it_does_nothing_it_stays_so_that_a_run_keeps_its_id(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = plan(f"--ds-config={named('LLaMA-Factory/examples/deepspeed/ds_z0_config.json').write(tmp_path)}")
    assert made.deepspeed["zero_optimization"]["round_robin_gradients"] is True
    assert [line for line in made.warnings if ROUND_ROBIN in line and "does nothing in this run" in line]


def test_a_table_that_does_nothing_is_said_once(planned: Planned) -> None:
    name = "DeepSpeedExamples/training/data_efficiency/gpt_finetuning/config/ds_config_gpt_base_random_ltd.json"
    _, lines = planned(named(name))
    warned = [line for line in lines if line.startswith("WARNING: data_efficiency.data_routing.random_ltd")]
    assert len(warned) == 1
