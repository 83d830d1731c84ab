"""Another user of this host tries to join, read and forge a start, from its first moment to its last."""

import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import stranger
from faults.rig import Launch
from process.conftest import BIN, WORDS, Outcome

pytestmark = pytest.mark.process
PYTHON = Path("/usr/bin/python3")
"""One that other users can run; a virtual environment may lie where they cannot."""


@pytest.fixture
def attacked(scratch: Path) -> Iterator[Callable[[Path], "Attack"]]:
    """Return a function that lets a stranger loose on a run directory until the test is over."""
    if os.geteuid() != 0 or not PYTHON.exists():
        pytest.skip("only root can start another user's process, and he needs a Python of the system's")
    attacks: list[Attack] = []

    def begin(run: Path) -> Attack:
        attacks.append(Attack(run))
        return attacks[-1]

    yield begin
    for attack in attacks:
        attack.end()


class Attack:
    """One stranger's process, and what it got hold of."""

    def __init__(self, run: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir="/tmp"))
        self._folder.chmod(0o777)
        self._mark = Path(stranger.MARK)
        self._mark.unlink(missing_ok=True)
        script = self._folder / "stranger.py"
        shutil.copy(stranger.__file__, script)
        arguments = [str(PYTHON), str(script), str(run), str(self._folder / "stop"), str(self._folder / "report.json")]
        nobody = pwd.getpwnam("nobody")
        self._process = subprocess.Popen(arguments, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/")
        end = time.monotonic() + 10
        while not (self._folder / "ready").exists() and time.monotonic() < end:
            time.sleep(0.02)

    def end(self) -> dict:
        """Stop the stranger and return its report."""
        if not self._folder.exists():
            return {}
        (self._folder / "stop").touch()
        self._process.wait(30)
        report = self._folder / "report.json"
        reported = json.loads(report.read_text()) if report.exists() else {}
        executed = self._mark.exists()
        shutil.rmtree(self._folder, ignore_errors=True)
        return {**reported, "executed": executed}


def check(report: dict) -> None:
    assert report["visited"], "the stranger has found what the ranks listen at"
    assert not report["executed"], "no code of his ran"
    assert report["got"] == {}, "nothing was read, and nothing written"


def test_a_stranger_on_this_host_changes_nothing(
    attacked: Callable[[Path], Attack],
    start: Callable[..., Outcome],
    cell: Callable[..., Outcome],
    data: Path,
    scratch: Path,
) -> None:
    attack = attacked(scratch / "runs" / "attacked")
    arguments = [*WORDS, "zero=2", "precision=fp32", f"data={data}", "out={out}"]
    # The second rank comes late, so that the first waits for it while the stranger is there.
    outcome = start("attacked", [str(BIN / "halfstep"), "run", *arguments], HALFSTEP_FAULT="import:1:0:sleep=4")
    check(attack.end())
    assert outcome.returncode == 0, outcome.output
    assert outcome.losses == cell(2, "fp32").losses
    seen = outcome.json("attempts/0001/preflight.json")["strangers"]
    assert len(seen) == 1
    assert seen[0].endswith(" connection(s) from this host: it belongs to nobody")
    assert f"WARNING: sent away {seen[0]}" in outcome.output


def test_a_stranger_on_the_network_changes_nothing(
    attacked: Callable[[Path], Attack], cell: Callable[..., Outcome], data: Path, scratch: Path
) -> None:
    out = scratch / "runs" / "attacked-nodes"
    attack = attacked(out)
    arguments = [*WORDS, "zero=2", "precision=fp32", f"data={data}"]
    # As many threads as the cell's ranks have, or the last digit differs.
    more = {"OMP_NUM_THREADS": "1", "HALFSTEP_FAULT": "import:1:0:sleep=4"}
    launch = Launch(out, arguments, scratch, nodes=2, **more)
    codes = launch.wait()
    check(attack.end())
    assert codes == [0, 0], launch.output
    assert Outcome(out=out, returncode=0, output=launch.output).losses == cell(2, "fp32").losses
    seen = json.loads((out / "attempts/0001/preflight.json").read_text())["strangers"]
    assert any(line.endswith(" from 127.0.0.1: it does not know the secret of this launch") for line in seen), seen
