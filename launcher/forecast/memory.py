"""How much memory a rank will need, term by term, in which phase, and whether that is there."""

from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.launcher.forecast import tensors as cuts
from halfstep.launcher.forecast.activations import activations
from halfstep.launcher.forecast.answering import Asking
from halfstep.launcher.forecast.phases import Buffer, Phase, answers, phases
from halfstep.launcher.forecast.states import FULL, States, states
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.system.heap import MAPPED

# What a rank's memory is beyond its tensors: libraries, allocators, CUDA and its communicators. The constants of CPU
# ranks are fitted by `benchmarks/measure_memory.py --fit` to runs of its own; those of GPUs within torch to the rows of
# benchmarks/results/memory-nvidia-h200.json, those outside of it are published ranges (docs/planner.md, Memory).
MIB = 1 << 20

CPU_RANK = 409 * MIB
"""A rank with torch, transformers, DeepSpeed and gloo, and what the C heap keeps (launcher/system/heap.py)."""
CPU_RANK_SHARDED = 45 * MIB
"""More at stages 1 to 3: DeepSpeed imports its Muon there to ask for its type, which compiles (zero/utils.py)."""
CPU_HEAP = 1.26
"""Bytes of the C heap for a byte of activations in tensors that it serves, where it keeps them: with the holes."""
CPU_ERROR = (0.07, 0.07)
"""The band below and above a CPU rank's peak: the farthest of the measured rows."""

CUDA_CONTEXT = 750 * MIB
"""0.5 to 1.8 GiB by GPU and torch: Stas Bekman, Machine Learning Engineering Open Book. BigScience: 1113 MiB, V100."""
NCCL = 1024 * MIB
"""1 to 2 GiB more with torch.distributed: the same book."""
CUDA_SLACK = 0.045
"""What torch's allocator reserves beyond what is allocated, of that: stage 2 on an H200, 4.0 to 4.8 %."""
BROKEN_BLOCK = 0.5
"""Of the logits, what is reserved once more where a step ends with flat fp32 copies in 16-bit runs: they are put into
the block that the logits' gradient has left, and the next one finds no room in what remains. Fitted to the H200's rows
of stages 0 and 1 and of an offloaded optimizer, which lie 0.3 to 0.6 logits above the others; not traced."""
CUDA_ERROR = (0.07, 0.12)
"""The band below and above a GPU's peak: the H200's rows lie within 3 %, published runs up to 8 % above."""
CUDA_HOST = 3072 * MIB
"""Host memory of a rank that drives a GPU: its libraries. An assumption."""
UNKNOWN_FAMILY = 0.5
"""How much more a model whose activations are not known may need."""

FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"


@dataclass(frozen=True, kw_only=True)
class Term:
    """One line of a forecast."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one rank needs. On CPU ranks device and host are one memory, and everything is a device term."""

    device: tuple[Term, ...]
    """What lies on the device at the peak; the terms add up to `peak_bytes` and `outside_bytes`."""
    host: tuple[Term, ...]
    peak_at: str
    """The phase of the peak."""
    by_phase: dict[str, int]
    """The peak of every phase, in bytes, without what lies outside."""
    allocated_bytes: int
    """Tensors alone."""
    peak_bytes: int
    """What the run will call its peak: on a GPU most reserved by torch, on a CPU the high-water resident size."""
    low_bytes: int
    high_bytes: int
    outside_bytes: int
    """On a GPU, what torch does not count: the CUDA context, NCCL."""
    states: States
    capacity_bytes: int | None = None
    """What a rank has, if that was said."""

    def verdict(self, capacity_bytes: int | None = None) -> str | None:
        """Say whether a rank that has so much memory can do it: `fits`, `tight`, `does not fit`; None if not known."""
        capacity_bytes = self.capacity_bytes if capacity_bytes is None else capacity_bytes
        if capacity_bytes is None:
            return None
        if self.low_bytes + self.outside_bytes > capacity_bytes:
            return TOO_LARGE
        return FITS if self.high_bytes + self.outside_bytes <= capacity_bytes else TIGHT

    @property
    def host_bytes(self) -> int:
        """All host terms."""
        return sum(term.bytes for term in self.host)


def forecast(workload: Workload, *, capacity_bytes: int | None = None, tasks: Sequence[Asking] = ()) -> Forecast:
    """Return the forecast of a workload; of a family that is not known, without activations and with a wider band.

    Answers to `tasks`, of which only an upper bound is known, count for the peak and not for the least that is needed.
    """
    every, held = phases_on(workload, tasks), states(workload)
    on_cpu = workload.accelerator == "cpu"
    offloaded = _offloaded(workload, held)
    reserved = () if on_cpu else _reserved_for_good(workload, held)
    peaks = _cpu_peaks(workload, every) if on_cpu else _cuda_peaks(every, sum(term.bytes for term in reserved))
    worst = max(every, key=lambda phase: peaks[phase.name])
    peak = peaks[worst.name]
    least = max(peaks[phase.name] for phase in phases_on(workload))
    terms = [Term(**vars(buffer)) for buffer in worst.buffers if buffer.bytes]
    outside = 0
    if on_cpu:
        terms.append(Term(name="framework", bytes=peak - worst.bytes, note="Python, torch, DeepSpeed, gloo, C heap"))
        low, high = 1 - CPU_ERROR[0], 1 + CPU_ERROR[1]
    else:
        outside = CUDA_CONTEXT + (NCCL if workload.ranks > 1 else 0)
        slack = peak - worst.bytes - sum(term.bytes for term in reserved)
        terms += [Term(name="allocator slack", bytes=slack, note="reserved and not in use"), *reserved]
        terms += _cuda_overheads(workload)
        low, high = 1 - CUDA_ERROR[0], 1 + CUDA_ERROR[1]
    if workload.shape is None:
        high += UNKNOWN_FAMILY
    return Forecast(
        device=tuple(terms),
        host=() if on_cpu else _host(workload, offloaded),
        peak_at=worst.name,
        by_phase=peaks,
        allocated_bytes=worst.bytes,
        peak_bytes=peak,
        low_bytes=int(least * low),
        high_bytes=int(peak * high),
        outside_bytes=outside,
        states=held,
        capacity_bytes=capacity_bytes,
    )


