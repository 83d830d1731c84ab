"""What a request leaves open: node counts, GPU counts, stages and offloads, planned one by one and then searched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfstep.launcher.config import legal
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.forecast import hardware, memory, search
from halfstep.launcher.plan import estimate, facts
from halfstep.launcher.plan.decide import planned_topology, read_facts
from halfstep.launcher.plan.ds import adopt
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology

_OFFLOADS = ("none", "optimizer-cpu", "cpu")
_MOST_TRIED = 64
"""Node counts, or GPU counts, of one search."""


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """What a search has tried, the fastest that fits first."""

    device: str
    candidates: list[search.Candidate]

    @property
    def fitting(self) -> list[search.Candidate]:
        """Those that may be tried."""
        return [candidate for candidate in self.candidates if candidate.fits]

    def require_fitting(self) -> None:
        """Raise RefusedError with the one that needs least where none fits."""
        if self.fitting:
            return
        least = min(self.candidates, key=lambda candidate: candidate.peak_bytes)
        raise RefusedError(
            f"none of {len(self.candidates)} candidates fits a {self.device}; "
            f"the least needs {least.peak_bytes / 2**30:.1f} GiB",
            where=" ".join(least.arguments()),
            fix="take more nodes, a shorter sequence, or a device with more memory",
        )


def search_open(arguments: Sequence[str]) -> Alternatives:
    """Rank every way to train that a request leaves open by predicted time.

    `arguments` are those of a request, but for `nodes=1,2` and `gpus=8,16`, which name several to try. Raises
    RequestError where no time can be predicted, or a rule forbids all of them.
    """
    device, capacity, world, starts, refused = None, None, None, [], []
    for request, world in _requests(arguments):
        read = read_facts(request.spec, world, on_this_host=world.nodes == 1)
        plan = resolve(request, world, read)
        device = hardware.of(request.spec.hardware, world.device_name, world.accelerator, read.hardware)
        capacity = plan.memory["capacity_bytes"]
        if plan.refused_by:
            refused.append(plan)
        else:
            starts.append(_start(plan, request, adopt.adopt(request, read.ds_config, world)[0]))
    if device is None:
        raise RequestError(
            "there is no time to rank by: the device is not known",
            where="the devices found here" if world and world.accelerator == "cuda" else "this machine's CPU",
            fix="name it with hardware=NAME, or let `halfstep doctor --measure` measure this CPU",
        )
    if not starts:
        _refuse(refused)
    candidates = search.search(starts, device, capacity, memory.forecast)
    if not candidates:
        raise RequestError(
            "no time can be predicted for this model or precision on this device",
            where=f"hardware {device.name}",
            fix="take a model whose configuration is complete, or another precision",
        )
    return Alternatives(device=device.name, candidates=candidates)


def _start(plan: Plan, request: Request, adopted: Request) -> search.Start:
    return search.Start(
        nodes=plan.topology.nodes,
        offload=request.spec.offload,
        workload=estimate.workload_of(plan),
        micro=plan.batch.micro if "batch.micro" in adopted.origins else None,
        checkpointing=plan.activation_checkpointing if "activation_checkpointing" in adopted.origins else None,
    )


def _refuse(refused: list[Plan]) -> None:
    for plan in refused:
        plan.require_allowed()
    raise RequestError("there is nothing to search", where="the command line", fix="name nodes=1 gpus=8")


def _requests(arguments: Sequence[str]) -> Iterator[tuple[Request, Topology]]:
    """Yield one request for every node count, GPU count, stage and offload that is left open."""
    fixed, axes = _axes(arguments)
    for nodes in axes["nodes"]:
        for gpus in axes["gpus_per_node"]:
            sized = [*fixed, *([f"nodes={nodes}"] if nodes else []), *([f"gpus_per_node={gpus}"] if gpus else [])]
            first = load(sized, data=False)
            world = planned_topology(first.spec)
            known, _ = adopt.adopt(first, facts.ds_config(first.spec), world)
            if "batch.global" not in known.origins:  # the default need not divide by so many ranks
                share = -(-known.spec.batch.global_ // world.ranks.data)
                sized.append(f"batch.global={share * world.ranks.data}")
            stages = [known.spec.zero] if "zero" in known.origins else [0, 1, 2, 3]
            offloads = [known.spec.offload] if "offload" in known.origins else list(_OFFLOADS)
            for zero in stages:
                for offload in offloads if world.accelerator == "cuda" else ["none"]:
                    yield load([*sized, f"zero={zero}", f"offload={offload}"], data=False), world


def _axes(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str | None]]]:
    """Take `nodes=1,2` and `gpus=8` (or gpus_per_node) out; raises RequestError for no whole number."""
    axes: dict[str, list[str | None]] = {"nodes": [None], "gpus_per_node": [None]}
    fixed = []
    for argument in arguments:
        key, given, text = argument.partition("=")
        name = "gpus_per_node" if key == "gpus" else key
        if not given or name not in axes:
            fixed.append(argument)
            continue
        values = text.split(",")
        for value in values:
            if not value.isdecimal() or len(value) > 9 or int(value) == 0:
                raise RequestError(
                    f"{key}={legal.shown(text)}: {legal.shown(value)!r} is not a whole number from 1 on",
                    where="the command line",
                    fix=f"write {key}=8, or {key}=1,2,4 to try several",
                )
        if len(values) > _MOST_TRIED:
            raise RequestError(
                f"{key} has {len(values)} values to try", where="the command line", fix=f"try at most {_MOST_TRIED}"
            )
        axes[name] = list(values)
    return fixed, axes
