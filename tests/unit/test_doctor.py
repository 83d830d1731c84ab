"""What the doctor tries on a host with a GPU: the optimizer of the plan, and no build."""

import os

import pytest
import torch

from halfstep.launcher.doctor import checks
from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.system import machine


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda environ=os.environ: 1)

    def build(*given: object, **options: object) -> None:
        raise AssertionError("the doctor builds what no plan uses")

    monkeypatch.setattr(opcache, "load_operators", build)


def test_the_optimizer_of_the_plan_is_tried_whatever_the_list_of_architectures_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "nonsense")
    (finding,) = checks._optimizer("cpu")
    assert (finding.name, finding.status, finding.fix) == ("optimizer", checks.OK, "")
    assert finding.detail == "torch's fused AdamW steps; nothing has to be compiled"


def test_a_gpu_that_torch_cannot_step_on_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*given: object, **options: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "_fused_adamw_", no_kernel)
    (finding,) = checks._optimizer("cpu")
    assert (finding.status, finding.fix) == (
        checks.FAIL,
        "install a torch build for CUDA that fits this GPU and its driver",
    )
    assert finding.detail == "torch's fused AdamW: CUDA error: no kernel image is available for execution on the device"


def test_a_step_to_the_wrong_place_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *given, **options: None)
    (finding,) = checks._optimizer("cpu")
    assert (finding.status, finding.detail) == (checks.FAIL, "torch's fused AdamW: a step went elsewhere")


def test_a_gpu_host_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = checks._compiler()
    assert (finding.status, finding.detail) == (checks.WARN, "none")
