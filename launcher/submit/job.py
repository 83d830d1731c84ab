"""A job: what sbatch is asked for and what its script says, worked out from a plan and a site."""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import trust
from halfstep.launcher.submit.site_file import Container, Site
from halfstep.launcher.submit.times import seconds
from halfstep.launcher.system import assets

LOG = "slurm.log"
"""In the run directory: what all jobs of the run print, one after another."""
COMMENT = "halfstep:"
"""How a job says in SLURM's own lists which run it is: its comment is this and the run directory."""
STARTERS = ("srun", "torchrun")


@dataclass(frozen=True, kw_only=True)
class Array:
    """Several runs as one job array."""

    folder: Path
    """Where its script, its list of run directories and its logs lie."""
    runs: tuple[Path, ...]
    at_once: int
    """How many may run at a time."""
    gate: bool = False
    """Whether each task asks the parity gate about its cell first: a study does."""

    @property
    def list(self) -> Path:
        """The file that names a run directory a line; another array in this folder has another one."""
        text = "\n".join(map(str, self.runs))
        return self.folder / f"runs-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job script's contents, every value still unquoted."""

    run: Path
    """The run directory, of an array its folder."""
    plan: Plan
    site: Site
    starter: str = "srun"
    after: tuple[str, ...] = ()
    """Jobs of other runs that must have ended well before this one begins."""
    behind: tuple[str, ...] = ()
    """Jobs of the same run, which this one resumes however they end."""
    array: Array | None = None
    trusted: bool = False
    """Whether the run directory is taken as it is, whoever may write it."""

    @property
    def folder(self) -> Path:
        """Where the script and the log go."""
        return self.array.folder if self.array else self.run

    @property
    def script(self) -> Path:
        """The file that sbatch is given."""
        return self.folder / "job.sbatch"

    @property
    def template(self) -> str:
        """Which template it is made from."""
        return "study.sbatch.j2" if self.array else "train.sbatch.j2"

    def values(self) -> dict[str, Any]:
        """Return what the template may name; None and empty lists are what was not given."""
        topology, site = self.plan.topology, self.site
        ranks = topology.ranks_per_node
        cpus = site.node.cpus_per_task
        torchrun = self.starter == "torchrun"
        return {
            "title": " ".join(f"{self.plan.model.name} zero={self.plan.zero} precision={self.plan.precision}".split()),
            "name": _job_name(self.folder),
            "script": self.script,
            "log": str(self._log()),
            "comment": f"{COMMENT}{self.array.list if self.array else self.run}",
            "run": self.run,
            "site": site,
            "nodes": topology.nodes,
            "tasks_per_node": 1 if torchrun else ranks,
            "cpus_per_task": cpus and cpus * (ranks if torchrun else 1),
            "threads": cpus if topology.accelerator == "cpu" else None,
            "gres": _gres(site, ranks),
            "exports": ",".join(site.environment.forward) or "NIL",
            "array": f"0-{len(self.array.runs) - 1}%{self.array.at_once}" if self.array else None,
            "runs": self.array and self.array.list,
            "python": self._python(on_the_batch_host=True),
            "helper": _ours(site.container, "submit/inside.py", "halfstep.launcher.submit.inside"),
            "prove": self.array
            and self.array.gate
            and _ours(site.container, "study/proof.py", "halfstep.launcher.study.proof"),
            "ranks": self._ranks(torchrun),
            "torchrun": torchrun,
            "image": site.container if site.container and site.container.kind == "pyxis" else None,
        }

    def dependency(self) -> list[str]:
        """Return the words for sbatch that make this job wait for others.

        They are no part of the script, which can be submitted again when those are long over.
        """
        kinds = {"afterok": self.after, "afterany": self.behind}
        said = ",".join(f"{kind}:{':'.join(jobs)}" for kind, jobs in kinds.items() if jobs)
        return [f"--dependency={said}", "--kill-on-invalid-dep=yes"] if said else []

    def _log(self) -> Path:
        # sbatch replaces %j and the like; of an array, each task has a log of its own.
        name = "task-%a.log" if self.array else LOG
        return Path(str(self.folder).replace("%", "%%")) / name

    def _python(self, *, on_the_batch_host: bool) -> list[str]:
        site = self.site
        box = site.container
        own = site.environment.python or ("python" if box else sys.executable)
        if box is None:
            return [own]
        if box.kind == "apptainer":
            mounts = [word for mount in box.mounts for word in ("--bind", mount)]
            return ["apptainer", "exec", *box.options, *mounts, box.image, own]
        if not on_the_batch_host:
            return [own]
        mounts = [f"--container-mounts={','.join(box.mounts)}"] if box.mounts else []
        step = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL"]
        return [*step, f"--container-image={box.image}", *mounts, *box.options, own]

    def _ranks(self, torchrun: bool) -> list[str]:
        """Return the words of one task, less `run=DIR` at their end."""
        python = self._python(on_the_batch_host=False)
        train = _ours(self.site.container, "train.py", "halfstep.launcher.train")
        agreed = [trust.CONSENT] if self.trusted else []
        if not torchrun:
            return [*python, *train, *agreed]
        topology = self.plan.topology
        options = [f"--nnodes={topology.nodes}", f"--nproc-per-node={topology.ranks_per_node}"]
        module = ["--module", "halfstep.launcher.train"] if train[0] == "-m" else train
        return [*python, "-m", "torch.distributed.run", *options, *module, *agreed]

    def check(self) -> None:
        """Raise RequestError where the plan asks for what the site does not have."""
        plan, site = self.plan, self.site
        self._check_folders()
        if plan.checkpoint.resume == "never":
            raise RequestError(
                "a job that never resumes would begin from scratch at every start",
                where="checkpoint.resume=never",
                fix="leave it out, and choose an out that does not exist yet",
            )
        if self.starter == "torchrun" and site.slurm.signal == "TERM":
            raise RequestError(
                "torchrun ends its ranks on SIGTERM before they have saved",
                where=f"slurm.signal of site {site.name}",
                fix='signal = "USR1"',
            )
        ranks, gpus = plan.topology.ranks_per_node, site.node.gpus
        if gpus and ranks > gpus:
            raise RequestError(
                f"{ranks} ranks on a node of {gpus} GPUs",
                where=f"gpus_per_node={ranks}, and node.gpus of site {site.name}",
                fix=f"gpus_per_node={gpus}, and more nodes",
            )
        limit = seconds(site.slurm.time)
        if site.slurm.notice >= limit:
            raise RequestError(
                f"the ranks are told to stop {site.slurm.notice} s before a limit of {limit} s: they would never train",
                where=f"slurm.notice and slurm.time of site {site.name}",
                fix="give the job more --time, or a shorter notice",
            )
        grace = plan.checkpoint.grace
        if grace and grace > site.slurm.notice:
            raise RequestError(
                f"ranks may take {grace:g} s to save, and are told {site.slurm.notice} s before they are killed",
                where=f"checkpoint.grace, and slurm.notice of site {site.name}",
                fix=f"checkpoint.grace={max(1, site.slurm.notice - 30)}, or a longer notice",
            )

    def _check_folders(self) -> None:
        shared = [Path(folder) for folder in self.site.environment.shared]
        needed = [("out", self.folder), *(("data", Path(corpus.path)) for corpus in self.plan.data.corpora)]
        for path in (self.folder, *(self.array.runs if self.array else ())):
            if any(ord(letter) < 32 or ord(letter) == 127 for letter in str(path)):
                raise RequestError(f"{str(path)!r} holds a control character", where="out", fix="choose another out")
        for key, path in needed:
            if shared and not any(path.absolute().is_relative_to(folder) for folder in shared):
                raise RequestError(
                    f"{path} cannot be seen from the compute nodes",
                    where=f"{key}, and environment.shared of site {self.site.name}: {', '.join(map(str, shared))}",
                    fix=f"give a folder there: {key}={shared[0]}/...",
                )


def _ours(box: Container | None, file: str, module: str) -> list[str]:
    """Return how to name a page of ours to Python: by its file, in an image, where that lies elsewhere, by its name."""
    return ["-m", module] if box else [str(assets.train_script().parent / file)]


def _gres(site: Site, ranks: int) -> str | None:
    # Not --gpus-per-task: tasks that see only their own GPU cannot copy between each other's.
    if not site.node.gpus:
        return None
    return ":".join(["gpu", *([site.node.gpu_type] if site.node.gpu_type else []), str(ranks)])


def _job_name(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", folder.name)[:60].strip("-") or "halfstep"
