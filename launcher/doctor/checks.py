"""Check what a run needs before it needs it, and say how to fix what is missing."""

import contextlib
import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher import topology
from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.system import assets, caches, machine

OK, WARN, FAIL = "ok", "warn", "FAIL"
_FREE_BYTES_WANTED = 5 * 2**30
_SHARED_MEMORY_WANTED = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    status: str
    """`ok`, `warn` (a run may work) or `FAIL` (it cannot)."""
    detail: str
    """What was seen."""
    fix: str = ""
    """What to do; empty where nothing is to be done."""

    def to_dict(self) -> dict[str, str]:
        """Return it as `halfstep doctor --json` prints it."""
        return {"name": self.name, "status": self.status, "found": self.detail, "fix": self.fix}


def examine(folder: Path) -> list[Finding]:
    """Return all findings; `folder` is where runs will be written."""
    looked: list[Finding] = []
    for look in (
        _python,
        _versions,
        _accelerator,
        _compiler,
        _ninja,
        _cache,
        _lock,
        _optimizer,
        _port,
        _threads,
        _shared_memory,
    ):
        looked.extend(look())
    return [*looked, *_disk(folder)]


def _python() -> Iterator[Finding]:
    version = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    yield Finding(
        name="python", status=OK if good else FAIL, detail=version, fix="" if good else "install Python 3.11 or newer"
    )


def tested_versions() -> dict[str, str]:
    """Return the pinned versions of constraints.txt, from a clone or a wheel."""
    lines = assets.file("constraints.txt").read_text("utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, _, version in pins}


def _versions() -> Iterator[Finding]:
    tested = tested_versions()
    for name in ("torch", "deepspeed", "transformers", "accelerate", "datasets", "sentencepiece", "pydantic"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name=name, status=FAIL, detail="not installed", fix=f"pip install {name}=={tested[name]}")
            continue
        same = version.partition("+")[0] == tested[name]
        yield Finding(
            name=name,
            status=OK if same else WARN,
            detail=version if same else f"{version}, tested is {tested[name]}",
            fix="" if same else f"pip install {name}=={tested[name]}, or see for yourself with `make test`",
        )


def _accelerator() -> Iterator[Finding]:
    import torch

    seen, usable = machine.gpu_count(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable and not seen:
        fix = (
            "unset DS_ACCELERATOR=cpu to use them"
            if os.environ.get("DS_ACCELERATOR") == "cpu"
            else "report this machine"
        )
        yield Finding(
            name="accelerator", status=WARN, detail=f"torch sees {usable} GPU(s), runs will use the CPU", fix=fix
        )
    elif usable:
        yield Finding(name="accelerator", status=OK, detail=f"{usable} x {torch.cuda.get_device_name(0)}")
    elif seen:
        fix = "install a torch build for CUDA (this one is for CPU), or a driver that fits it"
        yield Finding(
            name="accelerator", status=FAIL, detail=f"{seen} GPU(s) that torch {torch.__version__} cannot use", fix=fix
        )
    else:
        detail = f"no GPU; {topology.default_ranks_per_node()} CPU rank(s)"
        yield Finding(name="accelerator", status=OK, detail=detail)


def _compiler() -> Iterator[Finding]:
    """Look for what compiles: nothing that every run needs."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    fix = "" if compiler else f"install a C++ compiler (Debian: apt-get install g++); {_users_of_a_compiler()} need it"
    yield Finding(name="compiler", status=OK if compiler else WARN, detail=compiler or "none", fix=fix)


def _users_of_a_compiler() -> str:
    return "compile=true and DeepSpeed's operators" if machine.gpu_count() else "runs with compile=true"


def _ninja() -> Iterator[Finding]:
    from torch.utils.cpp_extension import is_ninja_available

    # The wheel puts ninja beside the interpreter, which is on PATH only in an activated environment.
    good = is_ninja_available() or (Path(sys.executable).parent / "ninja").exists()
    yield Finding(
        name="ninja",
        status=OK if good else WARN,
        detail="found" if good else "none",
        fix="" if good else "pip install ninja",
    )


def _optimizer(device: str = "cuda") -> Iterator[Finding]:
    """Take a step as every plan for a GPU does: with torch's fused AdamW, which needs no compiler."""
    import torch

    if machine.gpu_count() == 0:
        yield Finding(name="operators", status=OK, detail="none is needed on CPU ranks")
        return
    try:
        weight = torch.nn.Parameter(torch.ones(1024, device=device))
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5, fused=True).step()
        reason = "" if torch.allclose(weight, torch.full_like(weight, 0.95 - 0.1)) else "a step went elsewhere"
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).strip().partition("\n")[0]
    if reason:
        fix = "install a torch build for CUDA that fits this GPU and its driver"
        yield Finding(name="optimizer", status=FAIL, detail=f"torch's fused AdamW: {reason}", fix=fix)
    else:
        yield Finding(name="optimizer", status=OK, detail="torch's fused AdamW steps; nothing has to be compiled")


