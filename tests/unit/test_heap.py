"""The allocator of CPU ranks: what is large goes back to the system when it is freed."""

import os
import subprocess
import sys

import pytest

HOLES = """
from halfstep.launcher.system import heap
heap.settle()

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024

bytearray(16 << 20)  # freed at once: left alone, the C library serves up to this size from its heap from now on
before, large, small = resident(), [], []
for _ in range(20):
    one = bytearray(6 << 20)
    one[::4096] = b"x" * len(one[::4096])
    large.append(one)
    small.append(bytearray(b"x") * (64 << 10))  # stays, above it
grown = resident() - before
large.clear()
del one
print(grown, resident() - before)
"""


def _holes(**environment: str) -> tuple[int, int]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = subprocess.run(
        [sys.executable, "-c", HOLES], env={**kept, **environment}, capture_output=True, text=True, check=True
    ).stdout
    grown, left = out.split()
    return int(grown), int(left)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    grown, left = _holes()
    assert grown >= 120
    assert left <= 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_user_has_set_stays() -> None:
    grown, left = _holes(MALLOC_ARENA_MAX="2")
    assert grown >= 120
    assert left >= 100  # the holes between the small ones
