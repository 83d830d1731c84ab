"""How the C library serves the tensors of a CPU rank: large ones by themselves, given back as soon as they are freed.

Left alone it serves everything below 32 MiB from one heap, whose pages stay where a hole is too small for what comes
next: the peak of a rank then depends on the order of its allocations, 8 to 20 % above its tensors.
"""

import ctypes
import os
from collections.abc import MutableMapping

MAPPED = 2 << 20
"""Bytes from which on an allocation is mapped by itself: a huge page, to which torch aligns what is as large.

Less costs time for page faults; more leaves aligned tensors in the heap, with holes in between.
"""

# mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX. Threads of gloo would otherwise keep heaps of their own.
_OPTIONS = ((-1, MAPPED), (-3, MAPPED), (-8, 1))


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the C library's allocator, before torch is imported; leave what the user has set, and other C libraries.

    torch asks for huge pages where THP_MEM_ALLOC_ENABLE says so (c10/core/impl/alloc_cpu.cpp): mapped tensors are
    touched again each time, and a huge page costs one fault where small ones cost 512.
    """
    if any(name.startswith("MALLOC_") for name in environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in _OPTIONS:
        mallopt(option, value)
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
