"""Judge the model in training by tasks: all ranks share the examples, and nothing of the training is disturbed."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from halfstep.launcher.config import precisions, task_file
from halfstep.launcher.corpus import corpus_manifest
from halfstep.launcher.data import tokenizer as data_tokenizer
from halfstep.launcher.engine.build import learn_gathering_anew
from halfstep.launcher.engine.ranks.distributed import gather_objects
from halfstep.launcher.engine.untyped import Engine
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.tasks.answers import Asked
from halfstep.launcher.tasks.judge import Judged, judge
from halfstep.launcher.tasks.requests import prepare
from halfstep.models.hf_config import positions

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Judges:
    """The tasks of a plan, read and made tokens of before the first step: what is wrong with them is said then."""

    def __init__(self, engine: Engine, plan: Plan, rank: int) -> None:
        """Read a plan's tasks. Raises RequestError for what is wrong with one, or is not what was planned."""
        self._engine, self._plan, self._rank = engine, plan, rank
        self._prepared = []
        if not plan.tasks:
            return
        precision = precisions.of(plan.precision)
        tokenizer = _tokenizer(plan)
        self._asked = Asked(
            network=engine.module,
            tokenizer=tokenizer,
            device=engine.device,
            autocast=_AUTOCAST[precision.products] if precision.autocast else None,
            synced=plan.zero == 3 and plan.topology.world_size > 1,
        )
        for planned in plan.tasks:
            task = task_file.read(Path(planned.path), "eval.tasks")
            if task.digest != planned.digest:
                raise RequestError(
                    f"the task {planned.name} was changed since the run was planned",
                    where=f"eval.tasks, {planned.path}",
                    fix="start the same command again",
                )
            self._prepared.append(prepare(task, tokenizer, positions(engine.module)))

    def judge(self, before: Callable[[], bool]) -> list[Judged] | None:
        """Return what came of every task, on all ranks the same; None where `before` returned False. A collective call.

        `before` is called before each batch, by every rank as often.
        """
        results = []
        with _apart(self._engine):
            for prepared in self._prepared:
                result = judge(
                    prepared,
                    self._asked,
                    rank=self._rank,
                    ranks=self._plan.topology.world_size,
                    before=before,
                    gather=gather_objects,
                )
                if result is None:
                    return None
                results.append(result)
        return results


@contextlib.contextmanager
def _apart(engine: Engine) -> Iterator[None]:
    """Let the model be asked: in evaluation mode, uncompiled, without a trace in random states or gathering.

    Compiled blocks would be compiled anew for the shapes of a cache, again and again.
    """
    devices: list[Any] = [engine.device] if engine.device.type == "cuda" else []
    training = engine.training
    with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        engine.eval()
        try:
            yield
        finally:
            engine.train(training)
            learn_gathering_anew(engine)


def _tokenizer(plan: Plan) -> data_tokenizer.Tokenizer:
    """Return the tokenizer of the corpus, or of a mixture's parts, who share it."""
    corpus = Path(plan.data.corpora[0].path)
    about = corpus_manifest.read(corpus)[0].tokenizer
    return data_tokenizer.load(corpus / about.path, about.kind)
