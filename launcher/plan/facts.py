"""Read, before planning, what a plan depends on besides the request, so that `resolve` can be pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.launcher.config import task_file
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.config.task_file import Task
from halfstep.launcher.corpus.description import DataFacts
from halfstep.launcher.corpus.joined import read_corpora
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import hardware
from halfstep.launcher.plan.ds import dsfile
from halfstep.launcher.plan.earlier_run import read_run
from halfstep.launcher.plan.pretrained import ModelFacts, read_model
from halfstep.launcher.system import foreign


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was read for one plan."""

    data: DataFacts | None
    """None for a request that names no data: a plan of something that is not to be started."""
    model: ModelFacts | None
    """None for a preset."""
    ds_config: dict[str, Any] | None
    """The content of --ds-config FILE."""
    router_loss: float | None = None
    """The coefficient with which the run in `out` began, 0 where it is older than that; None where there is no run."""
    tasks: tuple[Task, ...] = ()
    """What the model is judged by at evaluations."""
    node_memory_bytes: int | None = None
    """Memory of a host of CPU ranks; None where it is another host than this one, or any of several."""
    hardware: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The user's own table of devices, this CPU among them."""


def read(spec: RunSpec, node_memory_bytes: int | None = None) -> Facts:
    """Read the facts for a request; an `hf:` model is constructed, which loads torch.

    `node_memory_bytes` is asked for by who plans for one host: ranks that plan by themselves have to plan alike, and
    two hosts seldom have the same memory to the byte.
    """
    data = None if spec.data is None else read_corpora(spec.data)
    examples, model = data is not None and data.has_examples, None
    if spec.model.name.startswith("run:"):
        model = read_run(spec, examples=examples)
    elif spec.model.name.startswith("hf:"):
        model = read_model(spec, examples=examples)
    return Facts(
        data=data,
        model=model,
        ds_config=ds_config(spec),
        router_loss=_begun_with(spec.out) if model and model.network.router_loss is not None else None,
        hardware=hardware.read_own(),
        tasks=_tasks(spec.eval.tasks),
        node_memory_bytes=node_memory_bytes,
    )


def _tasks(paths: Sequence[str]) -> tuple[Task, ...]:
    """Read task files; raises RequestError for what is wrong with them, and for two of one name."""
    tasks = [task_file.read(Path(path), "eval.tasks") for path in paths]
    named: dict[str, Task] = {}
    for task in tasks:
        other = named.setdefault(task.spec.name, task)
        if other is not task:
            raise RequestError(
                f"two tasks are called {task.spec.name}",
                where=f"eval.tasks, {other.path} and {task.path}",
                fix="give each a name of its own",
            )
    return tuple(tasks)


def ds_config(spec: RunSpec) -> dict[str, Any] | None:
    """Return the content of the DeepSpeed file that a request names, if it does."""
    return dsfile.read(Path(spec.ds_config)) if spec.ds_config else None


def _begun_with(out: str | None) -> float | None:
    """Return the coefficient of the routers' loss in a run's plan; whose run it is will be asked later."""
    try:
        tree = foreign.read_object(Path(out) / "plan.json") if out else {}
    except (OSError, ValueError):
        return None
    value = tree.get("router_loss", 0.0) if "model" in tree else None
    return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else None
