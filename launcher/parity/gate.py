"""`halfstep verify`: start the ranks that run the cases, collect what they found, and say it to a person."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from halfstep.launcher import topology
from halfstep.launcher.errors import Fault, RefusedError
from halfstep.launcher.parity.cases import Case
from halfstep.launcher.system import assets, caches, machine, terminal

_SHOWN_FAILURES = 12


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a gate found."""

    cells: list[dict[str, Any]]
    not_run: list[Case]
    """Cases that need more devices than there are here."""
    seconds: float
    repairs: bool

    @property
    def ok(self) -> bool:
        """Whether every case that was run trains the same model."""
        return bool(self.cells) and all(cell["ok"] for cell in self.cells)


def verify(cases: list[Case], *, repairs: bool, quiet: bool) -> Outcome:
    """Run cases on real ranks; raises Fault where a rank ends before it has reported."""
    started = time.monotonic()
    ranks = topology.default_ranks_per_node()
    on_gpu = machine.gpu_count() > 0
    runnable = [case for case in cases if case.world_size <= ranks]
    alone = [case for case in runnable if case.world_size == 1]
    # A case on one rank leaves the other cores idle; a GPU is not shared.
    workers = 1 if on_gpu else min(machine.usable_cores(), 4)
    groups = _split(alone, workers)
    rest = {size: [case for case in runnable if case.world_size == size] for size in {c.world_size for c in runnable}}
    batches = [groups, *[[group] for size, group in sorted(rest.items()) if size > 1]]
    if not runnable:
        raise RefusedError(
            f"all {len(cases)} cases need more ranks than the {ranks} that can run here",
            where="halfstep verify",
            fix="choose others with --only world_size=1, or use a machine with more devices",
        )
    results: list[dict[str, Any]] = []
    before = signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory(prefix="halfstep-verify-") as scratch, _progress(len(runnable), quiet) as done:
        for number, batch in enumerate(batches):
            results += _run(
                [group for group in batch if group], Path(scratch) / str(number), repairs, len(results), done
            )
    signal.signal(signal.SIGTERM, before)
    assert len(results) == len(runnable), f"{len(results)} results for {len(runnable)} cases"
    order = {case: place for place, case in enumerate(cases)}
    results.sort(key=lambda cell: order[case_of(cell)])
    not_run = [case for case in cases if case.world_size > ranks]
    return Outcome(cells=results, not_run=not_run, seconds=time.monotonic() - started, repairs=repairs)


_SECONDS, _COMPILING = 1.25, 3.0
"""Of a case on two cores, and more of a compiled one: 453 took 9.7 minutes, the 12 compiled ones alone 48 s, the 48
of two `hf:` families 66 s."""


def estimate(cases: list[Case]) -> str:
    """Say about how long some cases take."""
    seconds = sum(_SECONDS + _COMPILING * case.compile for case in cases)
    return f"about {max(1, round(seconds / 60))} min on two cores"


def _leave(number: int, frame: FrameType | None) -> None:
    """Unwind on SIGTERM as on Ctrl-C, so that no rank and no folder is left behind."""
    sys.exit(128 + number)


def case_of(cell: dict[str, Any]) -> Case:
    """Return the case that a result belongs to."""
    return Case(**{name: cell[name] for name in Case.__dataclass_fields__})


def _split(cases: list[Case], parts: int) -> list[list[Case]]:
    """Deal cases out so that the cells of one condition stay together: they share their references."""
    groups: dict[Case, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.at_stage_1(), []).append(case)
    dealt: list[list[Case]] = [[] for _ in range(parts)]
    for place, group in enumerate(groups.values()):
        dealt[place % parts] += group
    return dealt


def _run(groups: list[list[Case]], scratch: Path, repairs: bool, before: int, done: Any) -> list[dict[str, Any]]:
    """Run groups of cases side by side, one start of ranks each, and return their results."""
    scratch.mkdir()
    jobs = []
    for number, group in enumerate(groups):
        out, log = scratch / f"{number}.jsonl", scratch / f"{number}.log"
        out.touch()
        job = {"cases": [asdict(case) for case in group], "repairs": repairs, "out": str(out), "log": str(log)}
        file = scratch / f"{number}.json"
        file.write_text(json.dumps(job))
        jobs.append((file, out, log, group[0].world_size))
    processes = []
    try:
        for file, _, log, size in jobs:
            with log.open("a") as sink:  # the rank's own log lines go there too
                processes.append(
                    subprocess.Popen(
                        _command(file, size), stdout=sink, stderr=sink, env=_environment(size), cwd=assets.source_root()
                    )
                )
        failed = None  # the first that ended badly: the others are ended because of it
        while failed is None and any(process.poll() is None for process in processes):
            time.sleep(0.2)
            done(before + sum(_lines(out) for _, out, _, _ in jobs))
            failed = next((place for place, process in enumerate(processes) if process.poll()), None)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if failed is not None:
        raise _fault(jobs[failed][2], processes[failed].returncode)
    results = [json.loads(line) for _, out, _, _ in jobs for line in out.read_text("utf-8").splitlines()]
    done(before + len(results))
    return results


