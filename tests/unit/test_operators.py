"""Building DeepSpeed's operators: what its builder is given of TORCH_CUDA_ARCH_LIST, and what a failure says."""

import os
from pathlib import Path
from typing import Any

import deepspeed.ops
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import MissingCUDAException, OpBuilder
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from torch.utils import cpp_extension

from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.errors import RefusedError

VARIABLE = "TORCH_CUDA_ARCH_LIST"


@pytest.fixture(autouse=True)
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Let DeepSpeed think that it is on a host with a Hopper card, and record for what torch would compile."""
    seen: list[str | None] = []
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/opt/cuda")
    monkeypatch.setattr(cpp_extension, "verify_ninja_availability", lambda: None)
    monkeypatch.setattr(cpp_extension, "load", lambda **how: seen.append(os.environ.get(VARIABLE)))
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"fused_adam": True, "cpu_adam": True}, raising=False)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    builders = {"FusedAdamBuilder": FusedAdamBuilder, "CPUAdamBuilder": CPUAdamBuilder}
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: builders[name]())
    return seen


@pytest.mark.parametrize(("users", "built_for"), [
    ("9.0a", "9.0+PTX"),
    ("8.0;9.0a+PTX", "8.0;9.0+PTX"),
    ("8.0 8.6 9.0 10.0f 12.0+PTX", "8.0;8.6;9.0;10.0;12.0+PTX"),
    ("8.0,9.0a", "8.0;9.0+PTX"),
    (" 9.0a; ", "9.0+PTX"),
    ("9.0;9.0a", "9.0+PTX"),
    ("Hopper", "9.0+PTX"),
    ("Ampere;9.0a", "8.0;8.6+PTX;9.0"),
    ("native", "9.0+PTX"),
    ("", "9.0+PTX"),
    ("  ", "9.0+PTX"),
    (None, "9.0+PTX"),
])  # fmt: skip
def test_deepspeed_builds_for_the_architectures_that_a_user_means(
    built: list[str | None], monkeypatch: pytest.MonkeyPatch, users: str | None, built_for: str
) -> None:
    if users is not None:
        monkeypatch.setenv(VARIABLE, users)
    assert opcache.load_operators(["FusedAdamBuilder"]) == ["FusedAdamBuilder"]
    assert built == [built_for]
    assert os.environ.get(VARIABLE) == users, "the user's own is there again"


@pytest.mark.parametrize(("users", "piece"), [("nonsense", "nonsense"), ("8.0;sm_90", "sm_90"), ("90", "90")])
def test_nonsense_is_named_with_what_to_write_instead(
    built: list[str | None], monkeypatch: pytest.MonkeyPatch, users: str, piece: str
) -> None:
    monkeypatch.setenv(VARIABLE, users)
    with pytest.raises(RefusedError) as caught:
        opcache.load_operators(["FusedAdamBuilder"])
    assert caught.value.what == f"{VARIABLE}={users!r} names no GPU architecture with {piece!r}"
    assert caught.value.fix == (
        f"unset {VARIABLE}, to build for the GPUs of this host, or set it to numbers: '9.0', '8.0;9.0+PTX'"
    )
    assert (built, os.environ[VARIABLE]) == ([], users)


def test_what_deepspeed_builds_by_itself_later_is_given_a_readable_list_too(
    built: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "9.0a")
    opcache.prepare()
    FusedAdamBuilder().load()
    assert built == ["9.0+PTX"]


def test_an_operator_for_the_host_is_built_whatever_the_list_says(
    built: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "nonsense")
    assert opcache.load_operators(["CPUAdamBuilder"]) == ["CPUAdamBuilder"]
    assert built == ["nonsense"]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_a_build_that_fails_names_compiler_variable_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    def fail(**how: Any) -> None:
        raise error("Error building extension 'fused_adam': [1/3] nvcc and all its words\nmore")

    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setenv(VARIABLE, "9.0a")
    with pytest.raises(RefusedError) as caught:
        opcache.load_operators(["FusedAdamBuilder"], otherwise="take another")
    assert caught.value.what == (
        "DeepSpeed's operator fused_adam cannot be built: Error building extension 'fused_adam'"
    )
    assert caught.value.where == f"{tmp_path / 'ops'}, built by /opt/cuda/bin/nvcc for {VARIABLE}='9.0a'"
    assert caught.value.fix == "take another; --debug shows the compiler's words"


def test_a_host_without_the_cuda_toolkit_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(**how: Any) -> None:
        raise MissingCUDAException("CUDA_HOME does not exist, unable to compile CUDA op(s)")

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(cpp_extension, "load", missing)
    with pytest.raises(RefusedError, match="fused_adam cannot be built: CUDA_HOME does not exist") as caught:
        opcache.load_operators(["FusedAdamBuilder"])
    assert caught.value.where == f"{tmp_path / 'ops'}, built by nvcc, which CUDA_HOME does not name"
