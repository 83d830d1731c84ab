"""Every causal language model of the installed transformers, made tiny: it trains, or is refused by name before a step.

`make test-models` takes all of them through plan, two (stage, precision) cells on two ranks, resume, export with equal
logits and generation; `make test` a few. A family that the table does not list is a new one: try it, and list it.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, ROUTED, Refused
from ranks import environment
from sweep_rank import CLOSE, STEPS, cells
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

pytestmark = pytest.mark.process
ROOT = Path(__file__).resolve().parents[2]
SMOKE = ("bert", "deepseek_v3", "mamba2", "roformer")
"""One that is refused, one of experts with a bias, one of states, one with a frozen table."""
LISTED = [pytest.param(family, marks=[] if family in SMOKE else [pytest.mark.models]) for family in sorted(FAMILIES)]
_CLOSEST = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


def test_every_family_of_transformers_is_listed() -> None:
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    listed = {name.partition(":")[0] for name in FAMILIES}
    assert sorted(known - listed) == [], "new in this transformers: sweep them, and list what came of it"
    assert sorted(listed - known) == [], "gone from this transformers"


def test_every_cell_is_somebodys() -> None:
    met = [cell for place in range(18) for cell in cells(place)]
    assert set(met) == {(zero, precision) for zero in range(4) for precision in ("fp32", "bf16", "fp16")}


def cells_of(family: str) -> tuple[tuple[int, str], ...]:
    """Return the cells that a family is trained in."""
    return FAMILIES[family].cells or cells(sorted(FAMILIES).index(family))


@pytest.fixture(scope="module")
def swept(
    request: pytest.FixtureRequest, data: Path, scratch: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Sweep the families whose tests were selected, and return what came of each."""
    chosen = [
        item.callspec.params["family"] for item in request.session.items if "swept" in getattr(item, "fixturenames", ())
    ]
    left = [(family, cells_of(family)) for family in dict.fromkeys(chosen)]
    home, rows = tmp_path_factory.mktemp("sweep"), {}
    while left:
        rows |= {row["family"]: row for row in _start(home, scratch, data, left)}
        reached = [place for place, (family, _) in enumerate(left) if family in rows]
        # A rank that ends in the middle of a family may leave no row: it is the first without one.
        after = 1 + max(reached, default=-1)
        if reached != list(range(after)) or not reached:
            rows[left[after][0]] = {"family": left[after][0], "error": (home / "log").read_text()[-3000:]}
            after += 1
        left = left[after:]
    if kept := os.environ.get("HALFSTEP_SWEEP"):
        Path(kept).write_text(json.dumps(rows, indent=1))
    return rows


def _start(home: Path, scratch: Path, data: Path, families: list[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    out, job = home / "rows.jsonl", home / "job.json"
    before = out.stat().st_size if out.exists() else 0
    job.write_text(json.dumps({"home": str(home), "data": str(data), "out": str(out), "families": families}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    with (home / "log").open("w") as log:
        subprocess.run(
            [*command, str(Path(__file__).with_name("sweep_rank.py")), str(job)],
            cwd=ROOT,
            env={**environment(scratch), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            timeout=60 + 60 * len(families),
            check=False,
        )
    for line in out.read_text()[before:].splitlines() if out.exists() else []:
        yield json.loads(line)


@pytest.mark.parametrize("family", LISTED)
def test_a_family_trains_resumes_exports_and_generates_or_is_refused_by_name(
    swept: dict[str, Any], family: str
) -> None:
    row, expected = swept[family], FAMILIES[family]
    assert "error" not in row, row
    if isinstance(expected, Refused):
        assert (row["stage"], row["code"]) == (expected.stage, expected.code), row
        assert re.search(expected.what, row["refused"]), row["refused"]
        assert re.search(expected.fix, row["fix"]), row["fix"]
        return
    assert row["stage"] == "done", row
    (zero, precision), (other_zero, other_precision) = cells_of(family)
    fresh, loaded = row["fresh"], row["loaded"]
    assert (fresh["zero"], fresh["precision"]) == (zero, precision)
    assert (loaded["zero"], loaded["precision"]) == (other_zero, other_precision)
    assert fresh["parameters"] == loaded["parameters"]
    for run in (fresh, loaded):
        assert len(run["losses"]) == STEPS
        assert run["resumed"] or not expected.exact, "the last step and the checkpoint are the same to the bit"
        assert run["causal"]["earlier"] == 0
        assert (None not in run["routers"]) == (family in ROUTED), run["routers"]
        assert run["causal"]["later"] > 0
    room = max(CLOSE[precision], CLOSE[other_precision]) if expected.exact else 1e-3
    assert loaded["evaluations"][0] == pytest.approx(fresh["evaluations"][-1], rel=room), "the stages load one model"
    for compared in (row["export"], row["export_loaded"]):
        assert compared["ok"]
        assert compared["largest_difference"] <= _CLOSEST[compared["precision"]] * compared["largest_logit"]
    assert row["generated"] >= 1
