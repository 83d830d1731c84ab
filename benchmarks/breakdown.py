"""Where the time of a step goes: a trace of torch's profiler, added up by kind of kernel.

A kernel belongs to the kind that its own name tells, or that one of the operators around its launch does. On a CPU,
which has no kernels, the operators' own time stands for them.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

KINDS = ("matmul", "attention", "loss", "norm and elementwise", "optimizer", "communication", "copies")
_REST = "norm and elementwise"

_ATTENTION = r"flash|fmha|sdpa|attention"
# By the kernel's own name first: an attention kernel of cuDNN or CUTLASS is a matrix product, too, and a fused head
# and loss runs its products inside the loss.
_BY_KERNEL = (
    ("communication", r"nccl|gloo:|c10d::|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", _ATTENTION),
    ("matmul", r"gemm|gemv|nvjet|cublas|xmma|wgmma|cutlass|triton_tem|splitk"),
    ("optimizer", r"adam|multi_tensor_apply"),
    ("loss", r"cross_entropy|log_softmax|nll_loss"),
)
_BY_OPERATOR = (
    ("optimizer", r"Optimizer\.|_fused_adam|_foreach_|optimizer_step"),
    ("attention", _ATTENTION),
    ("loss", r"cross_?entropy|nll_loss|log_softmax"),
    ("copies", r"^aten::(copy_|_to_copy|cat|clone|fill_|zero_|contiguous)$|^Memcpy|^Memset"),
    ("matmul", r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|_addmm_activation)$|^mkldnn::|::_linear"),
)
_COPIED = r"^Memcpy|^Memset|copy_kernel|CatArray|FillFunctor"


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """One step; all in seconds."""

    kinds: dict[str, float]
    """By kind of kernel; they add up to more than `busy` where kernels run side by side."""
    busy: float
    """In which at least one kernel runs."""
    kernels: float
    """How many."""
    longest: list[tuple[str, float]]
    """The kernels that take most, by name."""
    on: str
    """`cuda`, or `cpu` where operators stand for kernels."""

    def to_dict(self, step_seconds: float | None) -> dict[str, Any]:
        """Return it JSON-able; what is left of a step that was timed without the profiler is time the device waits."""
        waits = None if step_seconds is None else max(0.0, step_seconds - self.busy)
        return {
            "on": self.on,
            "seconds_by_kind": self.kinds,
            "busy_seconds": self.busy,
            "step_seconds": step_seconds,
            "waits_seconds": waits,
            "kernels": self.kernels,
            "longest": [{"name": name[:120], "seconds": seconds} for name, seconds in self.longest],
        }


def kind_of(name: str, operators: tuple[str, ...] = ()) -> str:
    """Return the kind of a kernel, by its name and those of the operators around its launch, innermost first."""
    for kind, pattern in _BY_KERNEL:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    for kind, pattern in _BY_OPERATOR[:3]:
        if any(re.search(pattern, operator, re.IGNORECASE) for operator in operators):
            return kind
    if re.search(_COPIED, name):
        return "copies"
    for kind, pattern in _BY_OPERATOR[3:]:
        if any(re.search(pattern, operator, re.IGNORECASE) for operator in (name, *operators[:1])):
            return kind
    return _REST


def of_trace(trace: dict[str, Any], steps: int) -> Breakdown:
    """Return the breakdown of a Chrome trace of so many steps; raises ValueError where nothing ran."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans, chains = _launches(events)
    device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device:
        work = [
            (event["name"], chains.get(event.get("args", {}).get("correlation"), ()), event["ts"], event["dur"])
            for event in device
        ]
        busy, on = _union([(start, start + lasted) for _, _, start, lasted in work]), "cuda"
    else:
        work, on = spans, "cpu"
        busy = sum(lasted for *_, lasted in work)
    if not work:
        raise ValueError("the trace holds neither kernels nor operators")
    kinds, names = dict.fromkeys(KINDS, 0.0), defaultdict(float)
    scale = 1e-6 / steps
    for name, operators, _, lasted in work:
        kinds[kind_of(name, operators)] += lasted * scale
        names[name] += lasted * scale
    longest = sorted(names.items(), key=lambda pair: -pair[1])[:10]
    return Breakdown(kinds=kinds, busy=busy * scale, kernels=len(work) / steps, longest=longest, on=on)


def _launches(events: list[dict[str, Any]]) -> tuple[list[tuple[str, tuple[str, ...], float, float]], dict]:
    """Return the operators with their own time, and around each launch of a kernel the names of its operators."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[event.get("tid")].append(event)
    spans: list[list[Any]] = []
    chains: dict[Any, tuple[str, ...]] = {}
    for thread in threads.values():
        open_: list[tuple[float, str, list[Any] | None]] = []  # end, name, its span
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while open_ and open_[-1][0] <= event["ts"]:
                open_.pop()
            above = tuple(name for _, name, _ in reversed(open_))
            if event["cat"].startswith("cuda_"):
                chains[event.get("args", {}).get("correlation")] = above
                continue
            span = None
            if event["cat"] == "cpu_op":
                span = [event["name"], above, event["ts"], event["dur"]]
                spans.append(span)
                parent = next((parent for _, _, parent in reversed(open_) if parent is not None), None)
                if parent is not None:
                    parent[3] -= event["dur"]
            open_.append((event["ts"] + event["dur"], event["name"], span))
    return [(name, above, start, max(0.0, own)) for name, above, start, own in spans], chains


def _union(intervals: list[tuple[float, float]]) -> float:
    """Return the length of what the intervals cover."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
