"""The command line that starts a run's ranks on the hosts of a hostfile, one function for each starter.

Over ssh the ranks get their environment from a file in the run directory: command lines are seen by everybody, and
DeepSpeed passes on only variables that begin with a few prefixes, unescaped (T24).
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.submit.argv import ACCELERATE_CONFIG, script_words, tool
from halfstep.launcher.submit.hostfile import Hosts, exported
from halfstep.launcher.submit.local import SET_HERE
from halfstep.launcher.system.machine import free_port

BACKENDS = ("pdsh", "openmpi")
_NODE = "@NODE@"
Spread = Callable[[Plan, Path, Hosts, str], list[str]]


def environment_file(run: Path) -> Path:
    """Return the file that ranks on other hosts read their environment from; it exists while the launch does."""
    return run / ".launch-environment"


def deepspeed(plan: Plan, run: Path, hosts: Hosts, backend: str) -> list[str]:
    """Return the `deepspeed` command for pdsh or Open MPI."""
    command = [*tool("deepspeed", "deepspeed.launcher.runner"), "--hostfile", str(hosts.file), "--launcher", backend]
    address, port = hosts.names[0], str(free_port())
    command += ["--master_addr", address, "--master_port", port, "--log_level", "error"]
    if backend == "pdsh":
        command += ["--num_nodes", str(len(hosts.names)), "--num_gpus", str(hosts.slots)]
        command += ["--venv_script", _plain(environment_file(run)), "--launcher_args=-N"]
        if hosts.ssh_port:
            command += ["--ssh_port", str(hosts.ssh_port)]
        return [*command, *script_words(Path(_plain(run)))]
    # DeepSpeed tells mpirun neither address nor port. mpirun takes the names of variables, and their values from here.
    named = [*exported(), *SET_HERE, "MASTER_ADDR", "MASTER_PORT"]
    options = " ".join(f"-x {name}" for name in dict.fromkeys(named))
    met = ["env", f"MASTER_ADDR={address}", f"MASTER_PORT={port}"]
    return [*met, *command, f"--launcher_args={options}", *script_words(run)]


def torchrun(plan: Plan, run: Path, hosts: Hosts, backend: str) -> list[str]:
    """Return the command that starts one `torchrun` on each host."""
    command = [*tool("torchrun", "torch.distributed.run"), "--nnodes", str(len(hosts.names)), "--node-rank", _NODE]
    command += ["--nproc-per-node", str(hosts.slots), "--master-addr", hosts.names[0]]
    return _pdsh([*command, "--master-port", str(free_port()), *script_words(run)], run, hosts)


def accelerate(plan: Plan, run: Path, hosts: Hosts, backend: str) -> list[str]:
    """Return the command that starts one `accelerate launch` on each host."""
    nodes = len(hosts.names)
    command = [*tool("accelerate", "accelerate.commands.accelerate_cli"), "launch", *ACCELERATE_CONFIG, "--multi_gpu"]
    command += ["--num_machines", str(nodes), "--machine_rank", _NODE, "--num_processes", str(nodes * hosts.slots)]
    command += ["--main_process_ip", hosts.names[0], "--main_process_port", str(free_port())]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--rdzv_backend", "static"]
    return _pdsh([*command, *script_words(run)], run, hosts)


def _pdsh(command: list[str], run: Path, hosts: Hosts) -> list[str]:
    """Return a pdsh command that runs words on each host; pdsh writes the host's number for %n, and % for %%."""
    file, folder = shlex.quote(str(environment_file(run))), shlex.quote(str(Path.cwd()))
    text = f". {file} && cd {folder} && exec {shlex.join(command)}".replace("%", "%%").replace(_NODE, "%n")
    remote = ["env", f"PDSH_SSH_ARGS_APPEND=-p {hosts.ssh_port}"] if hosts.ssh_port else []
    return [*remote, "pdsh", "-S", "-N", "-R", "ssh", "-w", ",".join(hosts.names), text]


def _plain(path: Path) -> str:
    # DeepSpeed puts these words into a remote shell's line as they are.
    if re.search(r"[^\w@+=:,./-]", str(path)):
        raise RequestError(
            f"{path} holds a character that DeepSpeed does not pass to another host unharmed",
            where="out, with --hostfile and deepspeed over pdsh",
            fix="choose an out of letters, digits and @ + = : , . / _ -, or start with --with torchrun",
        )
    return str(path)


STARTERS: dict[str, Spread] = {"deepspeed": deepspeed, "torchrun": torchrun, "accelerate": accelerate}
_NEEDS = {"pdsh": "pdsh", "openmpi": "mpirun"}


def needed(starter: str, backend: str) -> str:
    """Return the program that a launch over a hostfile needs here."""
    return _NEEDS[backend if starter == "deepspeed" else "pdsh"]
