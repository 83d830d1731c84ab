"""Bring the ranks together: the process group, and errors that all ranks share."""

import contextlib
import datetime
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from launcher.engine import opcache
from launcher.errors import Fault, HalfstepError, RefusedError, TopologyError
from launcher.plan.plan import Plan
from launcher.topology import Rank


def join(rank: Rank, plan: Plan) -> None:
    """Join the process group."""
    # DeepSpeed prints to stdout while it is imported and while it connects; a run's output is ours to write.
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        # DeepSpeed calls these thousands of times under their old names (comm/torch.py).
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        quiet_deepspeed()
        if plan.topology.accelerator == "cuda" and not torch.cuda.is_available():
            raise RefusedError(
                f"the plan is for a GPU, and torch {torch.__version__} cannot use one here",
                where="torch.cuda.is_available()",
                fix="install a torch build for CUDA, or plan for CPU ranks: DS_ACCELERATOR=cpu, without hardware=",
            )
        opcache.load_operators(["ShareMemCommBuilder"] if plan.topology.accelerator == "cpu" else [])
        try:
            deepspeed.init_distributed(verbose=False)
        except (dist.DistError, RuntimeError) as error:
            raise TopologyError(
                f"rank {rank.rank} of {rank.world_size} cannot meet the others: {str(error).splitlines()[0]}",
                where=f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}",
                fix="check that the address can be reached and the port is free (`deepspeed --master_port N`)",
            ) from error
    if plan.topology.accelerator == "cuda":
        torch.cuda.set_device(device(rank, plan))
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].partition(",")[0]))
    set_timeouts(max(plan.watch.startup, plan.watch.timeout))


def set_timeouts(seconds: float) -> None:
    """Give every process group a timeout: DeepSpeed's and torch's own reaches only the one of the whole world (T25).

    It is twice that of the watch, which sees more and comes first. Call it when the engine has made its groups.
    """
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(datetime.timedelta(seconds=2 * seconds), group)


def quiet_deepspeed(log: Path | None = None) -> None:
    """Send DeepSpeed's log lines to a rank's log file, or nowhere until there is one."""
    logger = logging.getLogger("DeepSpeed")
    handler = logging.FileHandler(log, encoding="utf-8") if log else logging.NullHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s"))
    for other in (logger, logging.getLogger("transformers")):
        for old in list(other.handlers):
            other.removeHandler(old)
        other.addHandler(handler)
        other.propagate = False


def device(rank: Rank, plan: Plan) -> torch.device:
    """Return the device of this rank."""
    if plan.topology.accelerator == "cuda":
        return torch.device("cuda", rank.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result everywhere; what it raises is raised on every rank."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [action()]
        except HalfstepError as error:
            result = [error]
        except Exception as error:  # whatever it is, the others must hear of it, or they would wait for ever
            if "--debug" in sys.argv:
                traceback.print_exc()
            result = [Fault.of(error, where="rank 0")]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], HalfstepError):
        result[0].said_elsewhere = dist.get_rank() != 0
        raise result[0]
    return result[0]


def leave() -> None:
    """Leave the process group."""
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
