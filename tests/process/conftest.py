"""Real ranks: a small corpus prepared once, and a way to start a run and read what it left."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks import environment

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WORDS = [
    "model=gpt2-nano",
    "batch.global=8",
    "batch.micro=2",
    "sequence=64",
    "steps=20",
    "eval.every=10",
    "eval.sequences=6",
]
"""A run small enough for a test: 8 sequences of 64 tokens a step on two ranks, accumulation 2."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left behind."""

    out: Path
    returncode: int
    output: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" not in row]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "events.jsonl").read_text().splitlines()]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / name).read_text())


@pytest.fixture(scope="session")
def start(scratch: Path) -> Callable[..., Outcome]:
    """Return a function that runs a command to its end; `{out}` in it is the run directory."""

    def run(name: str, command: list[str], *, cwd: Path = ROOT, timeout: int = 240, **more: str) -> Outcome:
        out = scratch / "runs" / name
        arguments = [str(word).replace("{out}", str(out)) for word in command]
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env={**environment(scratch), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Outcome(out=out, returncode=done.returncode, output=done.stdout)

    return run


@pytest.fixture(scope="session")
def cell(start: Callable[..., Outcome], data: Path) -> Callable[[int, str], Outcome]:
    """Return a function that trains one (stage, precision) cell with `deepspeed` on two ranks, once a session."""
    done: dict[tuple[int, str], Outcome] = {}

    def train(zero: int, precision: str) -> Outcome:
        if (zero, precision) not in done:
            arguments = [*WORDS, f"zero={zero}", f"precision={precision}", f"data={data}", "out={out}"]
            command = [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *arguments]
            done[zero, precision] = start(f"z{zero}-{precision}", command)
        return done[zero, precision]

    return train
