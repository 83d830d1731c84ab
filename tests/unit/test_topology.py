"""Ranks from whoever set them, and what is set for torch and DeepSpeed."""

import pytest

from halfstep.launcher import topology
from halfstep.launcher.errors import TopologyError
from halfstep.launcher.system import machine


def test_nobody_numbered_this_process() -> None:
    rank = topology.from_environment({"PATH": "/bin"})
    assert (rank.rank, rank.world_size, rank.source) == (0, 1, "none")


def test_ranks_of_deepspeed_torchrun_and_accelerate() -> None:
    rank = topology.from_environment({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert (rank.rank, rank.local_rank, rank.world_size, rank.local_world_size, rank.source) == (3, 1, 4, 2, "launcher")


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[03-04]",
}


def test_ranks_of_srun() -> None:
    rank = topology.from_environment(SRUN)
    assert (rank.rank, rank.local_rank, rank.world_size, rank.local_world_size, rank.source) == (3, 1, 4, 2, "srun")


def test_a_batch_shell_is_not_a_rank_of_srun() -> None:
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert topology.from_environment(shell).source == "none"


def test_ranks_of_mpirun() -> None:
    rank = topology.from_environment(
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    )
    assert (rank.rank, rank.local_rank, rank.world_size, rank.source) == (1, 1, 2, "mpirun")


@pytest.mark.parametrize("environment", [
    {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "0", "LOCAL_RANK": "5", "WORLD_SIZE": "2"},
])  # fmt: skip
def test_ranks_that_cannot_be_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(TopologyError):
        topology.from_environment(environment)


def test_srun_ranks_agree_on_an_address_and_a_port() -> None:
    environments = []
    for number in ("0", "3"):
        environment = {**SRUN, "SLURM_PROCID": number, "SLURM_LOCALID": "0"}
        topology.prepare_environment(topology.from_environment(environment), environment)
        environments.append((environment["MASTER_ADDR"], environment["MASTER_PORT"], environment["WORLD_SIZE"]))
    assert environments == [("n03", str(20000 + (77 * 16 + 2) % 12000), "4")] * 2


@pytest.mark.parametrize(
    ("nodes", "first"), [("n[03-07,9],m1", "n03"), ("a-1", "a-1"), ("x,y", "x"), ("gpu-[1,3]", "gpu-1")]
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    environment = {**SRUN, "SLURM_STEP_NODELIST": nodes}
    topology.prepare_environment(topology.from_environment(environment), environment)
    assert environment["MASTER_ADDR"] == first


def test_threads_default_to_cores_over_ranks_and_are_left_alone_when_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "4"}
    environment = dict(world)
    topology.prepare_environment(topology.from_environment(environment), environment)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "LOCAL_SIZE" not in environment, "DeepSpeed would leave shared memory behind"
    environment = {**world, "OMP_NUM_THREADS": "1"}
    topology.prepare_environment(topology.from_environment(environment), environment)
    assert environment["OMP_NUM_THREADS"] == "1"


def test_ranks_other_than_the_planned_ones_are_refused_with_both_numbers() -> None:
    rank = topology.from_environment({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})
    topology.check(rank, 2, None, None)
    topology.check(rank, 2, 1, 2)
    with pytest.raises(TopologyError, match=r"2 rank\(s\) were started, 4 were planned"):
        topology.check(rank, 4, None, None)
    with pytest.raises(TopologyError, match=r"2 rank\(s\) were started, 6 were planned"):
        topology.check(rank, 2, 3, 2)


def test_the_processes_of_a_world_share_the_batch() -> None:
    world = topology.Topology(world_size=8, ranks_per_node=4, accelerator="cpu")
    assert (world.ranks, world.ranks.world_size) == (topology.Ranks(data=8), 8)
    assert topology.Ranks(data=2, model=4, sequence=3).world_size == 24


def test_a_request_that_names_no_ranks_gets_those_that_would_be_started_here() -> None:
    nowhere = {"DS_ACCELERATOR": "cpu"}
    assert topology.local_topology(2, 3, nowhere).world_size == 6
    here = topology.local_topology(None, None, nowhere)
    assert here.world_size == here.ranks_per_node == topology.default_ranks_per_node(nowhere)