def _cache() -> Iterator[Finding]:
    """Look where compiled operators and verdicts go."""
    try:
        folder = caches.make(caches.cache("ops"))
    except HalfstepError as error:
        yield Finding(name="cache", status=FAIL, detail=error.what, fix=error.fix)
        return
    chosen = bool(os.environ.get("XDG_CACHE_HOME")) or not folder.is_relative_to(caches.temporary())
    fix = "" if chosen else "HOME cannot be written; let XDG_CACHE_HOME name a folder that stays"
    yield Finding(name="cache", status=OK if chosen else WARN, detail=str(folder.parent), fix=fix)


def _lock() -> Iterator[Finding]:
    stale = opcache.stale_locks(opcache.folder())
    with contextlib.suppress(RuntimeError):  # a user without a home
        stale += (Path.home() / ".cache" / "torch_extensions").glob("*/*/lock")
    if stale:
        fix = f"if nothing is compiling, rm {stale[0]}: a start without Halfstep would wait for it for ever"
        yield Finding(name="build lock", status=WARN, detail=str(stale[0]), fix=fix)
    else:
        yield Finding(name="build lock", status=OK, detail="none left behind")


def _port() -> Iterator[Finding]:
    try:
        port = machine.free_port()
        with socket.create_server(("127.0.0.1", port)):
            yield Finding(name="ports", status=OK, detail=f"loopback listens ({port})")
    except OSError as error:
        fix = "ranks meet over TCP: allow listening on the loopback interface"
        yield Finding(name="ports", status=FAIL, detail=str(error), fix=fix)


def _threads() -> Iterator[Finding]:
    cores, ranks = machine.usable_cores(), topology.default_ranks_per_node()
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if chosen.isdigit() and int(chosen) * ranks > cores:
        fix = f"unset OMP_NUM_THREADS or set it to {max(1, cores // ranks)}: ranks would fight over the cores"
        yield Finding(
            name="threads", status=WARN, detail=f"OMP_NUM_THREADS={chosen} x {ranks} ranks > {cores} cores", fix=fix
        )
    else:
        yield Finding(
            name="threads", status=OK, detail=f"{cores} cores, {chosen or max(1, cores // ranks)} thread(s) a rank"
        )


def _shared_memory() -> Iterator[Finding]:
    yield from _space(
        "shared memory", Path("/dev/shm"), _SHARED_MEMORY_WANTED, "enlarge /dev/shm (in a container: --shm-size)"
    )


def _disk(folder: Path) -> Iterator[Finding]:
    yield from _space("disk", folder, _FREE_BYTES_WANTED, "free some space, or write runs elsewhere: out=DIR")
    if not os.access(folder, os.W_OK):
        yield Finding(
            name="folder", status=FAIL, detail=f"{folder} cannot be written", fix="change to another folder, or out=DIR"
        )


def _space(name: str, folder: Path, wanted: int, fix: str) -> Iterator[Finding]:
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    good = free >= wanted
    yield Finding(
        name=name,
        status=OK if good else WARN,
        detail=f"{free / 2**30:.1f} GiB free in {folder}",
        fix="" if good else fix,
    )
