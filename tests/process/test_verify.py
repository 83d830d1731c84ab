"""The parity gate as a user runs it: the default subset passes, stock DeepSpeed fails exactly at stage 0 in half."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from process.conftest import BIN, environment

from halfstep.launcher.parity.cases import every_case

pytestmark = pytest.mark.process
FIELDS = ["zero", "precision", "accumulation", "clip", "world_size", "optimizer", "family", "worst", "tolerance", "ok"]


def verify(scratch: Path, *arguments: str, timeout: int = 900) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [BIN / "halfstep", "verify", "--json", *arguments],
        env={**environment(scratch), "XDG_CACHE_HOME": str(scratch / "cache")},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def failed(result: dict[str, Any]) -> set[tuple[int, str]]:
    return {(cell["zero"], cell["precision"]) for cell in result["cells"] if not cell["ok"]}


@pytest.fixture(scope="module")
def default(scratch: Path) -> tuple[int, dict[str, Any]]:
    return verify(scratch)


def test_every_cell_trains_the_same_model(default: tuple[int, dict[str, Any]]) -> None:
    code, result = default
    assert failed(result) == set()
    assert (code, result["ok"], result["not_run"]) == (0, True, [])
    assert len(result["cells"]) == 76
    assert {(cell["zero"], cell["precision"]) for cell in result["cells"]} == {
        (zero, precision)
        for zero in range(4)
        for precision in ("fp32", "fp16", "bf16", "fp16-autocast", "bf16-autocast")
    }
    for cell in result["cells"]:
        assert set(FIELDS) <= set(cell)
        assert cell["worst"] <= cell["tolerance"] or cell["tolerance"] == cell["worst"] == 0
        against = {deviation["against"] for deviation in cell["deviations"]}
        assert against == ({"oracle"} if cell["zero"] == 1 else {"oracle", "stage 1"})


def test_repairs_are_active_exactly_where_they_are_needed(default: tuple[int, dict[str, Any]]) -> None:
    for cell in default[1]["cells"]:
        needed = []
        if cell["zero"] == 0 and cell["precision"] in ("fp16", "bf16"):
            scaling = ["unscaled-loss"] * (cell["precision"] == "fp16")
            needed = ["false-optimizer-step", *scaling, "half-precision-accumulation"]
        assert cell["repairs"] == needed


def test_the_verdict_is_stored_with_versions_and_hardware(default: tuple[int, dict[str, Any]], scratch: Path) -> None:
    (file,) = (scratch / "cache" / "halfstep" / "verdicts").glob("*.json")
    stored = json.loads(file.read_text())
    assert stored["conditions"] == default[1]["conditions"]
    assert {"torch", "deepspeed", "transformers", "halfstep"} <= set(stored["conditions"]["versions"])
    assert len(stored["cells"]) == 76


def test_stock_deepspeed_fails_exactly_at_stage_0_in_half_precision(scratch: Path) -> None:
    before = sorted((scratch / "cache").rglob("*.json"))
    code, result = verify(
        scratch, "--without-repairs", "--only", "world_size=1", "accumulation=1", "activation_checkpointing=false"
    )
    assert code == 76
    assert failed(result) == {(0, "fp16"), (0, "bf16")}
    for cell in result["cells"]:
        if not cell["ok"]:
            loss = next(deviation for deviation in cell["deviations"] if deviation["measure"] == "loss")
            assert loss["value"] > 5e-3, "the gap is in the result"
            assert cell["measure"] in ("loss", "grad_norm", "first_update"), "the worst is one that has a size"
    assert sorted((scratch / "cache").rglob("*.json")) == before, "what is known to be wrong is no verdict"


def test_documents_apart_and_unequal_targets_train_what_each_document_alone_would(scratch: Path) -> None:
    chosen = ["documents=masked", "world_size=2", "zero=1|3", "precision=fp32"]
    code, result = verify(scratch, "--all", "--only", *chosen)
    assert (code, failed(result), len(result["cells"])) == (0, set(), 4)
    for cell in result["cells"]:
        apart = {d["measure"]: d["value"] for d in cell["deviations"] if d["against"] == "oracle"}
        assert apart["loss"] < 1e-6
        assert apart["grad_norm"] < 1e-6


@pytest.mark.full
def test_a_family_that_no_preset_has_is_proved_without_a_file_of_a_hub(scratch: Path) -> None:
    chosen = ["family=qwen3_moe", "zero=3", "precision=fp16", "world_size=1"]
    code, result = verify(scratch, "--all", "--only", *chosen)
    (cell,) = result["cells"]
    assert (code, cell["ok"]) == (0, True)
    assert json.loads(cell["config"])["num_experts_per_tok"] == 2
    assert {deviation["against"] for deviation in cell["deviations"]} == {"oracle", "stage 1"}
    assert cell["final_loss"] == pytest.approx(cell["oracle_final_loss"], rel=3e-4)


@pytest.mark.full
@pytest.mark.parametrize("arguments", [[], ["--without-repairs"]], ids=["with repairs", "without"])
def test_every_combination(scratch: Path, arguments: list[str]) -> None:
    code, result = verify(scratch, "--all", *arguments, timeout=1800)
    assert len(result["cells"]) == len(every_case())
    assert failed(result) == ({(0, "fp16"), (0, "bf16")} if arguments else set())
    if arguments:
        wrong = [c for c in result["cells"] if c["zero"] == 0 and c["precision"] != "fp32"]
        assert not any(cell["ok"] for cell in wrong)
    assert code == (76 if arguments else 0)
