"""Let lm-evaluation-harness judge an export, or a run, by its own tasks."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfstep.launcher.errors import RequestError
from halfstep.launcher.export import exported
from halfstep.launcher.export.judged import subject_of
from halfstep.models.hf_config import one_line

EXTRA = "halfstep[eval]"


def evaluate(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    step: int | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return what the harness says of a model: `results` by task and metric, and what was judged.

    `include` is a folder with task files (YAML) of one's own; the harness's own tasks read their data from the hub,
    or from its cache. `limit` is how many examples of each task are asked. Raises RequestError where the package is not
    installed, there is no such task, or its data cannot be had.
    """
    harness = _harness()
    if include is not None and not include.is_dir():
        raise RequestError(f"there is no folder {include}", where=f"--lm-eval-path {include}", fix="check the path")
    where = f"--lm-eval {','.join(tasks)}"
    manager = harness.tasks.TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise RequestError(
                f"the harness knows no task {task!r}",
                where=where,
                fix="name a folder with its YAML file with --lm-eval-path, or one that `lm-eval ls tasks` lists",
            )
    with subject_of(folder, step, dtype) as subject:
        try:
            model = harness.models.huggingface.HFLM(
                pretrained=subject.asked.network,
                tokenizer=exported.tokenizer(subject.folder),
                batch_size=batch,
                mixed_precision_dtype=subject.asked.autocast,
            )
            with contextlib.redirect_stdout(io.StringIO()):  # it prints as it likes, and our output may be JSON
                said: Any = harness.simple_evaluate(
                    model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
                )
        except Exception as error:  # of any kind: its own, of `datasets`, of whatever a task's file says
            raise RequestError(
                f"the harness could not judge by it: {one_line(error)}",
                where=where,
                fix="check the task's file and its data; without a network only data that lies here can be read",
            ) from error
    return {
        "model": subject.model,
        "step": subject.step,
        "dtype": subject.dtype,
        "device": subject.device,
        "harness": harness.__version__,
        "results": {task: _plain(values) for task, values in said["results"].items()},
        "examples": {task: counts["effective"] for task, counts in said["n-samples"].items()},
        "versions": said["versions"],
    }


def _harness() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.models.huggingface  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RequestError(
            f"lm-evaluation-harness is not installed: {one_line(error)}",
            where="--lm-eval",
            fix=f"pip install '{EXTRA}', or judge by a task file of Halfstep's own with --task",
        ) from None
    return lm_eval


def _plain(values: dict[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a task by metric, as `acc` and `acc_stderr`; a filter that is not `none` stays named."""
    plain = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma:
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            plain[name] = float(value) if isinstance(value, int | float) else None
    return plain