def _command(job: Path, world_size: int) -> list[str]:
    module = ["-m", "halfstep.launcher.parity.gate_rank", str(job)]
    if world_size == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size), *module]


def _environment(world_size: int) -> dict[str, str]:
    numbered = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in numbered}
    topology.prefer_cpu(environment)
    # These models are too small for a second thread to help; two processes run side by side instead.
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def _fault(log: Path, status: int) -> Fault:
    text = log.read_text("utf-8", errors="replace").strip()
    kept = caches.temporary() / f"verify-{os.getpid()}.log"
    kept.write_text(text + "\n", "utf-8")
    lines = text.splitlines()
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    theirs = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]  # that is torchrun's own
    last = (ours or theirs or ["no word of it in its log"])[-1]
    how = f"by signal {-status}" if status < 0 else f"with code {status}"
    return Fault(
        f"a rank of the parity gate ended {how} before it had reported: {last}",
        where=str(kept),
        fix="`halfstep doctor` says whether this machine is fit; --only narrows the cases down",
    )


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n")


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Any]:
    console = Console(file=sys.stderr)
    bar = Progress(
        TextColumn("cases"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda completed: bar.update(task, completed=completed)


def table(outcome: Outcome) -> list[str]:
    """Return the gate's findings as text: a line for each cell, the failures, and the verdict."""
    rows = [["zero", "precision", "cases", "loss", "grad norm", "first update", "Adam steps, scale, skips", "verdict"]]
    precisions = dict.fromkeys(cell["precision"] for cell in outcome.cells)
    for precision in precisions:
        for zero in sorted({cell["zero"] for cell in outcome.cells if cell["precision"] == precision}):
            cells = [c for c in outcome.cells if (c["zero"], c["precision"]) == (zero, precision)]
            deviations = [deviation for cell in cells for deviation in cell["deviations"]]
            graded = [_graded(deviations, name) for name in ("loss", "grad_norm", "first_update")]
            exact = [deviation for deviation in deviations if not deviation["tolerance"]]
            different = list(dict.fromkeys(deviation["measure"] for deviation in exact if not deviation["ok"]))
            same = ", ".join(different).replace("_", " ") + " differ" if different else "equal"
            verdict = "ok" if all(cell["ok"] for cell in cells) else "FAIL"
            rows.append([str(zero), precision, str(len(cells)), *graded, same, verdict])
    lines = terminal.table(rows, left=(1, 6, 7))
    lines.append(
        "largest relative deviation / tolerance over all steps and cases, against a plain PyTorch trainer and stage 1"
    )
    failed = [cell for cell in outcome.cells if not cell["ok"]]
    for cell in failed[:_SHOWN_FAILURES]:
        value = f"{cell['worst']:.2g} (tolerance {cell['tolerance']:g})"
        lines.append(
            f"FAIL zero={cell['zero']} precision={cell['precision']}, {case_of(cell)}: "
            f"{cell['measure']} {value} against {cell['against']} at step {cell['step']}"
        )
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"... and {len(failed) - _SHOWN_FAILURES} more; --json has them all")
    if outcome.not_run:
        lines.append(f"not run: {len(outcome.not_run)} cases on more ranks than there are devices here")
    repairs = "" if outcome.repairs else ", without repairs: DeepSpeed as it is"
    passed = len(outcome.cells) - len(failed)
    lines.append(f"{passed} of {len(outcome.cells)} cases train the same model in {outcome.seconds:.0f} s{repairs}")
    return lines


def _graded(deviations: list[dict[str, Any]], measure: str) -> str:
    graded = [deviation for deviation in deviations if deviation["measure"] == measure]
    worst = max(graded, key=lambda deviation: deviation["value"] / deviation["tolerance"])
    return f"{worst['value']:>8.1e} / {worst['tolerance']:<6.0e}"
