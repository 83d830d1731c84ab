"""Judge an exported model, or the newest checkpoint of a run, by tasks."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.launcher.config import precisions, task_file
from halfstep.launcher.data import tokenizer as data_tokenizer
from halfstep.launcher.errors import RequestError
from halfstep.launcher.export import exported, source
from halfstep.launcher.export.weights import DTYPES
from halfstep.launcher.export.write_export import export
from halfstep.launcher.tasks.answers import Asked
from halfstep.launcher.tasks.judge import Judged, judge
from halfstep.launcher.tasks.requests import prepare


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is judged."""

    model: str
    """The folder that was named."""
    step: int | None
    dtype: str
    """What it computes in."""
    device: str
    asked: Asked
    context: int | None
    folder: Path
    """The export, which for a run is a passing one."""


def judge_folder(
    folder: Path,
    tasks: Sequence[Path],
    *,
    step: int | None = None,
    dtype: str | None = None,
    each: Callable[[Subject, Judged], None],
) -> None:
    """Judge an export, or a checkpoint of a run (the newest, or that of `step`), by tasks; `each` gets what came of it.

    The type is that in which the export was written, or in which the run computes; `dtype` is another one. Every task
    is read before the first is judged. Raises RequestError as reading, exporting and loading do.
    """
    read = [task_file.read(path, f"--task {path}") for path in tasks]
    with subject_of(folder, step, dtype) as subject:
        prepared = [prepare(task, subject.asked.tokenizer, subject.context) for task in read]
        for task in prepared:
            result = judge(task, subject.asked)
            assert result is not None, "nobody stops it"
            each(subject, result)


@contextlib.contextmanager
def subject_of(folder: Path, step: int | None, dtype: str | None) -> Iterator[Subject]:
    """Give the model of an export or of a run's checkpoint, loaded, for as long as the block lasts."""
    is_run = not (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    if not is_run:
        if step is not None:
            raise RequestError(
                f"{folder} is no run, and has no steps", where=f"--step {step}", fix="leave --step out, or name a run"
            )
        yield _loaded(folder, str(folder), dtype, None)
        return
    chosen = source.choose(folder, step, f"halfstep eval {folder}")
    precision = precisions.of(chosen.manifest.precision)
    autocast = DTYPES[precision.products] if precision.autocast and dtype is None else None
    with tempfile.TemporaryDirectory(prefix="halfstep-eval-") as home:
        made = Path(home) / "export"
        export(folder, made, step=chosen.manifest.step, dtype=dtype or precision.weights, comparing=False)
        yield _loaded(made, str(folder), None, autocast)


def _loaded(folder: Path, name: str, dtype: str | None, autocast: torch.dtype | None) -> Subject:
    exported.tokenizer(folder)  # says what is missing, and how it comes back
    tokenizer = data_tokenizer.HuggingFace.load(str(folder))
    network: Any = exported.load(folder, DTYPES[dtype] if dtype else "auto")
    note = exported.note(folder)
    if note is not None:
        # What ends a turn of a chat ends no other text: a task that is laid out by a template brings its ends along.
        # The run's own evaluations know of no others either.
        network.generation_config.eos_token_id = network.config.eos_token_id
    computed = str(autocast or network.dtype).removeprefix("torch.")
    return Subject(
        model=name,
        step=(note or {}).get("step"),
        dtype=f"{computed} by autocast" if autocast else computed,
        device=str(network.device),
        asked=Asked(network=network, tokenizer=tokenizer, device=network.device, autocast=autocast),
        context=exported.context(network),
        folder=folder,
    )
