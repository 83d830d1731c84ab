"""What this machine has and is: GPUs, processor, memory, cores, ports, names; asked of the system, without torch."""

import contextlib
import functools
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path


def gpu_count(environ: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs this process may use, without torch: the driver's list, less what CUDA_VISIBLE_DEVICES hides."""
    if environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 0
    # In some containers only the device files are there.
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def has_cuda_compiler(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether nvcc is at hand, which DeepSpeed needs to build its fused optimizers."""
    home = environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=environ.get("PATH")) is not None or Path(home, "bin", "nvcc").exists()


def device_name() -> str:
    """Return the first GPU's model as the driver prints it, else empty."""
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return ""


def cpu_model() -> str:
    """Return what the processor calls itself."""
    return _cpu_info("model name").strip() or platform.machine()


def cpu_flags() -> str:
    """Return the line that lists what the processor can do, or what it calls itself."""
    return _cpu_info("flags") or _cpu_info("Features") or platform.processor()


@functools.cache
def multiplies_fp16() -> bool:
    """Tell whether this host's processor has the matrix instructions for fp16 that oneDNN wants.

    AVX512-FP16 on x86 and FPHP with ASIMDHP on Arm; others train fp16, too (engine/numerics/cpu_fp16.py).
    """
    flags = set(cpu_flags().split())
    return "avx512_fp16" in flags or {"fphp", "asimdhp"} <= flags


def _cpu_info(field: str) -> str:
    return next((line.partition(":")[2] for line in _lines(Path("/proc/cpuinfo")) if line.startswith(field)), "")


def node_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory of this host, or of the control group that holds this process if that has less; else None."""
    sizes = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        sizes += [int(line) for line in _lines(root / limit) if line.strip().isdigit()]  # `max`: no limit
    return min(sizes) if sizes else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def usable_cores() -> int:
    """Count the cores this process may run on (an affinity mask or a cgroup may leave fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """Return a TCP port that nothing on this host listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_this_host(host: str) -> bool:
    """Tell whether a name or an address is this host's own; a name that nobody knows is not another host's."""
    if host == socket.gethostname():
        return True
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return True
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False
