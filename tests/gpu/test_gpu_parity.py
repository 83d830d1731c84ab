"""What only a GPU can show of the parity gate; benchmarks/gpu.py keeps what it says in benchmarks/results/."""

import json
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
    wrong = [(c["zero"], c["precision"], c["measure"], c["worst"]) for c in result["cells"] if not c["ok"]]
    assert done.returncode == 0, wrong
