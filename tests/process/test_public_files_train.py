"""DeepSpeed files that other projects publish train on two ranks, whichever `halfstep plan` accepts for CPU ranks.

Run by torchrun, this file is the program of a rank: rank 0 writes what each plan did to seen.json in its folder.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from process import synthetic
from process.conftest import BIN, ROOT, Outcome
from public_configs import CONFIGS, PublicConfig
from ranks import environment

from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.system import machine

pytestmark = [pytest.mark.process, pytest.mark.full]
STEPS, RANKS = 3, 2
GOLDEN = ROOT / "tests" / "golden" / "public-deepspeed-configs.json"
ACCEPTED = [
    public
    for public in CONFIGS
    if json.loads(GOLDEN.read_text("utf-8")).get(str(public), ["error"])[0].startswith("cell zero=")
]


def plan_of(public: PublicConfig, folder: Path) -> Plan:
    """Return the plan of three steps of a file; raises RequestError where it is refused."""
    file = public.write(folder)
    made = synthetic.plan_of(f"steps={STEPS}", "schedule.warmup=0", f"--ds-config={file}", ranks=RANKS, batch=())
    made.require_allowed()
    return made


def rank_main(folder: Path) -> None:
    from halfstep.launcher import topology

    plans = {name: Plan.from_dict(tree) for name, tree in json.loads((folder / "plans.json").read_text()).items()}
    rank = topology.from_environment()
    topology.prepare_environment(rank)
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store
    from halfstep.launcher.parity import trial

    distributed.join(rank, next(iter(plans.values())), file_store(folder / "store", rank))
    seen: dict[str, Any] = {}
    for name, plan in plans.items():
        try:
            series = trial.on_deepspeed(plan, rank.rank)
            seen[name] = {"loss": series.loss, "skipped": sum(series.skipped)}
        except Exception as error:  # whatever DeepSpeed raises: the others are worth a look
            seen[name] = {"error": f"{type(error).__name__}: {error}"}
        if rank.rank == 0:
            (folder / "seen.json").write_text(json.dumps(seen))
    distributed.leave()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("public")
    plans = {str(public): plan_of(public, folder).to_dict() for public in ACCEPTED}
    (folder / "plans.json").write_text(json.dumps(plans))
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", __file__, folder],
        env={**environment(scratch), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("public", ACCEPTED, ids=str)
@pytest.mark.skipif(machine.gpu_count() > 0, reason="what is accepted for CPU ranks is trained on them")
def test_a_file_that_is_accepted_trains(seen: dict[str, Any], public: PublicConfig) -> None:
    assert "error" not in seen[str(public)], seen[str(public)]["error"]
    losses = seen[str(public)]["loss"]
    assert len(losses) == STEPS
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(64), abs=0.2), "a fresh model over 64 tokens"


def test_a_file_of_llama_factory_trains_saves_and_resumes_by_the_command(
    start: Any, data: Path, tmp_path: Path
) -> None:
    """Its round_robin_gradients would put the masters of a checkpoint under wrong names."""
    public = next(public for public in CONFIGS if public.path == "examples/deepspeed/ds_z2_config.json")
    arguments = ["model=gpt2-nano", "batch.global=8", "sequence=64", f"data={data}", "checkpoint.every=2"]
    arguments += ["schedule.kind=constant", "schedule.warmup=0", f"--ds-config={public.write(tmp_path)}", "out={out}"]
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments]
    outcomes: list[Outcome] = [
        start(name, [*command, f"steps={steps}"]) for name, steps in (("halves", 2), ("halves", 4), ("whole", 4))
    ]
    assert [outcome.returncode for outcome in outcomes] == [0, 0, 0], outcomes[0].output
    halves, whole = outcomes[1:]
    assert [row["step"] for row in halves.steps] == [1, 2, 3, 4]
    assert halves.losses == whole.losses
    assert "round_robin_gradients" not in halves.json("ds_config.json")["zero_optimization"]


def test_a_refused_file_has_no_plan_to_train(tmp_path: Path) -> None:
    refused = next(public for public in CONFIGS if public.path.endswith("zf_config.json"))
    with pytest.raises(RequestError, match="no-zenflow"):
        plan_of(refused, tmp_path)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort
