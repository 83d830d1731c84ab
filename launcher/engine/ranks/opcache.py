"""Build DeepSpeed's compiled operators once a host, behind a lock that a dead process cannot leave behind.

torch's own build lock is a plain file: a start killed at the wrong moment leaves it, and every later start waits for it
without a word and without end (T25; torch/utils/file_baton.py). Ours is released by the kernel, and while we hold it
nobody of ours can be building, so a plain lock file found then is stale and is removed.
"""

import hashlib
import importlib
import importlib.util
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from halfstep.launcher.engine.ranks import cuda_architectures
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.system import caches, machine


def folder() -> Path:
    """Return the build folder: TORCH_EXTENSIONS_DIR where a user set it, else one per CPU type, version and place.

    Hosts that share a home must not share builds for another instruction set (T11), nor two installations theirs: the
    compiler is given their paths, and either would build again what the other has built.
    """
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen)
    installed = [importlib.util.find_spec(name) for name in ("torch", "deepspeed")]
    places = [str(Path(spec.origin or "").resolve().parent) for spec in installed if spec is not None]
    kind = hashlib.sha256("\0".join([machine.cpu_flags(), *places]).encode()).hexdigest()[:8]
    versions = f"py{platform.python_version()}-torch{version('torch')}-deepspeed{version('deepspeed')}"
    return caches.cache("ops") / f"{platform.machine()}-{kind}-{versions}".replace("+", "-")


def stale_locks(cache: Path) -> list[Path]:
    """Return the build locks in a cache; they are stale if nobody is building."""
    return sorted(cache.glob("*/lock"))


def own_lock(cache: Path) -> FileLock:
    """Return the lock that guards a cache, released by the kernel when its holder dies."""
    return FileLock(cache / "halfstep.lock")


def prepare() -> None:
    """Set where operators are built and by what, and keep DeepSpeed from building one that no training uses.

    Its shared-memory operator for CPUs serves `inference_all_reduce` alone (comm/torch.py); gloo does all others.
    Whichever it builds for a GPU, now or while it trains, is built for architectures that it can read.
    """
    # ninja's wheel lies beside the interpreter, which is on PATH only in an activated environment.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder())
    # By its full name: in deepspeed.comm, `torch` is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    importlib.import_module("deepspeed.ops.op_builder.builder").CUDAOpBuilder.jit_load = _build  # type: ignore[attr-defined]


def _build(builder: Any, verbose: bool = True) -> Any:
    """Build an operator for a GPU as DeepSpeed does (op_builder/builder.py, jit_load)."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    with cuda_architectures.in_deepspeeds_spelling():
        return OpBuilder.jit_load(builder, verbose)


def load_operators(names: list[str], *, otherwise: str = "`halfstep doctor` says what is missing") -> list[str]:
    """Build, or load what was built, one rank at a time, and return the names of those that fit this machine.

    DeepSpeed then finds them loaded and takes no lock itself. Raises RefusedError where an operator cannot be built,
    which says what to do `otherwise`; RequestError where there is no folder to build it in.
    """
    cache = caches.make(folder(), "TORCH_EXTENSIONS_DIR" if os.environ.get("TORCH_EXTENSIONS_DIR") else None)
    prepare()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException

    failures = (RuntimeError, OSError, ImportError, ValueError, CUDAMismatchException, MissingCUDAException)
    loaded = []
    with own_lock(cache):
        for lock in stale_locks(cache):
            lock.unlink(missing_ok=True)
        for name in names:
            builder = get_accelerator().create_op_builder(name)  # pyright: ignore[reportOptionalMemberAccess]
            if builder is not None and __compatible_ops__.get(builder.NAME, False):
                try:
                    builder.load()
                except failures as error:
                    reason = str(error).strip().partition("\n")[0].partition(": [")[0]  # the compiler's line follows
                    raise RefusedError(
                        f"DeepSpeed's operator {builder.NAME} cannot be built: {reason}",
                        where=f"{cache}, built by {_means(builder)}",
                        fix=f"{otherwise}; --debug shows the compiler's words",
                    ) from error
                loaded.append(name)
    return loaded


def _means(builder: Any) -> str:
    """Name the compiler of an operator and what it was told to build for."""
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder
    from torch.utils import cpp_extension

    if not isinstance(builder, CUDAOpBuilder):
        return cpp_extension.get_cxx_compiler()
    home, list_ = cpp_extension.CUDA_HOME, os.environ.get(cuda_architectures.VARIABLE)
    compiler = str(Path(home, "bin", "nvcc")) if home else "nvcc, which CUDA_HOME does not name"
    return compiler + (f" for {cuda_architectures.VARIABLE}={list_!r}" if list_ else "")
