"""A hostfile, and what the ranks on its hosts must be given: over ssh nothing of this shell's environment travels."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import cannot_write, reason

REMOTE = "HALFSTEP_REMOTE"
"""Set for ranks that an ssh session started for us: with the end of that session they end as well."""
_LARGEST = 1 << 24
"""Bytes of a hostfile."""
# What decides where a rank runs and how; of the rest of an environment nothing is passed on.
_PREFIXES = (
    "ACCELERATE_", "CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HALFSTEP_", "HF_", "MLFLOW_", "NCCL_", "OMP_",
    "PYTORCH_", "PYTHON", "ROCR_", "TOKENIZERS_", "TORCH", "TRITON_", "UCX_", "WANDB_", "XDG_CACHE_HOME",
)  # fmt: skip
_NAMES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of one launch, all with the same number of ranks."""

    file: Path
    names: tuple[str, ...]
    slots: int
    ssh_port: int | None = None


def read(file: Path, nodes: int | None, ranks_per_node: int | None, ssh_port: int | None = None) -> Hosts:
    """Read a hostfile as DeepSpeed and MPI have it, `host slots=N` a line; take the first `nodes` of it, or all.

    Raises RequestError where it is missing, wrong, uneven, or smaller than what is asked for.
    """
    try:
        lines = foreign.read_text(file, _LARGEST, follow=True).splitlines()
    except OSError as error:
        raise RequestError(
            f"the hostfile cannot be read: {reason(error)}", where=str(file), fix="check --hostfile"
        ) from None
    except ValueError as error:
        raise RequestError(f"the hostfile is no text: {error}", where=str(file), fix="save it as UTF-8") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        # A name that begins with a dash would be an option of ssh.
        match = re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.:-]*)\s+slots\s*=\s*([0-9]{1,6})", text)
        if match is None or match[1] in hosts or int(match[2]) < 1:
            raise RequestError(
                f"line {number} of the hostfile is {text[:100]!r}" + (_why(match[1] in hosts) if match else ""),
                where=str(file),
                fix="write one line a host, such as: node-1 slots=8",
            )
        hosts[match[1]] = int(match[2])
    names, slots = tuple(hosts)[: nodes or None], min(hosts.values(), default=0)
    if not names or (nodes or 0) > len(hosts):
        raise RequestError(f"{len(hosts)} host(s), {nodes or 1} are needed", where=str(file), fix=f"nodes={len(hosts)}")
    if ranks_per_node is None and len({hosts[name] for name in names}) > 1:
        raise RequestError(
            "the hosts have different numbers of slots",
            where=str(file),
            fix=f"take the same on all: gpus_per_node={slots}",
        )
    for name in names:
        if ranks_per_node and ranks_per_node > hosts[name]:
            raise RequestError(
                f"{ranks_per_node} ranks on {name}, which has {hosts[name]} slots",
                where=f"gpus_per_node, and {file}",
                fix=f"gpus_per_node={hosts[name]}",
            )
    return Hosts(file=file, names=names, slots=ranks_per_node or slots, ssh_port=ssh_port)


def _why(again: bool) -> str:
    return ": that host again" if again else ": a host without slots"


def exported(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that ranks on other hosts are given."""
    chosen = {name: value for name, value in environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    # A name may be anything but hold a `=`; in a shell's line one that is no identifier would be a command.
    return {name: chosen[name] for name in sorted(chosen) if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)}


def write_environment(file: Path, environ: Mapping[str, str]) -> None:
    """Write a file that a shell on another host reads; for its owner's eyes, since there are tokens among it."""
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exported(environ).items())
    with cannot_write(file):
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(f"{text}export {REMOTE}=1\n")
