"""Readers are given damaged inputs by the thousand: each is refused in three lines, or read for what it says, and soon.

A failure names the reader, the number of the case and what was done; the same number is the same case again. Some of
them here, all of them in `make test-mutations`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import checkpoints, content, given, people, records
from mutations.driver import Reader, failures

NAMES = {
    records: (
        *("jobs", "plan score", "numerics", "goodput", "inside end", "how it ended", "read_plan", "study report"),
        *("study.json", "study status", "study pages", "verdict", "lease", "stall reports"),
    ),
    checkpoints: ("checkpoint bytes", "checkpoint hashed again", "checkpoint verbs"),
    people: (
        *("run file", "words of a request", "DeepSpeed config", "study file", "task file", "site", "hostfile"),
        *("hardware table", "published rows"),
    ),
    given: (
        *("squeue", "scontrol", "sinfo", "sbatch", "words of the verbs", "variables of ranks"),
        *("faults on purpose", "times of SLURM"),
    ),
}
READERS = [name for names in NAMES.values() for name in names]
_made: dict[str, Reader] = {}


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Reader]:
    """Return a reader by its name; all of a page are made at once, in a folder that stays."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "HALFSTEP_SITE", "XDG_CONFIG_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        if request.param not in _made:
            (page,) = [page for page, names in NAMES.items() if request.param in names]
            folder = tmp_path_factory.mktemp("mutations")
            shutil.copytree(corpus, folder / "corpus")
            made = {item.name: item for item in page.all_readers(folder, folder / "corpus")}
            assert set(made) == set(NAMES[page])
            _made.update(made)
        yield _made[request.param]


@pytest.mark.parametrize("reader", READERS, indirect=True)
def test_what_is_damaged_is_refused_with_words_or_read_for_what_it_says(reader: Reader) -> None:
    assert failures(reader, reader.some) == []


@pytest.mark.faults
@pytest.mark.parametrize("reader", READERS, indirect=True)
def test_that_of_all_that_is_damaged(reader: Reader) -> None:
    seen = failures(reader, reader.count)
    assert not seen, f"{len(seen)} of {reader.count}:\n" + "\n".join(seen)


@pytest.mark.faults
@pytest.mark.parametrize("name", list(content.COUNTS))
def test_that_of_what_libraries_read(name: str, corpus: Path, tmp_path: Path) -> None:
    seen = content.alone(name, content.COUNTS[name], corpus, tmp_path)
    assert not seen, f"{len(seen)} of {content.COUNTS[name]}:\n" + "\n".join(seen)


@pytest.mark.faults
def test_there_are_at_least_ten_thousand(tmp_path: Path, corpus: Path) -> None:
    total = sum(content.COUNTS.values())
    for number, page in enumerate(NAMES):
        folder = tmp_path / str(number)
        shutil.copytree(corpus, folder / "corpus")
        total += sum(item.count for item in page.all_readers(folder, folder / "corpus"))
    assert total >= 10_000
