"""What the documents say is true: every command parses, every key exists, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from halfstep.launcher.cli import main
from halfstep.launcher.config.load import load
from halfstep.launcher.plan import alternatives

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "ds_configs" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def _commands() -> list[str]:
    found = []
    for page in PAGES:
        for line in re.findall(r"^\$ (.+)$", page.read_text(), re.MULTILINE):
            found.append(line.partition("  #")[0].strip())
    return found


@pytest.mark.parametrize("command", [one for one in _commands() if re.search(r"halfstep|launcher/train\.py", one)])
def test_a_documented_command_is_understood(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word or not word.startswith("DS_")]
    if words[0].endswith("halfstep"):
        arguments, extra = main._parser().parse_known_args(words[1:])
        words = [] if words[1] == "jobs" else [*getattr(arguments, "words", []), *extra]
        if words[:1] == ["score"]:
            return
        if getattr(arguments, "search", False):
            words, _ = alternatives._axes(words)
        if words and all(word.endswith(".toml") or "=" in word for word in words):
            words = ["model=gpt2-nano", "data=/data"] + [word for word in words if not word.endswith(".toml")]
    else:
        words = words[[Path(word).name for word in words].index("train.py") + 1 :]
    if words and not words[0].startswith(("--run", "run=")):
        # Only a plan may do without data.
        assert load(words, data="plan" not in command).spec.model.name


def test_the_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in _commands() if command.startswith("make ")}
    assert named
    assert named <= targets


def test_the_run_file_of_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.toml").write_text(block)
    assert load([str(tmp_path / "run.toml")]).spec.precision == "fp16"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert "@@" not in page.read_text()
