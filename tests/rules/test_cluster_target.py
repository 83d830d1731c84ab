"""`make cluster` installs every program that the tests on a cluster call: a fresh machine has none of them."""

import ast
import re
from pathlib import Path

from slurm.cluster import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
ESSENTIAL = {"bash", "true", "umount", "nsenter", "unshare", "setsid", "sleep"}
"""In Debian's smallest image: bash, coreutils, mount, util-linux."""
WITH = {"scontrol": "sbatch", "squeue": "sbatch", "scancel": "sbatch", "sinfo": "sbatch", "srun": "sbatch"}
"""Programs that come in the package of another."""


def called() -> set[str]:
    """Return the programs that tests/slurm names: what is run on a node, asked of SLURM, or started."""
    seen = set(PROGRAMS)
    for file in sorted((ROOT / "tests" / "slurm").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            place = {"on": 1, "call": 0, "_run": 0, "run": 0, "Popen": 0}.get(name)
            if place is None or len(node.args) <= place:
                continue
            first = node.args[place]
            first = first.elts[0] if isinstance(first, ast.List) and first.elts else first
            if isinstance(first, ast.Constant) and re.fullmatch("[a-z-]+", str(first.value)):
                seen.add(str(first.value))
    return seen


def test_the_programs_of_the_cluster_s_tests_are_those_that_make_cluster_looks_for() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"^CLUSTER := (.*)$", makefile, re.MULTILINE)
    programs = called()
    assert {"iptables", "ip", "mount", "ssh-keygen", "squeue", "slurmd"} <= programs, "the search finds what is there"
    assert sorted({WITH.get(item, item) for item in programs} - set(listed.split()) - ESSENTIAL) == []


def test_every_program_that_is_looked_for_has_its_package() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (text,) = re.findall(r"--no-install-recommends \\\n(.*?); }", makefile, re.DOTALL)
    packages = set(text.replace("\\", " ").split())
    (listed,) = re.findall(r"^CLUSTER := (.*)$", makefile, re.MULTILINE)
    owner = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge",
             "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "mpirun": "openmpi-bin",
             "ip": "iproute2"}  # fmt: skip
    assert {owner.get(item, item) for item in listed.split()} == packages
