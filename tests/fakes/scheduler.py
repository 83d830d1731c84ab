"""SLURM's commands as small programs that answer what a test wants them to."""

import os
import stat
from pathlib import Path

NAMES = ("squeue", "sbatch", "scancel", "scontrol", "sinfo")


def install(folder: Path, monkeypatch: object, **answers: str | bytes | tuple[int, str]) -> Path:
    """Put programs before everything else in PATH; each prints its answer, or ends with (code, what it says)."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        answer = answers.get(name, "")
        code, said = answer if isinstance(answer, tuple) else (0, answer)
        content = said if isinstance(said, bytes) else said.encode("utf-8", errors="surrogateescape")
        (folder / f"{name}.answer").write_bytes(content)
        stream = ">&2" if code else ""
        (folder / name).write_text(f"#!/bin/sh\ncat '{folder}/{name}.answer' {stream}\nexit {code}\n")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")  # type: ignore[attr-defined]
    return folder


def line(job: str, state: str, comment: str, *, reason: str = "None", nodes: str = "", left: str = "1:00") -> str:
    """Return a line of squeue in the form that Halfstep asks for."""
    return f"{job}|{state}|{reason}|{nodes}|{left}|main|{comment}\n"
