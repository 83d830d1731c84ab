"""What only a GPU can show of the parity gate; `make gpu` runs it and keeps the result in benchmarks/results/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfstep.launcher.system import machine

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.gpu_count() == 0, reason="no GPU on this machine: nothing was measured"),
]


def test_every_cell_trains_the_same_model_on_this_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfstep", "verify", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    name = re.sub(r"[^a-z0-9]+", "-", result["conditions"]["device"].lower()).strip("-")
    out = ROOT / "benchmarks" / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    known = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**known, "verify": result}, indent=1) + "\n")
    wrong = [(c["zero"], c["precision"], c["measure"], c["worst"]) for c in result["cells"] if not c["ok"]]
    assert done.returncode == 0, wrong
