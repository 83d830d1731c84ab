"""The command line that starts a run's ranks on this host, one function for each starter."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system import assets
from halfstep.launcher.system.machine import free_port

Starter = Callable[[Plan, Path], list[str]]
ACCELERATE_CONFIG = ("--config_file", str(Path(__file__).with_name("accelerate.yaml")))


def tool(name: str, module: str) -> list[str]:
    """Return how to call a tool of this Python: the script beside the interpreter, else its module."""
    script = Path(sys.executable).parent / name
    return [str(script)] if script.exists() else [sys.executable, "-m", module]


def script_words(run: Path) -> list[str]:
    """Return what a starter is given to start: our script and the run directory."""
    # Not --run: torchrun, and accelerate through it, take that for a short form of their own --run-path and eat it.
    return [str(assets.train_script()), f"run={run}"]


def deepspeed(plan: Plan, run: Path) -> list[str]:
    """Return the `deepspeed` command; the port is free now, where its default 29500 is everybody's (T24).

    With --num_gpus it ignores CUDA_VISIBLE_DEVICES (launcher/runner.py, main): where that is set, devices are named.
    """
    command = tool("deepspeed", "deepspeed.launcher.runner")
    ranks = plan.topology.ranks_per_node
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if plan.topology.accelerator == "cuda" else None
    # Without --hostfile it takes /job/hostfile, which many images have, and then starts ranks over ssh (runner.py).
    hostfile = ["--hostfile", os.devnull]
    devices = ["--num_gpus", str(ranks)]
    if visible:
        chosen = [device.strip() for device in visible.split(",")][:ranks]
        if not all(device.isdigit() for device in chosen):
            raise RequestError(
                "the deepspeed launcher knows GPUs by number only",
                where=f"CUDA_VISIBLE_DEVICES={visible}",
                fix="start with --with torchrun, or give the numbers that nvidia-smi shows",
            )
        devices = ["--include", f"localhost:{','.join(chosen)}"]
    quiet = ["--log_level", "error"]  # its own lines about processes and ports would bury the run's
    return [*command, *devices, "--master_port", str(free_port()), *quiet, *hostfile, *script_words(run)]


def torchrun(plan: Plan, run: Path) -> list[str]:
    """Return the `torchrun` command; --standalone finds its own port."""
    command = tool("torchrun", "torch.distributed.run")
    ranks = ["--nproc_per_node", str(plan.topology.ranks_per_node)]
    return [*command, "--standalone", "--nnodes", "1", *ranks, *script_words(run)]


def accelerate(plan: Plan, run: Path) -> list[str]:
    """Return the `accelerate launch` command.

    Also on CPU it takes --multi_gpu to start several ranks: with --cpu it starts one, whatever --num_processes says.
    The user's own default configuration is not read: it may name other machines, GPUs and DeepSpeed settings.
    """
    ranks = plan.topology.ranks_per_node
    spread = ["--multi_gpu"] if ranks > 1 else []
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(free_port())]
    command = tool("accelerate", "accelerate.commands.accelerate_cli")
    return [
        *command,
        "launch",
        *ACCELERATE_CONFIG,
        *spread,
        "--num_processes",
        str(ranks),
        *options,
        *script_words(run),
    ]


STARTERS: dict[str, Starter] = {"deepspeed": deepspeed, "torchrun": torchrun, "accelerate": accelerate}
