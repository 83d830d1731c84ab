"""What others wrote reaches a terminal by one way: the verbs print nothing by themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Ranks and tools print their own words, and errors, which write themselves out; `rich` draws bars and tables.
MAY_PRINT = ("launcher/engine", "launcher/parity", "launcher/data", "tools/catalogue.py", "launcher/train.py",
             "launcher/rundir/lease.py", "launcher/submit/local.py", "launcher/export/generate.py", "launcher/watchdog",
             "launcher/system/terminal.py")  # fmt: skip


@pytest.mark.parametrize(
    "file", sorted((ROOT / "launcher").rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix()
)
def test_a_verb_prints_through_the_terminal_page(file: Path) -> None:
    if file.relative_to(ROOT).as_posix().startswith(MAY_PRINT):
        return
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    printed = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    written = [
        node.lineno
        for node in calls
        if isinstance(node.func, ast.Attribute)
        and node.func.attr in ("write", "writelines")
        and ast.unparse(node.func.value) in ("sys.stdout", "sys.stderr")
    ]
    assert printed + written == [], f"{file.name} prints in lines {printed + written}: `system.terminal.say` does"
