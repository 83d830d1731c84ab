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
    commands = []
    for page in PAGES:
        for line in re.findall(r"^\$ (.+)$", page.read_text(), re.MULTILINE):
            commands.append(line.partition("  #")[0].strip())
    return commands


@pytest.mark.parametrize(
    "command", [command for command in _commands() if re.search(r"halfstep|launcher/train\.py", command)]
)
def test_a_documented_command_is_understood(command: str) -> None:
    line = [word for word in shlex.split(command) if "=" not in word or not word.startswith("DS_")]
    if line[0].endswith("halfstep"):
        arguments, extra = main._parser().parse_known_args(line[1:])
        request = [] if line[1] == "jobs" else [*getattr(arguments, "words", []), *extra]
        if request[:1] == ["score"]:
            return
        if getattr(arguments, "search", False):
            request, _ = alternatives._axes(request)
        if request and all(word.endswith(".toml") or "=" in word for word in request):
            request = ["model=gpt2-nano", "data=/data"] + [word for word in request if not word.endswith(".toml")]
    else:
        request = line[[Path(word).name for word in line].index("train.py") + 1 :]
    if request and not request[0].startswith(("--run", "run=")):
        # Only a plan may do without data.
        assert load(request, data="plan" not in command).spec.model.name


def test_the_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in _commands() if command.startswith("make ")}
    assert named
    assert named <= targets


def test_the_run_file_that_is_shown_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "run.toml").write_text(block)
    assert load([str(tmp_path / "run.toml")]).spec.precision == "fp16"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?:\]\(|^\[\w+\]: )([^)#\s]+)", page.read_text(), re.MULTILINE):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert "@@" not in page.read_text()


def test_the_first_page_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert text.count("![") == 1
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_what_a_contributor_is_told_to_touch_exists() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## To add")[2]
    named = re.findall(r"`((?:launcher|models|tests|slurm|docs|ds_configs|benchmarks)/[\w./-]*)", table)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []
