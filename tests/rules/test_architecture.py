"""The layers: who may import whom, and that planning never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the design: every chapter, and the chapters it may import at module level.
MAY_IMPORT = {
    "launcher.cli": {
        "spec",
        "topology",
        "plan",
        "rundir",
        "metrics",
        "submit",
        "errors",
        "assets",
        "lease",
        "checkpoint",
        "cli_checkpoint",
        "cli_jobs",
        "cli_plan",
        "cli_run",
        "cli_study",
        "files",
        "terminal",
    },
    "launcher.console": set(),
    "launcher.cli_study": {"spec", "plan", "submit", "topology", "assets", "errors", "terminal"},
    "launcher.cli_checkpoint": {"topology", "errors", "terminal"},
    "launcher.cli_jobs": {"submit", "errors", "terminal"},
    "launcher.cli_plan": {"spec", "topology", "plan", "errors", "terminal"},
    "launcher.cli_run": {"spec", "topology", "plan", "rundir", "submit", "errors", "lease", "trust", "terminal"},
    "launcher.train": {
        "spec",
        "topology",
        "plan",
        "rundir",
        "metrics",
        "data",
        "engine",
        "errors",
        "assets",
        "faults",
        "heap",
        "trust",
        "watch",
        "files",
    },
    "launcher.submit": {
        "plan",
        "spec",
        "rundir",
        "topology",
        "errors",
        "assets",
        "watch",
        "files",
        "foreign",
        "fields",
        "records",
        "lease",
        "trust",
        "terminal",
    },
    "launcher.data": {"plan", "errors", "assets", "foreign", "files"},
    "launcher.engine": {
        "plan",
        "rundir",
        "topology",
        "metrics",
        "data",
        "spec",
        "errors",
        "assets",
        "models",
        "lease",
        "files",
        "faults",
        "watch",
        "checkpoint",
        "clock",
        "caches",
        "trust",
        "environment",
    },
    "launcher.parity": {
        "engine",
        "caches",
        "plan",
        "spec",
        "topology",
        "metrics",
        "assets",
        "faults",
        "errors",
        "models",
    },
    "launcher.study": {
        "spec",
        "topology",
        "plan",
        "rundir",
        "metrics",
        "submit",
        "parity",
        "verdict",
        "watch",
        "lease",
        "files",
        "foreign",
        "fields",
        "records",
        "terminal",
        "errors",
    },
    "launcher.export": {
        "foreign",
        "fields",
        "records",
        "checkpoint",
        "data",
        "metrics",
        "rundir",
        "plan",
        "spec",
        "errors",
        "files",
        "models",
        "environment",
    },
    "launcher.caches": {"watch", "errors"},
    "launcher.trust": {"spec", "plan", "files", "foreign", "errors"},
    "launcher.verdict": {"spec", "topology", "files", "foreign", "assets", "caches"},
    "launcher.faults": {"errors"},
    "launcher.heap": set(),
    "launcher.watch": {"errors", "files", "foreign", "clock"},
    "launcher.checkpoint": {"errors", "files", "foreign", "fields", "faults", "plan", "spec"},
    "launcher.environment": {"assets", "clock", "topology"},
    "launcher.rundir": {
        "environment",
        "spec",
        "plan",
        "topology",
        "errors",
        "assets",
        "clock",
        "files",
        "lease",
        "trust",
        "foreign",
    },
    "launcher.lease": {"errors", "files", "foreign", "watch"},
    "launcher.files": {"errors"},
    "launcher.foreign": set(),
    "launcher.terminal": set(),
    "launcher.fields": set(),
    "launcher.records": {"foreign", "fields", "files"},
    "launcher.clock": set(),
    "launcher.metrics": {"plan", "errors", "files", "foreign", "fields", "clock", "terminal"},
    "launcher.plan": {
        "spec",
        "topology",
        "errors",
        "assets",
        "heap",
        "files",
        "foreign",
        "records",
        "models.shapes",
        "models.presets",
    },
    "launcher.spec": {"models.presets", "errors", "foreign"},
    "launcher.topology": {"errors", "limits", "nodelist"},
    "launcher.limits": {"errors"},
    "launcher.nodelist": {"errors"},
    "launcher.errors": {"terminal"},
    "launcher.assets": set(),
    "models": set(),
}
# Edges inside functions, for verbs that need them.
LATE = {
    "launcher.cli": {"data", "engine", "parity", "verdict"},
    "launcher.console": {"cli"},
    "launcher.cli_checkpoint": {"export"},
    "launcher.cli_jobs": {"submit"},
    "launcher.cli_plan": {"engine", "submit"},
    "launcher.cli_run": {"engine", "submit"},
    "launcher.cli_study": {"study", "submit", "cli_run", "cli"},
    "launcher.train": {"engine"},
    "launcher.plan": set(),
}
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "accelerate"}
MAY_BE_HEAVY = (
    "launcher.engine",
    "launcher.parity",
    "launcher.data",
    # Of export only these: listing, verifying and converting checkpoints does without.
    *(
        f"launcher.export.{page}"
        for page in ("compare", "evaluate", "generate", "model", "tokenizer", "weights", "write")
    ),
    # Of models all but the presets and their arithmetic.
    *(f"models.{page}" for page in ("build", "causality", "config", "draw", "load", "loss", "ranks")),
)


def _modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("launcher", "models"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = list(file.relative_to(ROOT).with_suffix("").parts)
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return found


def _chapter(module: str) -> str:
    if module.split(".")[0] == "models":
        return "models"
    return ".".join(module.split(".")[:2])


def _imports(file: Path) -> list[tuple[str, bool]]:
    """Return every imported module of a file, and whether the import stands at module level."""
    tree = ast.parse(file.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module in ("launcher", "models") else []
            )
            found += [(name, id(node) in top) for name in names or [node.module]]
    return found


@pytest.mark.parametrize(("module", "file"), _modules(), ids=[name for name, _ in _modules()])
def test_no_module_imports_from_a_higher_layer(module: str, file: Path) -> None:
    chapter = _chapter(module)
    if chapter in ("launcher", "launcher.__main__"):
        return
    allowed = MAY_IMPORT[chapter]
    for imported, at_top in _imports(file):
        if imported.split(".")[0] not in ("launcher", "models") or _chapter(imported) == chapter:
            continue
        short = imported.removeprefix("launcher.")
        extra = set() if at_top else LATE.get(chapter, set())
        named = {short, short.split(".")[0], ".".join(imported.split(".")[:2])}
        assert named & (allowed | extra), f"{module} imports {imported}, which {chapter} may not"


@pytest.mark.parametrize(("module", "file"), _modules(), ids=[name for name, _ in _modules()])
def test_torch_stays_in_the_work_layers(module: str, file: Path) -> None:
    heavy = [name for name, _ in _imports(file) if name.split(".")[0] in HEAVY]
    assert not heavy or module.startswith(MAY_BE_HEAVY), f"{module} imports {heavy}"


def test_no_package_has_a_single_module_and_none_is_called_utils() -> None:
    for package in {file.parent for _, file in _modules()}:
        modules = [file for file in package.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) > 1, f"{package.name} has one module"
        assert not any(file.stem in ("utils", "helpers", "common") for file in modules)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["plan", "--help"],
        ["plan", "model=gpt2-124m", "data=DATA"],
        ["plan", "model=gpt3-175b", "data=DATA", "hardware=H100", "nodes=128", "gpus_per_node=8", "batch.global=1024"],
        ["plan", "--search", "model=gpt2-124m", "data=DATA", "hardware=H100", "nodes=1,2", "gpus=8"],
        ["run", "--dry-run", "model=gpt2-nano", "data=DATA"],
    ],
    ids=lambda words: " ".join(words),
)
def test_planning_never_loads_torch(words: list[str], corpus: Path) -> None:
    words = [word.replace("DATA", str(corpus)) for word in words]
    program = (
        "import sys\nfrom launcher.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "assert not code and not heavy, (code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
