"""The house: which room may import which, what loads torch, and names that say what they are without their folder.

ROOMS is the only layer table; a room may import what its row names, and every row names rows below it only.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Every room from the top of the house to the bottom, and the rooms below that it may import; it may import itself.
ROOMS = {
    # The command: one module a family of verbs.
    "cli": "config errors forecast plan rundir submit system topology",
    # One training process.
    "train": "config errors fault_injection plan rundir system topology watchdog",
    # Many runs: the grid, its conditions, what may be concluded.
    "study": "config errors metrics parity plan rundir submit system topology",
    # The proof that every cell trains the same model.
    "parity": "config corpus engine errors fault_injection models plan rundir system topology",
    # What a machine has and how fast it is.
    "doctor": "engine errors forecast system topology",
    # The work: DeepSpeed, the loop, the training state.
    "engine": (
        "checkpoint config corpus data errors fault_injection metrics models plan rundir system tasks topology watchdog"
    ),
    # Tasks made of what a machine has.
    "ready_tasks": "data errors system",
    # What is made of a checkpoint.
    "export": "checkpoint config corpus data errors metrics models rundir system tasks",
    # What a model makes of tasks, and what its answers are worth.
    "tasks": "config data errors metrics models system",
    # How a run starts: here, over a hostfile, as a SLURM job.
    "submit": "config errors plan rundir system topology watchdog",
    # Text to tokens, tokens to batches.
    "data": "corpus errors system",
    # Records and what is shown of them.
    "metrics": "errors rundir system",
    # Who watches a rank and ends it.
    "watchdog": "errors rundir system",
    # What lies in a run directory.
    "rundir": "checkpoint config errors plan system topology",
    # What will happen.
    "plan": "checkpoint config corpus errors forecast models system topology",
    # What it will need and take.
    "forecast": "config errors models system topology",
    # What a checkpoint is on disk.
    "checkpoint": "config errors fault_injection models system",
    # What a corpus and its tokenizer say of themselves.
    "corpus": "config errors system",
    # What was asked.
    "config": "errors models system",
    # Faults on purpose, for tests.
    "fault_injection": "errors",
    # Which processes take part, and on what.
    "topology": "errors system",
    # Files, the screen, the clock, other processes.
    "system": "errors",
    # What is said when it stops.
    "errors": "",
    # What the network is.
    "models": "",
}
# Imports inside functions, for verbs that need what takes long to load.
LATE = {
    "cli": "data doctor export metrics parity ready_tasks study",
    "train": "engine parity",
}
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "accelerate", "peft"}
MAY_BE_HEAVY = (
    "launcher.engine",
    "launcher.parity",
    "launcher.data",
    "launcher.doctor",
    # Of export only these: listing, verifying and converting checkpoints does without.
    *(
        f"launcher.export.{module}"
        for module in (
            *("chat_template", "compare", "evaluate", "exported", "generate", "harness", "judged"),
            *("tokenizer_files", "weights", "write_adapter", "write_export"),
        )
    ),
    "launcher.tasks.answers",
    # It makes the model under adapters; what is read and written without them does without.
    "launcher.checkpoint.merged",
    # Of models all but the presets and their arithmetic.
    *(
        f"models.{module}"
        for module in (
            "adapters",
            "causality",
            "collective",
            "draw",
            "fused_head",
            "hf_config",
            "hf_weights",
            "islands",
            "loss",
            "micro_batch",
            "nano",
            "network",
            "observe",
            "router",
        )
    ),
)


def _tree(*folders: str) -> list[tuple[str, Path]]:
    modules = []
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            modules.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return modules


MODULES = _tree("launcher", "models")
NAMES = {name for name, _ in MODULES}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "models" or len(parts) == 1 else parts[1]


def _imports(file: Path) -> list[tuple[str, bool]]:
    """Return every module that a file imports, ours without `halfstep.`, and whether at module level."""
    tree = ast.parse(file.read_text())
    top = {id(node) for node in tree.body}
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = node.module.removeprefix("halfstep.")
            for alias in node.names:
                full = f"{base}.{alias.name}" if base != "halfstep" else alias.name
                imported.append((full if full in NAMES else base, id(node) in top))
    return imported


def test_every_row_of_the_table_names_rows_below_it_only() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert all(order.index(room) < order.index(other) for other in below.split()), f"{room} looks up"
    assert set(order) == {_room(name) for name, _ in MODULES} - {"launcher"}


@pytest.mark.parametrize(("module", "file"), MODULES, ids=[name for name, _ in MODULES])
def test_no_module_imports_from_a_higher_layer(module: str, file: Path) -> None:
    room = _room(module)
    for imported, at_top in _imports(file):
        assert imported not in ("launcher",) or module == imported, f"{module} imports what a clone alone can find"
        if imported.split(".")[0] not in ("launcher", "models") or _room(imported) in (room, "launcher"):
            continue
        allowed = ROOMS[room].split() + ([] if at_top else LATE.get(room, "").split())
        assert _room(imported) in allowed, f"{module} imports {imported}, which {room} may not"


@pytest.mark.parametrize(("module", "file"), MODULES, ids=[name for name, _ in MODULES])
def test_torch_stays_in_the_work_layers(module: str, file: Path) -> None:
    heavy = [name for name, _ in _imports(file) if name.split(".")[0] in HEAVY]
    assert not heavy or module.startswith(MAY_BE_HEAVY), f"{module} imports {heavy}"


def test_no_module_is_imported_under_a_name_that_others_have() -> None:
    """`launcher` and `models` are names of other people's packages, too: ours are under `halfstep`."""
    for _, file in _tree("launcher", "models", "tools", "tests", "benchmarks"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] in ("launcher", "models") for name in names), f"{file}: {names}"


