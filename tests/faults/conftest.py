"""Runs to be hurt, and the undisturbed ones that they have to equal."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.rig import WORDS, Launch


@pytest.fixture(scope="session")
def launch(scratch: Path, data: Path) -> Callable[..., Launch]:
    """Return a function that starts ranks of a run: `launch(name or path, *arguments, world=2, HALFSTEP_FAULT=...)`."""

    def begin(name: str | Path, *arguments: str, world: int = 2, **more: str) -> Launch:
        out = name if isinstance(name, Path) else scratch / "faults" / name
        return Launch(out, [*WORDS, f"data={data}", *arguments], scratch, world=world, **more)

    return begin


@pytest.fixture(scope="session")
def undisturbed(launch: Callable[..., Launch]) -> Callable[..., Path]:
    """Return a function that runs something to its end, once a session, and returns its run directory."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*arguments: str, world: int = 2) -> Path:
        key = (str(world), *arguments)
        if key not in done:
            launched = launch(f"reference-{len(done)}", *arguments, world=world)
            assert launched.wait() == [0] * world, launched.output
            done[key] = launched.out
        return done[key]

    return run


@pytest.fixture
def record() -> Callable[..., None]:
    """Return a function that writes down what a fault did, where HALFSTEP_RESULTS names a file for it."""

    def write(fault: str, **figures: Any) -> None:
        if file := os.environ.get("HALFSTEP_RESULTS"):
            with Path(file).open("a") as out:
                out.write(json.dumps({"fault": fault, **figures}) + "\n")

    return write


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a failure down when it happens: the whole matrix takes most of an hour."""
    if report.failed and (file := os.environ.get("HALFSTEP_RESULTS")):
        with Path(f"{file}.failures").open("a") as out:
            out.write(f"{report.nodeid}\n{report.longreprtext[-3000:]}\n\n")
