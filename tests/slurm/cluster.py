"""A real SLURM cluster on one machine: two nodes in namespaces, each with its own address, name and processes.

munged and slurmctld run here; every slurmd is in a network, name, process and mount namespace, joined by a bridge. A
node is lost by killing its first process, a link is cut by taking its interface down. Needs root, and the
programs that `make cluster` installs.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "iptables", "mount", "unshare", "nsenter")
NODES = ("n1", "n2")
_CONF = """\
ClusterName=halfstep
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5,sched_min_interval=500000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MinJobAge=600
JobRequeue=1
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=n1 NodeAddr={net}.1 Port={port1} CPUs=4 RealMemory=6000 State=UNKNOWN
NodeName=n2 NodeAddr={net}.2 Port={port1} CPUs=4 RealMemory=6000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=01:00:00 PriorityTier=1 OverSubscribe=NO
# A thousand nodes that are only ever asked about.
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=3600
SuspendExcNodes=n1,n2
NodeName=g[1-1024] CPUs=64 RealMemory=500000 Gres=gpu:8 State=CLOUD
PartitionName=big Nodes=g[1-1024] MaxTime=2-00:00:00
PartitionName=urgent Nodes=n1,n2 MaxTime=00:30:00 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return what keeps a cluster from starting here, or None."""
    if os.geteuid() != 0:
        return "root is needed to make namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: `make cluster` installs them)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if probe.returncode == 0 else "this kernel lets nobody make namespaces"


class Cluster:
    """Two nodes, n1 and n2, that run until `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        self.conf = folder / "slurm.conf"
        self._tag = f"hs{os.getpid() % 100000}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._ctld: subprocess.Popen[bytes] | None = None
        self._munge: subprocess.Popen[bytes] | None = None
        # A network that the machine does not use.
        self.net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        host = socket.gethostname().partition(".")[0]
        port = 16000 + os.getpid() % 500 * 4
        text = _CONF.format(host=host, net=self.net, port=port, port1=port + 1, folder=folder)
        self.conf.write_text(text)
        (folder / "state").mkdir()
        names = f"{self.net}.254 {host}\n{self.net}.1 n1\n{self.net}.2 n2\n127.0.0.1 localhost\n"
        (folder / "hosts").write_text(names)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._make_keys(folder / "ssh")

    def _make_keys(self, folder: Path) -> None:
        """Let root of every node into every other; the folder stands in for /root/.ssh there, and only there."""
        folder.mkdir(mode=0o700)
        if shutil.which("ssh-keygen") is None:
            return
        for name in ("id_ed25519", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        shutil.copy(folder / "id_ed25519.pub", folder / "authorized_keys")
        host = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"{name},{self.net}.* {host}" for name in NODES))
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPermitRootLogin yes\nMaxStartups 100\n"
        )

    def environment(self) -> dict[str, str]:
        """Return what a user of this cluster has in the environment."""
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        self._make_network()
        munged = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket"]
        munged += [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        with (self.folder / "munged.out").open("wb") as out:
            self._munge = subprocess.Popen(munged, stdout=out, stderr=out, start_new_session=True)
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.start_controller()
        for name in NODES:
            self.start_node(name)
        self.wait(lambda: [self.node_state(node) for node in NODES] == ["IDLE", "IDLE"], "both nodes to be idle")

    def start_controller(self) -> None:
        """Start slurmctld; a state that an earlier one left is taken over."""
        with (self.folder / "slurmctld.out").open("ab") as out:
            self._ctld = subprocess.Popen(
                ["slurmctld", "-D", "-f", str(self.conf)], stdout=out, stderr=out, start_new_session=True
            )
        self.wait(lambda: self.call("scontrol", "ping").returncode == 0, "slurmctld")

    def kill_controller(self) -> None:
        """Kill slurmctld where it stands."""
        assert self._ctld is not None
        self._ctld.kill()
        self._ctld.wait()

    def start_node(self, name: str) -> None:
        """Start a node: an empty /tmp and /dev/shm are not needed, a name, an address and a process tree are."""
        setup = (
            f"hostname {name}; mount --make-rprivate /; mount --bind {self.folder}/hosts /etc/hosts; "
            "mount -t proc proc /proc; mount -t tmpfs -o size=1g tmpfs /dev/shm; "
            f"mkdir -p /root/.ssh /run/sshd; mount --bind {self.folder}/ssh /root/.ssh; "
            f"command -v sshd && $(command -v sshd) -f {self.folder}/ssh/sshd_config -E {self.folder}/sshd-{name}.log; "
            f"slurmd -D -N {name} -f {self.conf} & "
            # As the node's first process it waits for what others leave behind; when it is killed, all are.
            "while :; do wait; sleep 1; done"
        )
        inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", setup]
        with (self.folder / f"node-{name}.out").open("ab") as out:
            # Not `ip netns exec`: its new /sys has no cgroups, without which slurmd does not start.
            self._nodes[name] = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._tag}{name}", *inside],
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def kill_node(self, name: str) -> None:
        """Take a node away, with everything that runs on it."""
        os.kill(self.first_process(name), signal.SIGKILL)
        self._nodes[name].wait()

    def kill_slurmd(self, name: str) -> None:
        """Kill only a node's slurmd; its jobs run on for SLURM to find."""
        for pid in self.processes(name):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd":
                os.kill(pid, signal.SIGKILL)

    def restart_slurmd(self, name: str) -> None:
        """Start a node's slurmd again, with the node's other processes as they are."""
        self.on(name, "bash", "-c", f"setsid slurmd -D -N {name} -f {self.conf} > /dev/null 2>&1 &")

    def first_process(self, name: str) -> int:
        """Return the process that is number 1 on a node."""
        [child] = _children(self._nodes[name].pid)
        return child

    def processes(self, name: str) -> list[int]:
        """Return all processes of a node, by their numbers here."""
        pids, rest = [], [self.first_process(name)]
        own = os.readlink(f"/proc/{rest[0]}/ns/pid")
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and os.readlink(folder / "ns/pid") == own:
                    pids.append(int(folder.name))
        return pids

    def cut(self, name: str, *, up: bool = False) -> None:
        """Take a node's link down, or up again."""
        _run("ip", "link", "set", f"{self._tag}{name}", "up" if up else "down")

    def on(self, name: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command on a node."""
        pid = str(self.first_process(name))
        enter = ["nsenter", "--target", pid, "--net", "--uts", "--mount", "--pid", *command]
        return subprocess.run(enter, capture_output=True, text=True, check=False, env=self._environ())

    def kill(self, name: str, pid: int) -> "subprocess.CompletedProcess[str]":
        """Kill a process of a node by its number there; by the shell, since a small image has no program for it."""
        return self.on(name, "bash", "-c", f"kill -9 {pid}")

    def call(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run one of SLURM's commands as a user of the cluster."""
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self._environ(), timeout=60)

    def node_state(self, name: str) -> str:
        """Return what sinfo says of a node."""
        return self.call("sinfo", "-h", "-n", name, "-o", "%T", "-p", "main").stdout.strip().upper()

    def job_state(self, job: str) -> str:
        """Return a job's state."""
        return self.call("squeue", "-h", "--states=all", "-j", job, "-o", "%T").stdout.strip()

    def wait(self, happened: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait for something, and say what did not happen."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}; logs in {self.folder}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End everything and take the network down."""
        for name in NODES:
            if name in self._nodes:
                with contextlib.suppress(OSError, ValueError):
                    self.kill_node(name)
        for daemon in (self._ctld, self._munge):
            if daemon is not None:
                daemon.kill()
                daemon.wait()
        for name in NODES:
            subprocess.run(["ip", "netns", "del", f"{self._tag}{name}"], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._tag}br"], capture_output=True)

    def _make_network(self) -> None:
        bridge = f"{self._tag}br"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.net}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(NODES, start=1):
            space, outer, inner = f"{self._tag}{name}", f"{self._tag}{name}", f"{self._tag}i"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
            _run("ip", "link", "set", inner, "netns", space, "name", "eth0")
            _run("ip", "link", "set", outer, "master", bridge, "up")
            for arguments in (["addr", "add", f"{self.net}.{number}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                          ["link", "set", "lo", "up"]):  # fmt: skip
                _run("ip", "-n", space, *arguments)

    def _environ(self) -> dict[str, str]:
        return {**os.environ, **self.environment()}


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
