"""The GPU that is measured: what it is, and whether anybody else is on it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

LEAST_FOREIGN_BYTES = 2**30
"""What a GPU with nobody on it may hold: the driver's own."""
_PROBE = "import torch; free, all = torch.cuda.mem_get_info(); print(all - free, all, torch.cuda.get_device_name())"
_CONTEXT_BYTES = 2**30
"""What the probe itself takes up at most."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or the CPU of a dry run."""

    name: str
    index: str
    """As CUDA_VISIBLE_DEVICES and nvidia-smi take it; empty for a CPU."""
    memory_bytes: int | None = None
    driver: str | None = None

    @property
    def slug(self) -> str:
        """The name of its file of results."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def strangers(self) -> str | None:
        """Say who else is on the GPU; None where nobody is."""
        if not self.index:
            return None
        answer = _smi(self.index, "--query-gpu=memory.used")
        used = _number(answer)
        if used is not None:
            listed = (_smi(self.index, "--query-compute-apps=pid") or "").split()
            others = [process for process in listed if process.isdecimal()]  # some drivers say that they do not know
            if others:
                return f"process {', '.join(others)} is on the GPU"
            used, allowed = used << 20, LEAST_FOREIGN_BYTES
        else:
            probed = _probe()
            if probed is None:
                return "whether others use the GPU cannot be found out: neither nvidia-smi nor torch says"
            used, allowed = probed[0], LEAST_FOREIGN_BYTES + _CONTEXT_BYTES
        return None if used <= allowed else f"others hold {used / 2**30:.1f} GiB of the GPU"


def first_gpu() -> Device | None:
    """Return the first GPU that this process may use; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = "0" if visible is None else visible.split(",")[0].strip()
    if index in ("", "-1"):
        return None
    answer = _smi(index, "--query-gpu=name,memory.total,driver_version")
    if answer:
        name, memory, driver = (part.strip() for part in answer.splitlines()[0].split(",")[:3])
        size = _number(memory)
        return Device(name=name, index=index, memory_bytes=None if size is None else size << 20, driver=driver)
    probed = _probe()
    return None if probed is None else Device(name=probed[2], index=index, memory_bytes=probed[1])


def _smi(index: str, query: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "-i", index, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _probe() -> tuple[int, int, str] | None:
    """Ask torch in a process of its own, so that this one never holds memory of the GPU."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        return None
    used, total, name = done.stdout.strip().split(" ", 2)
    return int(used), int(total), name


def _number(text: str | None) -> int | None:
    match = re.match(r"\s*(\d+)", text or "")
    return int(match[1]) if match else None
