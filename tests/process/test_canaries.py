"""The installed DeepSpeed does what docs/deepspeed.md says: one test a behaviour, over one run of the command."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from process.conftest import ROOT, environment

from tools.canaries import CANARIES
from tools.canaries import __main__ as command
from tools.canaries.bench import Canary

pytestmark = pytest.mark.process

NAMES = [canary.name for canary in CANARIES]
PAGE = ROOT / "docs" / "deepspeed.md"
# The day DeepSpeed scales the loss at stage 0, as #8393 proposes.
SCALING_DEEPSPEED = """
import sys
from tools.canaries import __main__ as command, bench
made = bench.engine
def engine(zero, *arguments, **keys):
    one = made(zero, *arguments, **keys)
    if zero == 0 and one.fp16_enabled():
        backward = one.backward
        one.backward = lambda loss: backward(loss * one.optimizer.loss_scale)
    return one
from tools.canaries import stage_0
stage_0.engine = engine
sys.exit(command.main(sys.argv[1:]))
"""


def run(scratch: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(scratch), capture_output=True, text=True, timeout=480
    )


@pytest.fixture(scope="module")
def rows(scratch: Path) -> dict[str, dict[str, Any]]:
    """Return what one run of the command saw, by canary."""
    done = run(scratch, "-m", "tools.canaries", "--json")
    assert done.returncode in (0, 1), done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_behaves_as_documented(name: str, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[name]
    assert row["ok"], f"documented: {row['sentence']}. Seen: {row['seen']}. To do: {row['changed']}."


def test_a_deepspeed_that_scales_the_loss_at_stage_0_is_noticed(scratch: Path) -> None:
    done = run(scratch, "-c", SCALING_DEEPSPEED, "fp16-stage-0-loss-unscaled", "fp16-stage-0-clipping-inert")
    assert done.returncode == 1, done.stderr
    assert re.search(r"^fp16-stage-0-loss-unscaled +CHANGED: the gradient is 1024\.0 times", done.stdout, re.MULTILINE)
    assert "stops by itself; drop it from launcher/engine/numerics/repair.py" in done.stdout
    assert re.search(r"^fp16-stage-0-clipping-inert +CHANGED:", done.stdout, re.MULTILINE)


def test_what_cannot_be_looked_at_has_changed() -> None:
    def look() -> tuple[bool, str]:
        raise AttributeError("'Wrapper' object has no attribute 'fp32_groups'")

    canary = Canary(name="one", sentence="it holds", trap="T1", reference="here", look=look, changed="do that")
    good, seen = command.look(canary)
    assert not good
    assert seen == "it cannot be looked at: AttributeError: 'Wrapper' object has no attribute 'fp32_groups'"


def test_a_misspelt_name_is_told_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["fp16-stage-0-loss-unscale"])
    assert stop.value.code == 2
    assert "did you mean fp16-stage-0-loss-unscaled?" in capsys.readouterr().err


def test_every_canary_has_a_name_of_its_own_and_says_what_to_do() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(canary.sentence and canary.changed and canary.reference for canary in CANARIES)


def test_the_page_has_a_command_for_every_canary_and_names_no_other() -> None:
    commands = re.findall(r"^\$ python -m tools\.canaries(.*)$", PAGE.read_text(), re.MULTILINE)
    named = {word for line in commands for word in line.partition("#")[0].split() if not word.startswith("--")}
    assert named - set(NAMES) == set(), "the page names canaries that do not exist"
    assert set(NAMES) - named == set(), "canaries without a command on the page"
