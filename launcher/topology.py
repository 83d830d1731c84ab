"""Which processes take part, and on what: ranks from whoever set them, devices from what is there."""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from halfstep.launcher.errors import TopologyError
from halfstep.launcher.system import machine
from halfstep.launcher.system.limits import allow_open_files, check_numbers
from halfstep.launcher.system.nodelist import hosts

# Rank, local rank, world size, local world size, in the words of each starter. `deepspeed`, `torchrun` and
# `accelerate launch` all use the first row; the SLURM row is what a bare `srun` sets; the last is Open MPI's.
_RANK_VARIABLES = {
    "launcher": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
_MOST_RANKS = 2**20
"""Of one run: a number beyond is none of ranks."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How the processes of a run divide its work: their number is the product."""

    data: int
    """Which share the sequences of a batch."""
    model: int = 1
    """Which share a layer."""
    sequence: int = 1
    """Which share the tokens of a sequence."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.data * self.model * self.sequence


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The world a plan is made for: the same on every rank of it."""

    world_size: int
    """Processes in all; what divides a batch among them asks for `ranks.data`."""
    ranks_per_node: int
    """Ranks on each node."""
    accelerator: str
    """`cuda` or `cpu`."""
    fused_adam: bool = False
    """Whether DeepSpeed's own Adams can be built here: a GPU, and a CUDA compiler beside it."""
    device_name: str = ""
    """What the device calls itself, empty where unknown."""

    @property
    def ranks(self) -> Ranks:
        """How they divide the work: by data alone, the one kind of parallelism there is yet."""
        return Ranks(data=self.world_size)

    @property
    def nodes(self) -> int:
        """Hosts that take part."""
        return max(1, self.world_size // self.ranks_per_node)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process's place in the world, and who assigned it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    source: str
    """`launcher`, `srun`, `mpirun`, or `none` for a process started by hand."""


def from_environment(environ: Mapping[str, str] = os.environ) -> Rank:
    """Read this process's rank from its starter's variables; a process nobody numbered is a world of one.

    Raises TopologyError where the variables are incomplete, no numbers, or contradict each other.
    """
    for source, names in _RANK_VARIABLES.items():
        rank_name, local_name, world_name, local_world_name = names
        if rank_name not in environ or world_name not in environ:
            continue
        if source == "srun" and "SLURM_STEP_ID" not in environ:
            continue  # inside an allocation but not under srun: sbatch sets SLURM_PROCID=0 for its own shell
        rank, world_size = _number(environ, rank_name), _number(environ, world_name)
        # The deepspeed launcher says LOCAL_SIZE where the others say LOCAL_WORLD_SIZE.
        local_size = _number(environ, "LOCAL_SIZE", default=world_size) if source == "launcher" else world_size
        local_world_size = _number(environ, local_world_name, default=local_size)
        local_rank = _number(environ, local_name, default=rank % max(1, local_world_size))
        if world_size > _MOST_RANKS:
            raise TopologyError(
                f"a world of {world_size} ranks is more than the {_MOST_RANKS} that any run has",
                where=f"{world_name} in the environment",
                fix=f"unset {world_name}, or let the launcher set it",
            )
        if not 0 <= rank < world_size or not 0 <= local_rank < max(local_world_size, 1):
            raise TopologyError(
                f"rank {rank} (local {local_rank} of {local_world_size}) does not fit a world of {world_size}",
                where=f"{rank_name}, {local_name}, {world_name}, {local_world_name} in the environment",
                fix="start the ranks with one of deepspeed, torchrun, accelerate launch or srun, not with two at once",
            )
        return Rank(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            source=source,
        )
    return Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, source="none")


def check(rank: Rank, planned: int, nodes: int | None, ranks_per_node: int | None) -> None:
    """Compare the ranks that were started with the plan's and with those the request names, if it does.

    Raises TopologyError with both numbers.
    """
    asked = (nodes or 1) * ranks_per_node if ranks_per_node else None
    for wanted, origin in ((planned, "plan.json"), (asked, "nodes x gpus_per_node")):
        if wanted is not None and wanted != rank.world_size:
            raise TopologyError(
                f"{rank.world_size} rank(s) were started, {wanted} were planned",
                where=f"the environment ({rank.source}) against {origin}",
                fix=f"start {wanted} rank(s), or ask for {rank.world_size}: nodes=N gpus_per_node=M",
            )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    # SLURM_STEP_TASKS_PER_NODE reads "2(x3)" for three nodes of two: its first number is what counts here.
    pattern = r"(-?[0-9]{1,18})(\(x[0-9]+\))?(,.*)?" if name.endswith("TASKS_PER_NODE") else r"(-?[0-9]{1,18})"
    number = re.fullmatch(pattern, text.strip())
    if number is None:
        raise TopologyError(
            f"{name}={text[:80]!r} is not a whole number",
            where="the environment of this process",
            fix=f"unset {name}, or let the launcher set it",
        )
    return int(number[1])


def default_ranks_per_node(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks to start here unless told: one for each GPU, else two on a CPU that has two cores."""
    return machine.gpu_count(environ) or min(2, machine.usable_cores())


def describe(world_size: int, ranks_per_node: int, environ: Mapping[str, str] = os.environ) -> Topology:
    """Describe a world of `world_size` ranks whose nodes are like this one."""
    on_gpu = machine.gpu_count(environ) > 0
    return Topology(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        accelerator="cuda" if on_gpu else "cpu",
        fused_adam=on_gpu and machine.has_cuda_compiler(environ),
        device_name=machine.device_name() if on_gpu else "",
    )


def local_topology(nodes: int | None, ranks_per_node: int | None, environ: Mapping[str, str] = os.environ) -> Topology:
    """Describe the ranks that a request names, on nodes like this one; what it leaves open is as it is started here."""
    ranks_per_node = ranks_per_node or default_ranks_per_node(environ)
    return describe((nodes or 1) * ranks_per_node, ranks_per_node, environ)


def prefer_cpu(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell DeepSpeed that there is no GPU, where there is none; left to itself it looks for other devices first."""
    if machine.gpu_count(environ) == 0:
        environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_environment(rank: Rank, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what torch and DeepSpeed read at import, where the starter left it unset.

    Threads per rank default to cores / ranks: left alone, every rank takes all cores and two ranks on two cores run at
    half speed. DeepSpeed looks for mpi4py unless all five rendezvous variables stand (comm/comm.py, init_distributed).
    """
    prefer_cpu(environ)
    environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.usable_cores() // max(1, rank.local_world_size))))
    gpus = machine.gpu_count(environ)
    if gpus > 1 and rank.local_world_size > gpus:
        raise TopologyError(
            f"{rank.local_world_size} ranks on this host share {gpus} GPUs",
            where=f"the environment set by {rank.source}, and CUDA_VISIBLE_DEVICES",
            fix=f"start {gpus} ranks on this host, one for each GPU",
        )
    # DeepSpeed takes LOCAL_RANK for the device; where each task sees only its own GPU, that one is number 0.
    device = 0 if gpus == 1 else rank.local_rank
    environ["RANK"], environ["LOCAL_RANK"] = str(rank.rank), str(device)
    environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"] = str(rank.world_size), str(rank.local_world_size)
    if rank.source == "srun":
        # Every rank works the same address out of the same variables, so that no ssh and no hostfile is needed.
        environ.setdefault("MASTER_ADDR", hosts(environ.get("SLURM_STEP_NODELIST") or "127.0.0.1")[0])
        job = _number(environ, "SLURM_JOB_ID", default=0) * 16 + _number(environ, "SLURM_STEP_ID", default=0)
        environ.setdefault("MASTER_PORT", str(20000 + job % 12000))
    elif rank.world_size == 1:
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(machine.free_port()))
    # What stays on this host need not be heard by any other; gloo would take the address of the host's name.
    if rank.world_size == rank.local_world_size and _has_loopback():
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    check_numbers(environ)
    allow_open_files()
    # With LOCAL_SIZE set, DeepSpeed leaves 69 MB of shared memory behind for every killed CPU rank.
    environ.pop("LOCAL_SIZE", None)


def _has_loopback() -> bool:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        return "lo" in [name for _, name in socket.if_nameindex()]
    except OSError:
        return False
