"""Variables say what they are: `one`, `found`, `told` and `words` say nothing, and are names of none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED = {"one", "found", "told", "words"}


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
