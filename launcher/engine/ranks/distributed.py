"""Bring the ranks together: the process group, and errors that all ranks share."""

import contextlib
import datetime
import io
import json
import logging
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from halfstep.launcher import fault_injection
from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.errors import Fault, HalfstepError, RefusedError, TopologyError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system import caches
from halfstep.launcher.topology import Rank


def join(rank: Rank, plan: Plan, store: Store) -> None:
    """Join the process group, which meets at a store; raises TopologyError where the ranks cannot meet."""
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
        opcache.prepare()
        fault_injection.hit("jit", rank=rank.rank)
        c10d._unpickler = PlainUnpickler
        _check_interface()
        try:
            _open_group(rank, plan, store)
            deepspeed.init_distributed(verbose=False)
        except (dist.DistError, RuntimeError) as error:
            raise TopologyError(
                f"rank {rank.rank} of {rank.world_size} cannot meet the others: {str(error).splitlines()[0]}",
                where=f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}",
                fix="can the hosts reach each other? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface",
            ) from error
    if plan.topology.accelerator == "cuda":
        torch.cuda.set_device(device(rank, plan))
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].partition(",")[0]))
    set_timeouts(max(plan.watch.startup, plan.watch.timeout))


def _open_group(rank: Rank, plan: Plan, store: Store) -> None:
    """Open the group of all ranks as DeepSpeed would (comm/torch.py, init_process_group), but at our own store."""
    from deepspeed.accelerator import get_accelerator

    options: dict[str, Any] = {}
    if plan.topology.accelerator == "cuda" and rank.world_size > 1:
        options["device_id"] = device(rank, plan)
    dist.init_process_group(
        get_accelerator().communication_backend_name(),  # pyright: ignore[reportOptionalMemberAccess]
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=datetime.timedelta(seconds=2 * max(plan.watch.startup, plan.watch.timeout)),
        **options,
    )


def _check_interface() -> None:
    """Raise TopologyError for a network interface that gloo is told to use and that is not here."""
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in there:
            raise TopologyError(
                f"{socket.gethostname()} has no network interface {name!r}",
                where=f"GLOO_SOCKET_IFNAME={os.environ['GLOO_SOCKET_IFNAME']}",
                fix=f"unset it, or name one of {', '.join(there)}",
            )


class PlainUnpickler(pickle.Unpickler):
    """What torch's object collectives read with: numbers, texts and lists of them; never code that others send."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse: only what needs no class is read."""
        raise pickle.UnpicklingError(f"a message between ranks names {module}.{name}, which is not read")


def set_timeouts(seconds: float) -> None:
    """Give every process group a timeout: DeepSpeed's and torch's own reaches only the one of the whole world (T25).

    It is twice that of the watch, which sees more and comes first. Call it when the engine has made its groups.
    """
    limit = datetime.timedelta(seconds=2 * seconds)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Set timeout")
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(limit, group)
            for kind in group._device_types:  # TORCH_DISTRIBUTED_DEBUG puts a wrapper around gloo that has none to set
                inner = getattr(group._get_backend(kind), "wrapped_pg", None)
                if inner is not None:
                    inner._set_default_timeout(limit)


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
    """Return every rank's value, on every rank; values are what JSON can carry."""
    own = _bytes(value)
    sizes = [torch.empty(1, dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([own.numel()], dtype=torch.int64, device=own.device))
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=own.device)
    padded[: own.numel()] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [_value(text[:length]) for text, length in zip(texts, lengths, strict=True)]


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result everywhere, which is what JSON can carry; so are its errors."""
    result: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            result = {"value": action()}
        except HalfstepError as error:
            result = {"error": error.to_dict()}
        except Exception as error:  # whatever it is, the others must hear of it, or they would wait for ever
            if "--debug" in sys.argv:
                traceback.print_exc()
            result = {"error": Fault.of(error, where="rank 0").to_dict()}
    result = _broadcast(result)
    if "error" in result:
        raise HalfstepError.from_dict(result["error"], reported=dist.get_rank() != 0)
    return result["value"]


def _broadcast(value: dict[str, Any]) -> dict[str, Any]:
    own = _bytes(value)
    size = torch.tensor([own.numel()], dtype=torch.int64, device=own.device)
    dist.broadcast(size, src=0)
    text = own if dist.get_rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=own.device)
    dist.broadcast(text, src=0)
    return _value(text)


def _bytes(value: Any) -> torch.Tensor:
    """Return a value as JSON, in bytes on the device that the ranks' messages start from; NaN and inf are kept."""
    on_gpu = dist.get_backend() == "nccl"
    place = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(place)


def _value(text: torch.Tensor) -> Any:
    return json.loads(bytes(text.cpu().numpy()))


def leave() -> None:
    """Leave the process group."""
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    caches.remove_scratch()
