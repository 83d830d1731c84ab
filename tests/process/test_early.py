"""What happens before ranks have met: a launcher that dies, a rank that dies, a signal while they wait."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults import rig
from faults.rig import Launch
from process.conftest import BIN, WORDS
from ranks import environment

from halfstep.launcher.rundir.lease import lease

pytestmark = pytest.mark.process


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_nothing_outlives_halfstep_run_that_is_killed_before_its_ranks_have_woken(
    data: Path, scratch: Path, launcher: str
) -> None:
    out = scratch / "runs" / f"orphans-{launcher}"
    arguments = ["run", "--with", launcher, *WORDS, f"data={data}", "zero=2"]
    process = rig.start_by("halfstep", arguments, out, scratch)
    rig.wait_for(lambda: [candidate for candidate in rig.processes(out) if candidate.pid != process.pid])
    process.send_signal(signal.SIGKILL)
    process.wait()
    with rig.nothing_left(out, within=30):  # Python and torch are imported meanwhile; a rank ends when it is awake
        pass
    assert "done:" not in rig.log_of(out, scratch)
    assert "halfstep run, process" in rig.log_of(out, scratch)


def test_a_rank_that_waits_for_the_others_hears_a_signal(data: Path, scratch: Path) -> None:
    out = scratch / "runs" / "waiting"
    launch = Launch(out, [*WORDS, f"data={data}", "zero=2"], scratch, only=(0,))
    launch.until(lambda: _listens(launch.ranks[0]))
    launch.kill(signal.SIGTERM)
    assert launch.wait(timeout=30) == [75], launch.output
    assert "stopped: SIGTERM, before the ranks had met" in launch.output
    assert "Traceback" not in launch.output


def test_a_rank_that_is_asked_to_stop_while_it_imports_keeps_no_other_waiting(data: Path, scratch: Path) -> None:
    """It is gone before the roll call, and says so to the rank that holds it."""
    out = scratch / "runs" / "importing"
    launch = Launch(out, [*WORDS, f"data={data}", "zero=2"], scratch, HALFSTEP_FAULT="import:1:0:hang")
    launch.until(lambda: _listens(launch.ranks[0]))
    launch.kill(signal.SIGTERM, ranks=(1,))
    assert launch.wait(timeout=30) == [75, 75], launch.output
    assert "stopped: SIGTERM, before the ranks had met" in launch.output
    assert "stopped: asked to stop before the run had begun" in launch.output


def test_what_every_rank_refuses_is_said_although_the_first_rank_is_gone(data: Path, scratch: Path) -> None:
    launch = Launch(scratch / "runs" / "refused", [*WORDS, f"data={data}", "zero=9"], scratch, only=(1,))
    assert launch.wait(timeout=60) == [2], launch.output
    assert launch.output.count("error: ") == 1, launch.output
    assert "zero" in launch.output


def test_a_rank_that_leaves_the_telling_to_another_ends_with_its_own_code_when_told_to(
    data: Path, scratch: Path
) -> None:
    """As srun tells the others once a rank has failed: a code that says `stopped` would have the job begin again."""
    out = scratch / "runs" / "held"
    out.mkdir(parents=True)
    with lease(out):
        launch = Launch(out, [*WORDS, f"data={data}", "zero=2"], scratch)
        launch.until(lambda: launch.ranks[0].poll() is not None)
        launch.kill(signal.SIGTERM, ranks=(1,))
        assert launch.wait(timeout=30) == [2, 2], launch.output
    assert launch.output.count("error: ") == 1, launch.output
    assert "stopped" not in launch.output


def test_a_rank_that_dies_early_ends_the_others(data: Path, scratch: Path) -> None:
    out = scratch / "runs" / "early death"
    launch = Launch(out, [*WORDS, f"data={data}", "zero=2"], scratch, HALFSTEP_FAULT="jit:1:0:kill9")
    # It has met the others: what is left of it is a connection that breaks, or a process group that never opens.
    launch.until(lambda: launch.ranks[1].poll() is not None)
    time.sleep(0.5)
    launch.kill(signal.SIGTERM, ranks=(0,))  # as a launcher does
    assert launch.wait(timeout=30)[1] == -signal.SIGKILL, launch.output


def test_a_second_start_is_refused_while_the_ranks_of_the_first_wake_up(data: Path, scratch: Path) -> None:
    out = scratch / "runs" / "twice"
    arguments = ["run", *WORDS, "steps=2", "eval.every=0", f"data={data}", "zero=1"]
    first = rig.start_by("halfstep", [*arguments, "precision=fp32"], out, scratch)
    rig.wait_for((out / "plan.json").exists)
    second = subprocess.run(
        [str(BIN / "halfstep"), *arguments, "precision=bf16", f"out={out}"],
        cwd=rig.ROOT,
        env=environment(scratch),
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: {out} is in use by process {first.pid} on ")
    assert first.wait(120) == 0, rig.log_of(out, scratch)
    assert json.loads((out / "summary.json").read_text())["precision"] == "fp32"


def _listens(rank: "subprocess.Popen[bytes]") -> bool:
    """Tell whether a rank has opened the socket at which the others meet it."""
    return any("halfstep-" in connection.laddr for connection in psutil.Process(rank.pid).net_connections("unix"))


def test_a_rank_whose_launcher_had_died_before_it_began_says_so() -> None:
    program = (
        "import os, subprocess, sys, time\n"
        "os.environ['TORCHELASTIC_RUN_ID'] = 'x'\n"
        "code = 'import time; time.sleep(0.5); from halfstep.launcher.watchdog import heartbeat as h'\n"
        "code += '; h.begin(0, 1.0, print)'\n"
        "subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=rig.ROOT, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert "torchrun had ended before this rank began" in done.stderr
