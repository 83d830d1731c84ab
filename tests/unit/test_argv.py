"""The command lines that start a run, word for word."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher import topology
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.submit import argv
from halfstep.launcher.system import assets, machine
from halfstep.launcher.topology import Topology

Make = Callable[..., Plan]
RUN = Path("/runs/it's one")
GPUS = Topology(world_size=2, ranks_per_node=2, accelerator="cuda")


@pytest.fixture(autouse=True)
def _one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argv, "free_port", lambda: 12345)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def arguments_of(starter: str, plan: Plan) -> list[str]:
    command = argv.STARTERS[starter](plan, RUN)
    assert command[-2:] == [str(assets.train_script()), f"run={RUN}"]
    assert Path(command[0]).name == starter
    return command[1:-2]


def test_each_starter_is_given_the_planned_ranks(plan: Make) -> None:
    made = plan()
    assert arguments_of("deepspeed", made) == [
        "--num_gpus", "2", "--master_port", "12345", "--log_level", "error", "--hostfile", "/dev/null"
    ]  # fmt: skip
    assert arguments_of("torchrun", made) == ["--standalone", "--nnodes", "1", "--nproc_per_node", "2"]
    assert arguments_of("accelerate", made) == [
        "launch", *argv.ACCELERATE_CONFIG, "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "12345",
    ]  # fmt: skip


def test_accelerate_starts_one_rank_without_multi_gpu(plan: Make) -> None:
    made = plan(topology=Topology(world_size=1, ranks_per_node=1, accelerator="cpu"))
    assert "--multi_gpu" not in arguments_of("accelerate", made)


def test_deepspeed_is_told_which_gpus_where_they_were_chosen(plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert arguments_of("deepspeed", plan(topology=GPUS))[:2] == ["--include", "localhost:4,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f1e,MIG-2")
    with pytest.raises(RequestError, match="by number only"):
        argv.deepspeed(plan(topology=GPUS), RUN)


def test_more_ranks_than_gpus_are_refused_and_a_single_visible_gpu_is_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda environ: 2)
    four = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}
    with pytest.raises(RequestError, match="4 ranks on this host share 2 GPUs"):
        topology.prepare_environment(topology.from_environment(four), four)
    monkeypatch.setattr(machine, "gpu_count", lambda environ: 1)
    four["LOCAL_SIZE"] = "4"
    topology.prepare_environment(topology.from_environment(four), four)
    assert four["LOCAL_RANK"] == "0"
