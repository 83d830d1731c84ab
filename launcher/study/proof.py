"""What the parity gate says of a study's cells here: the missing part of it is run, and each run told what was found.

python proof.py RUN     (by an array's task, on the node where that run will train)
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a script, Python puts launcher/study/ itself on the path, where our names would shadow others' modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launcher import rundir, topology, verdict
from launcher.errors import EXIT_REFUSED, Fault, HalfstepError
from launcher.files import write_json
from launcher.parity import drive
from launcher.parity.cases import Case, cases_of
from launcher.plan.plan import Plan

FILE = "proof.json"
RULE = "offload-proved-here"


def needed(plans: Iterable[Plan]) -> list[Case]:
    """Return the cases that the cells of these plans need and that were not run here yet."""
    here = topology.describe(1, 1)
    wanted = dict.fromkeys(case for plan in plans if plan.repairs_on for case in _cases(plan))
    return [case for case in wanted if _known(here, [case]) is None]


def run(plans: Iterable[Plan], say: Callable[[str], None]) -> None:
    """Run what `needed` names and keep the verdict; what cannot be run stays unproved, and is said.

    A cell with offload is tried by itself: where the device cannot do it, DeepSpeed raises.
    """
    missing = needed(plans)
    plain = [case for case in missing if case.offload == "none"]
    groups = [plain] if plain else []
    groups += [
        [c for c in missing if _cell(c) == cell] for cell in dict.fromkeys(map(_cell, missing)) if cell[2] != "none"
    ]
    for cases in groups:
        what = (
            f"{len(cases)} cases"
            if cases is plain
            else f"zero={cases[0].zero} {cases[0].precision} offload={cases[0].offload}"
        )
        say(f"the parity gate has to run first: {what} on this hardware and these versions")
        try:
            outcome = drive.verify(cases, repairs=True, quiet=False)
        except HalfstepError as error:
            say(f"not proved: {error.what}")
            if cases is not plain and isinstance(error, Fault):
                verdict.store(topology.describe(1, 1), [_failed(case, error.what) for case in cases])
            continue
        verdict.store(topology.describe(1, 1), outcome.cells)
        failed = [cell for cell in outcome.cells if not cell["ok"]]
        say(f"{len(outcome.cells) - len(failed)} of {len(outcome.cells)} train the same model, {outcome.seconds:.0f} s")


def tell(path: Path, plan: Plan) -> dict[str, Any]:
    """Write into a run directory whether its cell is proved here, and return it.

    `proved` is True, False, or None where the gate was not run; `refused` names the rule that forbids the run.
    """
    here = topology.describe(1, 1)
    cases = _cases(plan)
    found: dict[str, Any] = {"proved": None, "reason": "", "refused": None, "cases": len(cases)}
    if not plan.repairs_on:
        found |= {"proved": False, "reason": "stage 0 in half precision without its repairs (numerics.repairs=false)"}
    else:
        found["proved"] = _known(here, cases)
        if found["proved"] is None:
            found["reason"] = "the parity gate was not run for it here"
        elif not found["proved"]:
            found["reason"] = "the parity gate found that it trains another model"
    offload = _offload(plan)
    if offload != "none" and not found["proved"]:
        found["refused"] = f"{RULE}: offload={offload} is not proved to train the same model on this device"
    found["conditions"] = verdict.conditions(here)
    write_json(path / FILE, found)
    return found


def _known(here: topology.Topology, cases: list[Case]) -> bool | None:
    return verdict.proved(here, [vars(case) for case in cases])


def _cases(plan: Plan) -> list[Case]:
    """Return the cases for a plan's cell that this machine's devices can run."""
    ranks = topology.default_ranks_per_node()
    return [case for case in cases_of(plan.zero, plan.precision, _offload(plan)) if case.world_size <= ranks]


def _offload(plan: Plan) -> str:
    where = {
        what: plan.deepspeed["zero_optimization"].get(f"offload_{what}", {}).get("device", "none")
        for what in ("optimizer", "param")
    }
    if "nvme" in where.values():
        return "nvme"
    return "none" if where["optimizer"] == "none" else "optimizer-cpu" if where["param"] == "none" else "cpu"


def _cell(case: Case) -> tuple[int, str, str]:
    return case.zero, case.precision, case.offload


def _failed(case: Case, why: str) -> dict[str, Any]:
    return {**vars(case), "ok": False, "worst": None, "tolerance": None, "error": why, "deviations": []}


def main(path: Path) -> int:
    """Prove one run's cell on this host and return the exit code; 3 where the run may not start."""
    _, plan = rundir.read_plan(path)
    run([plan], lambda line: print(f"--- {line}", flush=True))
    found = tell(path, plan)
    if found["refused"]:
        print(f"--- {found['refused']}", flush=True)
    return EXIT_REFUSED if found["refused"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except HalfstepError as error:
        print(error, file=sys.stderr)
        sys.exit(0)  # unproved, and the report says so; the run itself goes on
