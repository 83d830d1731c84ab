"""Other processes, as /proc tells: whether one still lives, how it ended, and who started it. Standard library only."""

import base64
import contextlib
import fcntl
import json
import os
import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPTS = ("deepspeed", "torchrun", "accelerate", "halfstep")
_MODULES = ("deepspeed.launcher.", "torch.distributed.", "accelerate.commands.", "halfstep.")
# Where a person sits, or what outlives them on purpose: a rank under nohup must not end with any of these.
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "tcsh", "csh", "busybox")
_PLACES = (*_SHELLS, "login", "su", "sudo", "sshd",
           "sshd-session", "tmux", "tmux: server", "screen", "mosh-server", "systemd", "init")  # fmt: skip
LAUNCHER = "HALFSTEP_LAUNCHER"
"""Names the `halfstep run` that a process was started by, as `this_process` does."""
_MARKS = {"torchrun": "TORCHELASTIC_RUN_ID", "DeepSpeed's launch.py": "CROSS_SIZE"}
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT, _PIDFD_INFO_SIZE = 0xC040FF0B, 8, 64  # linux/pidfd.h


@dataclass(frozen=True, kw_only=True)
class Stat:
    """What /proc/PID/stat says."""

    state: str
    """One letter: R, S, D, T (stopped), t (traced), Z."""
    parent: int
    session: int
    start: int
    """When it started, in clock ticks since boot: with the number, this names a process for good."""
    status: int
    """How it ended, as waitpid has it; 0 while it lives, or where we may not know."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process, named so that another with the same number is not taken for it."""

    pid: int
    start: int
    name: str


def stat(pid: int) -> Stat | None:
    """Read /proc/PID/stat, or return None for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return Stat(
            state=fields[0],
            parent=int(fields[1]),
            session=int(fields[3]),
            start=int(fields[19]),
            status=int(fields[49]),
        )
    except (OSError, IndexError, ValueError):
        return None


def is_alive(pid: int) -> bool:
    """Tell whether a process runs or could run again: a zombie has ended."""
    process = stat(pid)
    return process is not None and process.state not in "ZX"


def launchers_above(pid: int, *, over_ssh: bool = False) -> list[Process]:
    """Return who started this process and dies only if something is wrong: its parent, and launchers above that.

    A shell between a launcher and the process is passed over, not watched. `over_ssh` is for what another host started
    here: the end of the ssh session is then the end of the launch.
    """
    launchers: list[Process] = []
    below, shells = stat(pid), 0
    while below is not None and below.parent > 1:
        parent = below.parent
        below = stat(parent)
        name, is_launcher = launcher_name(_words(parent))
        if below is None:
            break
        if over_ssh and _comm(parent).startswith("sshd"):
            launchers.append(Process(pid=parent, start=below.start, name="the ssh session that started it"))
            break
        if _comm(parent) in _PLACES:
            shells += 1
            if shells > 1:
                break
            continue
        if not is_launcher and (launchers or shells):
            break
        launchers.append(Process(pid=parent, start=below.start, name=name))
    return launchers


def this_process() -> str:
    """Return what names this process for those that it starts, on this host and in its numbering of processes."""
    own = stat(os.getpid())
    return json.dumps([_numbering(), os.getpid(), own.start if own else 0])


def starter(environ: Mapping[str, str] = os.environ) -> Process | None:
    """Return the `halfstep run` that started this process, dead or alive; None where it is of another host or none."""
    with contextlib.suppress(ValueError, TypeError):
        numbering, pid, start = json.loads(environ.get(LAUNCHER, "null"))
        if numbering == _numbering():
            return Process(pid=int(pid), start=int(start), name="halfstep run")
    return None


def _numbering() -> str:
    """Return what tells apart hosts, and containers that number their processes by themselves."""
    with contextlib.suppress(OSError):
        return f"{os.uname().nodename} {os.stat('/proc/self/ns/pid').st_ino}"
    return os.uname().nodename


def has_lost_its_launcher(pid: int, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return who had ended before this rank began, where a launcher started it and nobody is left to end it.

    Whoever dies later is noticed by the rank's watchdog, which watches who is above it when it begins.
    """
    above = starter(environ)
    if above is not None and not _is(above):
        return f"{above.name}, process {above.pid},"
    parents = launchers_above(pid)
    if not parents:
        return next((name for name, mark in _MARKS.items() if mark in environ), None)
    last = parents[-1]
    # The deepspeed command starts launch.py for its own host alone, and is its parent while it lives (runner.py).
    command = _words(last.pid)
    if "deepspeed.launcher.launch" in command and any(_is_local(word) for word in command):
        own = stat(last.pid)
        if own is not None and not launcher_name(_words(own.parent))[1]:
            return "the deepspeed command"
    return None


