"""What several test folders share: a corpus small enough to make by hand, and a way to plan without a machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.pairs import write_pair
from hypothesis import settings
from ranks import environment

from halfstep.launcher.config.load import load
from halfstep.launcher.corpus import corpus_manifest
from halfstep.launcher.corpus.vocabulary import tokenizer_sha256
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology

# A deadline would be a test of the machine's load.
settings.register_profile("halfstep", deadline=None)
settings.load_profile("halfstep")


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let no measured CPU, device table or site of whoever runs the tests change a plan."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    os.environ.pop("HALFSTEP_SITE", None)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a prepared folder with 100,000 training and 5,000 validation tokens and a vocabulary of 4096."""
    folder = tmp_path / "corpus"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"not a real one")
    splits = {}
    for split, tokens in (("train", 100_000), ("validation", 5_000)):
        write_pair(folder / split, tokens)
        sizes = {ending: (folder / f"{split}.{ending}").stat().st_size for ending in ("bin", "idx")}
        splits[split] = {"tokens": tokens, "documents": 1, "prefix": split, "bytes": sizes}
    content = {
        "format": corpus_manifest.FORMAT,
        "kind": corpus_manifest.KIND,
        "source": {"asked": "by hand"},
        "tokenizer": {
            "kind": "sentencepiece",
            "path": "tokenizer",
            "sha256": tokenizer_sha256(folder / "tokenizer"),
            "vocabulary": 4096,
            "end_of_text": 0,
            "name": "by hand",
        },
        "token_dtype": "uint16",
        "max_token_id": 99,
        "seed": 0,
        "splits": splits,
        "versions": {},
    }
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def plan(corpus: Path) -> Callable[..., Plan]:
    """Return a function that plans key=value words for two CPU ranks, or for another topology."""

    def make(*pairs: str, topology: Topology | None = None) -> Plan:
        request = load(["model=gpt2-nano", f"data={corpus}", *pairs])
        world = topology or Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
        return resolve(request, world, facts.read(request.spec))

    return make


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("process")


@pytest.fixture(scope="session")
def data(scratch: Path) -> Path:
    """Return a corpus of three of the standard library's own files, prepared by the real command."""
    out = scratch / "data"
    files = [str(Path(os.__file__).parent / name) for name in ("argparse.py", "typing.py", "inspect.py")]
    folder = scratch / "text"
    folder.mkdir()
    for file in files:
        (folder / Path(file).with_suffix(".txt").name).write_bytes(Path(file).read_bytes())
    command = [
        "data",
        "prepare",
        "--source",
        str(folder),
        "--out",
        str(out),
        "--vocab-size",
        "512",
        "--validation-fraction",
        "0.05",
    ]
    done = subprocess.run(
        [Path(sys.executable).parent / "halfstep", *command],
        capture_output=True,
        text=True,
        env=environment(scratch),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out
