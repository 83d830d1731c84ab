"""Send a study to SLURM: one array for all cells on the same nodes, a task each; what has a result stays out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfstep.launcher.study import run_status
from halfstep.launcher.study import study_folder as folders
from halfstep.launcher.study.grid import Cell, order
from halfstep.launcher.study.study_file import Study
from halfstep.launcher.submit import render, send, slurm
from halfstep.launcher.submit.job import Array, Job
from halfstep.launcher.submit.site_file import Site
from halfstep.launcher.system import terminal


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One array as it went, or would go."""

    job: Job
    runs: tuple[Path, ...]
    cells: tuple[Cell, ...]
    number: str | None
    """SLURM's; None where nothing was submitted."""


def submit(
    study: Study,
    cells: Sequence[Cell],
    folder: Path,
    site: Site,
    *,
    starter: str,
    at_once: int,
    retry: bool,
    dry: bool,
) -> list[Sent]:
    """Submit every cell that has no result and no job; `retry` also those that failed."""
    open_ = _open(study, cells, folder, retry=retry, dry=dry)
    groups: dict[object, list[Cell]] = {}
    for cell in open_:
        assert cell.plan is not None, "only what was planned is open"
        groups.setdefault(cell.plan.topology, []).append(cell)
    sent = []
    for place, group in enumerate(groups.values()):
        runs = tuple(folders.run_of(folder, cell) for cell in group)
        where = folder / "arrays" / str(place) if len(groups) > 1 else folder / "array"
        array = Array(folder=where, runs=runs, at_once=min(at_once or len(runs), len(runs)), gate=True)
        plan = group[0].plan
        assert plan is not None, "only what was planned is open"
        job = Job(run=where, plan=plan, site=site, starter=starter, array=array)
        number = None
        if not dry:
            decided = [
                (run, cell.request, cell.plan) for run, cell in zip(runs, group, strict=True) if cell.plan is not None
            ]
            number = send.send(job, decided)
        else:
            job.check()
        sent.append(Sent(job=job, runs=runs, cells=tuple(group), number=number))
    return sent


def _open(study: Study, cells: Sequence[Cell], folder: Path, *, retry: bool, dry: bool) -> list[Cell]:
    allowed = [cell for cell in order(cells, study.seeds) if cell.plan is not None and cell.refused is None]
    if dry and not (folder / "study.json").is_file():
        return allowed
    if not dry:
        folders.write(folder, study, cells)
    queued = slurm.queue() if not dry else ()

    def now(cell: Cell) -> run_status.State:
        listed = {"run": f"runs/{cell.folder}", "refused": cell.refused}
        return run_status.of(listed, folder, queued)

    return [cell for cell in allowed if now(cell).to_do(retry=retry, gate=True)]


def script(sent: Sent) -> str:
    """Return the text of an array's script."""
    return render.script(sent.job)


def table(cells: Sequence[tuple[str, int, run_status.State]]) -> list[str]:
    """Return lines on how far every run is."""
    lines = [["cell", "seed", "status", "step", "loss", "why"]]
    for name, seed, now in cells:
        step = "-" if now.step is None else f"{now.step}/{now.steps or '?'}"
        loss = "-" if now.loss is None else f"{now.loss:.4f}"
        lines.append([name, str(seed), now.status, step, loss, now.reason])
    return terminal.table(lines)