def _is(process: Process) -> bool:
    now = stat(process.pid)
    return now is not None and now.start == process.start and now.state not in "ZX"


def _is_local(word: str) -> bool:
    """Tell whether a word is DeepSpeed's list of hosts, and this host, by no name, is all of it."""
    name, _, value = word.partition("=")
    if name != "--world_info":
        return False
    with contextlib.suppress(ValueError):
        return list(json.loads(base64.urlsafe_b64decode(value))) == ["localhost"]
    return False


def is_orphan(pid: int) -> bool:
    """Tell whether only launchers and shells are left above a process: the session they were started from has ended."""
    below = stat(pid)
    while below is not None and below.parent > 1:
        parent = below.parent
        if not launcher_name(_words(parent))[1] and _comm(parent) not in _SHELLS:
            return False
        below = stat(parent)
    return True


def launcher_name(command: Sequence[str]) -> tuple[str, bool]:
    """Return what to call a process by its command line, and whether that is a launcher of ranks."""
    if not command:
        return "a process", False
    own = command[0].partition(":")[0].rpartition("/")[2]
    if not own.startswith("python"):
        return own, own in _SCRIPTS
    skip = False
    for position, word in enumerate(command[1:], start=1):
        if skip or word in ("-X", "-W"):
            skip = not skip
        elif word == "-m" and position + 1 < len(command):
            module = command[position + 1]
            package, _, last = module.rpartition(".")
            return f"{last}.py of {package}".removesuffix(" of "), f"{module}.".startswith(_MODULES)
        elif not word.startswith("-"):
            script = word.rpartition("/")[2]
            return script, script in _SCRIPTS or word.endswith("halfstep/__main__.py")
    return own, False


def pidfd(pid: int) -> int | None:
    """Open a file that names a process for good, where the kernel has those."""
    with contextlib.suppress(OSError, AttributeError):
        return os.pidfd_open(pid)
    return None


class Watched:
    """A process whose end is noticed at once, by a pidfd where the kernel has them."""

    def __init__(self, process: Process, fd: int | None = None) -> None:
        self.process, self.fd = process, fd
        self._seen: int | None = None
        if fd is None:
            self.fd = pidfd(process.pid)
            now = stat(process.pid)
            # Between our caller's look and ours, the number may have gone to another process.
            self._missed = now is None or now.start != process.start
        else:
            self._missed = False

    def gone(self) -> bool:
        """Tell whether it has ended, and remember its status while it can be seen."""
        if self._missed:
            return True
        if self.fd is not None and not select.select([self.fd], [], [], 0)[0]:
            return False
        now = stat(self.process.pid)
        if now is not None and now.start == self.process.start:
            if now.state not in "ZX":
                return False
            self._seen = now.status
        return True

    def status(self) -> int | None:
        """Return how it ended as waitpid has it, or None where nobody can tell any more."""
        if self._seen is None and self.fd is not None:
            # Its parent has already waited for it; since Linux 6.15 the pidfd still knows.
            info = bytearray(_PIDFD_INFO_EXIT.to_bytes(8, "little")).ljust(_PIDFD_INFO_SIZE, b"\0")
            with contextlib.suppress(OSError):
                fcntl.ioctl(self.fd, _PIDFD_GET_INFO, info)
                if info[0] & _PIDFD_INFO_EXIT:
                    return int.from_bytes(info[60:64], "little", signed=True)
        return self._seen


def marked(entry: str) -> list[int]:
    """Return the living processes of this user whose environment has `NAME=value`, wherever they have moved to."""
    wanted, pids = entry.encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and is_alive(int(folder.name)):
                pids.append(int(folder.name))
    return pids


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since it started."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _words(pid: int) -> list[str]:
    try:
        return [
            part.decode(errors="replace") for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if part
        ]
    except OSError:
        return []


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip().lstrip("-")
    except OSError:
        return ""
