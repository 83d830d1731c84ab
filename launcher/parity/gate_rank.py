"""One rank of the parity gate: run the cases of a job file in one start and write a line of JSON for each.

python -m halfstep.launcher.parity.gate_rank JOB.json          (started by `halfstep verify`, alone or under torchrun)
"""

import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfstep.launcher import fault_injection, topology
from halfstep.launcher.errors import HalfstepError
from halfstep.launcher.parity.case_plan import plan_of
from halfstep.launcher.parity.cases import POISON, Case

if TYPE_CHECKING:
    from halfstep.launcher.parity.trial import Series


def main(job_file: Path) -> None:
    """Run the job's cases in order; rank 0 writes."""
    job = json.loads(job_file.read_text("utf-8"))
    rank = topology.from_environment()
    topology.prepare_environment(rank)
    os.environ[fault_injection.VARIABLE] = POISON
    from halfstep.launcher.engine.ranks import (
        distributed,  # torch and DeepSpeed from here on, in the environment prepared for them
    )
    from halfstep.launcher.engine.ranks.places import file_store
    from halfstep.launcher.parity import trial

    world = topology.describe(rank.world_size, rank.local_world_size)
    reported = [Case(**fields) for fields in job["cases"]]
    twins = {case: case.at_stage_1() for case in reported if case.has_twin_at_stage_1}
    needed = dict.fromkeys(run for case in reported for run in (*([twins[case]] if case in twins else []), case))
    met = file_store(Path(job["out"]).with_suffix(".store"), rank)
    distributed.join(rank, plan_of(reported[0], world, repairs=job["repairs"]), met)
    distributed.quiet_deepspeed(Path(job["log"]))
    reference = functools.cache(
        lambda case: trial.on_the_reference(plan_of(case, world, repairs=True, for_the_reference=True))
    )
    stage_1: dict[Case, Series] = {}
    with Path(job["out"]).open("a", encoding="utf-8") as out:
        for case in needed:
            started = time.perf_counter()
            series = trial.on_deepspeed(plan_of(case, world, repairs=job["repairs"]), rank.rank)
            if case.zero == 1:
                stage_1[case] = series
            if rank.rank == 0 and case in reported:
                oracle = reference(case.plain())
                row = _row(case, series, oracle, stage_1.get(twins.get(case, case)))
                out.write(json.dumps({**row, "seconds": time.perf_counter() - started}) + "\n")
                out.flush()
    distributed.leave()


def _row(case: Case, series: "Series", oracle: "Series", stage_1: "Series | None") -> dict[str, Any]:
    from halfstep.launcher.parity import distance

    compared = distance.deviations(case, series, oracle, distance.ORACLE)
    if stage_1 is not None and stage_1 is not series:
        compared += distance.deviations(case, series, stage_1, distance.STAGE_1)
    worst = distance.worst(compared)
    return {
        **dataclasses.asdict(case),
        "worst": worst.value,
        "tolerance": worst.tolerance,
        "ok": all(deviation.ok for deviation in compared),
        "measure": worst.measure,
        "against": worst.against,
        "step": worst.step,
        "repairs": list(series.repairs),
        "final_loss": series.loss[-1],
        "oracle_final_loss": oracle.loss[-1],
        "deviations": [{**dataclasses.asdict(deviation), "ok": deviation.ok} for deviation in compared],
    }


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except HalfstepError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
