"""What the parity gate says of a study's cells here: the missing part of it is run, and each run told what was found.

python proof.py RUN     (by an array's task, on the node where that run will train)
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a script, Python puts launcher/study/ itself on the path, where our names would shadow others' modules.
    sys.path[0] = next(str(f) for f in Path(__file__).resolve().parents if (f / "halfstep" / "__init__.py").is_file())

from halfstep.launcher import topology
from halfstep.launcher.errors import EXIT_REFUSED, Fault, HalfstepError
from halfstep.launcher.parity import gate, verdict
from halfstep.launcher.parity.cases import Case, cases_of
from halfstep.launcher.parity.cell import offload_of, question_of
from halfstep.launcher.parity.standing import standing
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir.run_directory import note_proof
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import cannot_write, write_json
from halfstep.launcher.system.terminal import say

FILE = "proof.json"
RULE = "offload-proved-here"


def needed(plans: Iterable[Plan]) -> list[Case]:
    """Return the cases that the cells of these plans need and that were not run here yet."""
    here = topology.describe(1, 1)
    wanted = dict.fromkeys(
        case for plan in plans if plan.repairs_on for case in (*question_of(plan).cases, *_of_its_offload(plan))
    )
    return [case for case in wanted if _known(here, [case]) is None]


def run(plans: Iterable[Plan], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run what `needed` names, keep the verdict and return it; what cannot be run stays unproved, and is said.

    A cell with offload, a compiler or keys of its own is tried by itself: it may end in an error here. So may a nano
    model of an `hf:` family, in some cells: where one does, each is tried by itself.
    """
    missing, verdicts = needed(plans), []
    plain = [case for case in missing if _is_sure_to_run(case) and not case.config]
    families = [case for case in missing if _is_sure_to_run(case) and case.config]
    waiting = deque(cases for cases in (plain, *_parted(families, lambda case: case.config)) if cases)
    waiting += _parted([case for case in missing if not _is_sure_to_run(case)], _cell)
    while waiting:
        cases = waiting.popleft()
        cells_of = _parted(cases, _cell)
        say(f"the parity gate has to run first: {_named(cells_of)} on this hardware and these versions")
        try:
            outcome = gate.verify(cases, repairs=True, quiet=False)
        except HalfstepError as error:
            if cases is not plain and isinstance(error, Fault) and len(cells_of) > 1:
                say(f"each cell by itself now: {error.what}")
                waiting.extendleft(reversed(cells_of))
                continue
            say(f"not proved: {error.what}")
            if cases is plain or not isinstance(error, Fault):
                continue
            cells = [_failed(case, error.what) for case in cases]
        else:
            cells = outcome.cells
            good = sum(bool(cell["ok"]) for cell in cells)
            say(f"{good} of {len(cells)} train the same model, {outcome.seconds:.0f} s")
        verdicts += cells
        try:
            verdict.store(topology.describe(1, 1), cells)
        except OSError as error:  # a home that cannot be written, as on some nodes: what was found counts all the same
            say(f"the verdict cannot be kept for next time: {error}")
    return verdicts


def tell(path: Path, plan: Plan, verdicts: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """Write into a run directory whether its cell is proved here, and return it.

    `found` is what `run` has just returned. `proved` is True, False, or None where the gate was not run; `refused`
    names the rule that forbids the run.
    """
    here, stands = topology.describe(1, 1), standing(plan, verdicts)
    record: dict[str, Any] = {"proved": stands.proved, "reason": stands.reason, "refused": None, "cases": stands.cases}
    offload = offload_of(plan)
    moved = [vars(case) for case in _of_its_offload(plan)]
    if offload != "none" and not (plan.repairs_on and verdict.proved(here, moved, verdicts)):
        record["refused"] = f"{RULE}: offload={offload} is not proved to train the same model on this device"
    record["conditions"] = verdict.conditions(here)
    with cannot_write(path):
        write_json(path / FILE, record)
    note_proof(path, stands.proved, stands.reason)
    return record


def can_be_told_again(path: Path, plan: Plan) -> bool:
    """Tell whether a run was told nothing, on this hardware and with these versions: the gate may have run since."""
    try:
        record = foreign.read_object(path / FILE)
        same = record["conditions"] == verdict.conditions(topology.describe(1, 1))
        return record["proved"] is None and plan.repairs_on and same
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _known(here: topology.Topology, cases: list[Case]) -> bool | None:
    return verdict.proved(here, [vars(case) for case in cases])


def _of_its_offload(plan: Plan) -> list[Case]:
    """Return the cases without which a run with offload may not start here, whatever else it has."""
    offload, ranks = offload_of(plan), topology.default_ranks_per_node()
    cases = [] if offload == "none" else cases_of(plan.zero, plan.precision, offload)
    return [case for case in cases if case.world_size <= ranks]


def _cell(case: Case) -> tuple[object, ...]:
    own = (case.compile, case.keep_fp32, case.config, case.keys)
    return case.zero, case.precision, case.offload, case.optimizer, *own


def _parted(cases: Iterable[Case], by: Callable[[Case], object]) -> list[list[Case]]:
    """Return the cases that are alike in something, group by group, each in their order."""
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault(by(case), []).append(case)
    return list(groups.values())


def _named(cells: list[list[Case]]) -> str:
    """Return what a group of cases is called: its cell, where it is of a single one."""
    first = cells[0][0]
    family = f" of the family {first.family}" if first.config else ""
    if len(cells) > 1 or (_is_sure_to_run(first) and not first.config):
        return f"{sum(map(len, cells))} cases{family}"
    cell = f"zero={first.zero} {first.precision} {first.optimizer} offload={first.offload}"
    return " ".join([cell, *first.keys]) + family


def _is_sure_to_run(case: Case) -> bool:
    return (
        case.offload == "none"
        and not (case.keys or case.keep_fp32 or case.compile)
        and case.optimizer in ("adamw", "sgd")
    )


def _failed(case: Case, why: str) -> dict[str, Any]:
    return {**vars(case), "ok": False, "worst": None, "tolerance": None, "error": why, "deviations": []}


def main(path: Path) -> int:
    """Prove one run's cell on this host and return the exit code; 3 where the run may not start."""
    _, plan = Run(path).require_as_asked()
    verdicts = run([plan], lambda line: say(f"--- {line}"))
    record = tell(path, plan, verdicts)
    if record["refused"]:
        say(f"--- {record['refused']}")
    return EXIT_REFUSED if record["refused"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except HalfstepError as error:
        say(*str(error).splitlines(), error=True)
        sys.exit(0)  # unproved, and the report says so; the run itself starts