def phases_on(workload: Workload, tasks: Sequence[Asking] = ()) -> tuple[Phase, ...]:
    """Return the phases of a run, and on CPU ranks, whose host is their device, with what is offloaded."""
    answered = answers(workload, tasks)
    every = phases(workload) if answered is None else (*phases(workload), answered)
    if workload.accelerator != "cpu":
        return every
    offloaded = _offloaded(workload, states(workload))
    return tuple(Phase(name=phase.name, buffers=(*phase.buffers, *offloaded)) for phase in every)


def _offloaded(workload: Workload, held: States) -> tuple[Buffer, ...]:
    """Return what lies in host memory for the device's sake."""
    buffers = (
        Buffer("offloaded masters", held.host_masters, "fp32, a shard"),
        Buffer("offloaded moments", held.host_moments, "fp32, a shard"),
        Buffer("offloaded weight average", held.host_average, "fp32, a shard"),
        Buffer("offloaded gradients", held.host_gradients, "fp32, a shard"),
        Buffer("offloaded weights", held.host_weights, f"{workload.precision}, a shard"),
    )
    return tuple(buffer for buffer in buffers if buffer.bytes)


def _cpu_peaks(workload: Workload, every: tuple[Phase, ...]) -> dict[str, int]:
    """Return the resident size in every phase: what is large goes back to the system when it is freed (heap.py)."""
    beside = _rank_bytes(workload)
    return {phase.name: beside + phase.bytes for phase in every}


def _rank_bytes(workload: Workload) -> int:
    """Return what a CPU rank takes beside its tensors."""
    sharded = CPU_RANK_SHARDED if workload.zero else 0
    return CPU_RANK + sharded + int(CPU_HEAP * heap_bytes(workload))


def heap_bytes(workload: Workload) -> int:
    """Return the bytes of activations whose pages the C heap keeps: it does where gradients lie there among them."""
    if workload.shape is None or workload.element_bytes * 3 * workload.shape.width**2 >= MAPPED:
        return 0
    return activations(workload).heap


def _cuda_peaks(every: tuple[Phase, ...], reserved: int) -> dict[str, int]:
    return {phase.name: int(phase.bytes * (1 + CUDA_SLACK)) + reserved for phase in every}


def _reserved_for_good(workload: Workload, held: States) -> tuple[Term, ...]:
    """Return what torch's allocator once reserved and cannot give to what lies on the device at the peak."""
    terms = []
    if workload.zero == 3 and workload.overlap_comm:
        # A stream has blocks of its own: what is made on stage 3's (stage3.py, reduce_and_partition_stream; the
        # coordinator's allgather stream) serves nothing else afterwards.
        aside = _flat_bucket_bytes(workload)
        if workload.precision == "fp16" and workload.offload_optimizer == "none":
            aside += held.masters  # has_overflow: torch.isinf makes a copy of all gradients
        if workload.offload_param != "none":
            aside += (workload.parameters // workload.ranks + workload.prefetch_bucket) * workload.element_bytes
        terms.append(Term(name="side streams", bytes=aside, note="reserved for the streams that send, kept by them"))
    flat_copies = workload.zero in (0, 1) or workload.offload_optimizer != "none"
    if workload.element_bytes == 2 and workload.zero < 3 and flat_copies:
        size = int(BROKEN_BLOCK * activations(workload).logits)
        terms.append(Term(name="broken-up blocks", bytes=size, note="of the size of the logits"))
    return tuple(term for term in terms if term.bytes)


def _flat_bucket_bytes(workload: Workload) -> int:
    """Return the bytes of one bucket that is reduced flat."""
    filled = cuts.fullest(cuts.trained(workload), workload.reduce_bucket)
    return filled * (FULL if workload.communication_dtype == "fp32" else 2)


def _cuda_overheads(workload: Workload) -> list[Term]:
    terms = [Term(name="CUDA context", bytes=CUDA_CONTEXT, note="outside of what torch counts")]
    if workload.ranks > 1:
        terms.append(Term(name="NCCL", bytes=NCCL, note="outside of what torch counts"))
    return terms


def _host(workload: Workload, offloaded: tuple[Buffer, ...]) -> tuple[Term, ...]:
    """Return the host memory of a rank that drives a GPU."""
    terms = [Term(name="framework", bytes=CUDA_HOST, note="Python, torch, CUDA's libraries; an assumption")]
    terms += [Term(name=buffer.name, bytes=buffer.bytes, note=f"{buffer.note}, pinned") for buffer in offloaded]
    largest = cuts.of(workload.shape, workload.parameters).largest
    terms.append(Term(name="checkpoint staging", bytes=FULL * largest, note="one tensor in fp32, to the disk"))
    if workload.zero < 3:
        size = workload.element_bytes * workload.parameters
        terms.append(Term(name="model as built", bytes=size, note="drawn on the host, then moved; only at the start"))
    return tuple(terms)
