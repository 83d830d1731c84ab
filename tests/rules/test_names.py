"""Variables say what they are: `one`, `found`, `told` and `words` say nothing, and are names of none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED = {"one", "found", "told", "words"}
NOT_YET: tuple[str, ...] = (
    "benchmarks/",
    "launcher/cli/job_list.py",
    "launcher/cli/main.py",
    "launcher/cli/planning.py",
    "launcher/cli/running.py",
    "launcher/cli/studies.py",
    "launcher/config/",
    "launcher/engine/",
    "launcher/errors.py",
    "launcher/fault_injection.py",
    "launcher/forecast/",
    "launcher/metrics/",
    "launcher/parity/",
    "launcher/plan/",
    "launcher/rundir/",
    "launcher/study/",
    "launcher/submit/",
    "launcher/topology.py",
    "launcher/train.py",
    "launcher/watchdog/",
    "tests/faults/",
    "tests/process/",
    "tests/slurm/",
    "tests/unit/test_deepspeed_files.py",
    "tests/unit/test_deepspeed_keys.py",
    "tests/unit/test_distributed.py",
    "tests/unit/test_forensics.py",
    "tests/unit/test_goodput.py",
    "tests/unit/test_hostfile.py",
    "tests/unit/test_meeting.py",
    "tests/unit/test_numerics_report.py",
    "tests/unit/test_pace.py",
    "tests/unit/test_parity.py",
    "tests/unit/test_plan.py",
    "tests/unit/test_plan_activations.py",
    "tests/unit/test_plan_bounds.py",
    "tests/unit/test_plan_memory.py",
    "tests/unit/test_plan_packages.py",
    "tests/unit/test_plan_score.py",
    "tests/unit/test_plan_search.py",
    "tests/unit/test_plan_time.py",
    "tests/unit/test_plan_without_data.py",
    "tests/unit/test_preflight.py",
    "tests/unit/test_rundir.py",
    "tests/unit/test_spec.py",
    "tests/unit/test_stop.py",
    "tests/unit/test_study_grid.py",
    "tests/unit/test_study_noise.py",
    "tests/unit/test_study_proof.py",
    "tests/unit/test_study_report.py",
    "tests/unit/test_submit.py",
    "tests/unit/test_trust.py",
    "tools/",
)
"""Folders and files where some are left."""


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each name that code gives to a value, with its line: targets, parameters, `as`, patterns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)


FILES = [
    file.relative_to(ROOT).as_posix()
    for folder in ("launcher", "models", "tools", "benchmarks", "tests")
    for file in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("file", FILES)
def test_no_variable_has_a_name_that_says_nothing(file: str) -> None:
    if file.startswith(NOT_YET):
        return
    names = [(line, name) for line, name in bound(ast.parse((ROOT / file).read_text())) if name in BANNED]
    assert names == [], f"{file}: name what it is (`row`, `run`, `finding`, `arguments`, ...)"


@pytest.mark.parametrize(
    "code",
    [
        "one = 1",
        "for one in x: pass",
        "[one for one in x]",
        "lambda one: 1",
        "def f(*, one=1): pass",
        "(one := 1)",
        "with x as one: pass",
        "try: pass\nexcept E as one: pass",
        "a, (b, one) = x",
        "import x as one",
        "class C:\n one: int",
        "match x:\n case {'a': one}: pass",
    ],
)
def test_every_way_to_bind_a_name_is_seen(code: str) -> None:
    assert "one" in [name for _, name in bound(ast.parse(code))]