def test_a_module_is_known_by_its_name_alone() -> None:
    modules = [(name.split(".")[-1], file) for name, file in _tree("launcher", "models", "tools")]
    stems = Counter(stem for stem, file in modules if file.name not in ("__init__.py", "__main__.py"))
    assert [stem for stem, count in stems.items() if count > 1] == []
    assert sorted(set(stems) & set(sys.stdlib_module_names)) == [], "these are names of the standard library"


_PATH = re.compile(rf"(?<![\w/.-])(?:launcher/)?((?:{'|'.join([*ROOMS, 'tools', 'benchmarks'])})/[a-z_0-9/]+\.py)\b")


def test_files_that_comments_and_pages_name_are_there() -> None:
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    there |= {path.removeprefix("launcher/") for path in there}
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(file for _, file in _tree("launcher", "models", "tools")),
    ]
    gone = {
        f"{page.name}: {name}" for page in pages for name in _PATH.findall(page.read_text("utf-8")) if name not in there
    }
    assert gone == set()


def test_no_package_has_a_single_module_and_none_is_called_utils() -> None:
    for package in {file.parent for _, file in MODULES}:
        modules = [file for file in package.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) > 1, f"{package.name} has one module"
        assert not any(file.stem in ("utils", "helpers", "common") for file in modules)


def test_a_short_module_has_more_than_one_reader() -> None:
    """A module under 40 lines that only one other imports belongs into that one."""
    readers = Counter(
        imported for _, file in _tree("launcher", "models", "tools") for imported, _ in set(_imports(file))
    )
    short = [
        name
        for name, file in MODULES
        if file.name != "__init__.py" and len(file.read_text().splitlines()) < 40 and readers[name] < 2
    ]
    assert short == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--help"],
        ["plan", "model=gpt2-124m", "data=DATA"],
        ["plan", "model=gpt3-175b", "data=DATA", "hardware=H100", "nodes=128", "gpus_per_node=8", "batch.global=1024"],
        ["plan", "--search", "model=gpt2-124m", "data=DATA", "hardware=H100", "nodes=1,2", "gpus=8"],
        ["run", "--dry-run", "model=gpt2-nano", "data=DATA"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_planning_never_loads_torch(arguments: list[str], corpus: Path) -> None:
    arguments = [word.replace("DATA", str(corpus)) for word in arguments]
    program = (
        "import sys\nfrom halfstep.launcher.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "assert not code and not heavy, (code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
