"""Measure this machine's CPU once, as its ranks will share it: arithmetic, memory, messages, storage."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed as dist

from halfstep.launcher import topology
from halfstep.launcher.engine.numerics import cpu_fp16
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import hardware
from halfstep.launcher.system import machine
from halfstep.launcher.system.files import write_atomic

_SECONDS = 0.4
"""Of each measurement."""
_MATRIX = 1024
"""Elements of a square matrix's side: large enough for full speed, small enough for the cores' caches."""
_COPY_BYTES = 2**26
_SMALL, _LARGE = 2**12, 2**24
"""Bytes of the all-reduces: what a message costs, and what its bytes cost."""
_FILE_BYTES = 2**28


def measure(target: Path) -> dict[str, Any]:
    """Measure with as many ranks as a run here has, and write the row `this-cpu` to a file; takes some seconds.

    All ranks measure at once, so that each number is one rank's with the others at work. Raises RequestError where the
    file cannot be written.
    """
    ranks = topology.default_ranks_per_node({"DS_ACCELERATOR": "cpu"})
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
            _rank, args=(ranks, folder), nprocs=ranks
        )
        row = dict(torch.load(result, weights_only=True))
    row |= {"match": [], "matmul": 1.0, "measured_ranks": ranks, "node": ranks, "host": os.uname().nodename}
    row["memory"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks
    row["storage"] = _storage(Path.cwd())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, tomli_w.dumps({hardware.THIS_CPU: row}))
    except OSError as error:
        raise RequestError(
            f"cannot be written: {error.strerror}", where=str(target), fix="let XDG_CONFIG_HOME name a folder of yours"
        ) from None
    return row


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(max(1, machine.usable_cores() // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rates: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("half", torch.bfloat16), ("fp16", torch.float16)):
        inputs, weights = torch.randn(2, _MATRIX, _MATRIX).to(dtype)
        cpu_fp16.prepare(name, "cpu", compiled=False)
        dist.barrier()
        # As layers do it: half-precision products the other way round have no fast kernel on some CPUs.
        taken = _repeat(lambda inputs=inputs, weights=weights: torch.nn.functional.linear(inputs, weights))
        rates[name] = 2 * _MATRIX**3 / taken
    source = torch.ones(_COPY_BYTES // 4)
    sink = torch.empty_like(source)
    dist.barrier()
    rates["bandwidth"] = 2 * _COPY_BYTES / _repeat(lambda: sink.copy_(source))
    if ranks > 1:
        small, large = torch.zeros(_SMALL // 4), torch.zeros(_LARGE // 4)
        dist.barrier()
        short = _repeat(lambda: dist.all_reduce(small), times=200)
        long = _repeat(lambda: dist.all_reduce(large), times=20)
        # As communication.seconds reads them: a ring of n sends 2 (n - 1) / n of the bytes.
        rates["link"] = 2 * (ranks - 1) / ranks * _LARGE / max(long - short, 1e-9)
        rates["link_latency"] = short / math.log2(2 * ranks)
    if rank == 0:
        torch.save(rates, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()


def _repeat(work: Callable[[], Any], times: int | None = None) -> float:
    """Return the seconds of one call, over a while or so many times: all ranks of a collective must agree.

    The tenth percentile: what the machine can do when something else does not interrupt it.
    """
    work()
    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(taken) < times if times else time.perf_counter() < end or len(taken) < 3:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 10]


def _storage(folder: Path) -> float:
    block = os.urandom(2**24)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_FILE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _FILE_BYTES / (time.perf_counter() - start)
