"""The loss' Triton kernels: chosen on a GPU, and held to the loss' contract in Triton's interpreter on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfstep.models.loss import implementation

ROOT = Path(__file__).resolve().parents[2]
# `make test` puts it there where torch has brought none: among the packages transformers would load it in every rank.
TRITON = Path(sys.prefix) / "triton"


def test_the_kernels_keep_the_contract_of_the_loss_in_tritons_interpreter() -> None:
    # The interpreter is chosen when Triton is imported, so it has a process of its own.
    path = os.pathsep.join(map(str, (ROOT / "tests" / "interpreter", TRITON)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    probe = [sys.executable, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('triton') is None)"]
    if subprocess.run(probe, env=environment).returncode:
        pytest.skip(
            f"Triton is neither installed nor in {TRITON}, where `make test` puts it: the kernels are not tested"
        )
    files = ["tests/unit/test_models_loss.py", "tests/interpreter/kernel_cases.py"]
    # numpy warns of the infinities that the contract asks for. Left out is what is of chunks alone.
    alone = "not under_six_bytes and not any_chunk_size"
    options = ["-q", "-p", "kernel_everywhere", "-W", "ignore::RuntimeWarning", "-k", alone]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a GPU that is not there, on which Triton starts; its attributes may be changed."""
    here = SimpleNamespace(capability=(9, 0), spec=object(), start=lambda: None)
    kernels = SimpleNamespace(start=lambda: here.start())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: here.capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: here.spec)
    monkeypatch.setattr("halfstep.models.loss_kernels", kernels, raising=False)
    implementation.cache_clear()
    yield here
    implementation.cache_clear()


CUDA = torch.device("cuda", 0)


def test_a_cpu_computes_the_loss_in_chunks(gpu: SimpleNamespace) -> None:
    assert implementation(torch.device("cpu")) == "chunks"


def test_a_gpu_computes_the_loss_by_triton(gpu: SimpleNamespace) -> None:
    assert implementation(CUDA) == "triton"


def test_a_gpu_that_triton_does_not_compile_for_computes_the_loss_in_chunks(gpu: SimpleNamespace) -> None:
    gpu.capability = (6, 1)
    assert implementation(CUDA) == "chunks"


def test_a_gpu_without_triton_computes_the_loss_in_chunks_and_says_so(gpu: SimpleNamespace) -> None:
    gpu.spec = None
    with pytest.warns(RuntimeWarning, match="many small kernels.*: Triton is not installed"):
        assert implementation(CUDA) == "chunks"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler."),
        subprocess.CalledProcessError(1, ["gcc"]),
        OSError("no space"),
        ImportError("failed to map segment"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_host_where_triton_does_not_start_computes_the_loss_in_chunks_and_says_why(
    error: Exception, gpu: SimpleNamespace
) -> None:
    def start() -> None:
        raise error

    gpu.start = start
    with pytest.warns(RuntimeWarning, match=re.escape(f"does not start here: {error}")):
        assert implementation(CUDA) == "chunks"
