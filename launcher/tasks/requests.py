"""What a model is asked for a task's examples, as token ids, and in which batches."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfstep.launcher.config import task_file
from halfstep.launcher.config.task_file import GENERATE, Task, TaskSpec
from halfstep.launcher.data import chat
from halfstep.launcher.data.chat import Template
from halfstep.launcher.data.tokenizer import Tokenizer
from halfstep.launcher.errors import RequestError
from halfstep.launcher.tasks import task_rows
from halfstep.launcher.tasks.task_rows import Example


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One sequence that a model reads, to continue it or to be scored on its end."""

    example: int
    """Its place among the examples."""
    ids: tuple[int, ...]
    start: int | None = None
    """Where the scored tokens begin; None: the sequence is to be continued."""
    choice: int = 0
    """Which choice its end is."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task as a model is asked it: examples and, batch by batch, what is asked for them."""

    task: Task
    examples: tuple[Example, ...]
    """Those that are asked, in the order of the data."""
    generations: tuple[tuple[Ask, ...], ...]
    """Batches of prompts of similar length that are to be continued, the same for any number of ranks."""
    scorings: tuple[tuple[Ask, ...], ...]
    """Batches of sequences whose ends are to be scored."""
    cut: int
    """Prompts that lost their beginning, for which the model has no room."""
    skipped: int
    """Rows that were left out for that."""
    prompt_tokens: int
    template: Template | None
    """What laid the prompts out, and knows where an answer ends; None: they are text as it is."""


def prepare(task: Task, tokenizer: Tokenizer, context: int | None) -> Prepared:
    """Read a task's data and make token ids of it, for a model that looks at `context` tokens at most (None: any).

    Raises RequestError as reading does, and where a prompt is too long and the task does not say what to do about it.
    """
    if context is not None:
        task_file.require_room(task, context)
    read = task_rows.read(task)
    template = _template(task, tokenizer)
    asked, kept, cut = [], [], 0
    too_long: list[Example] = []
    for example in read:
        asks = _asks(task, example, len(kept), tokenizer, template)
        surplus = max(_surplus(ask, task.spec, context) for ask in asks)
        if surplus > 0:
            too_long.append(example)
            if task.spec.too_long == "skip":
                continue
            if task.spec.too_long == "cut":
                asks = [_cut(ask, task, example, _surplus(ask, task.spec, context)) for ask in asks]
                cut += 1
        asked += asks
        kept.append(example)
    if too_long and task.spec.too_long == "refuse":
        raise _no_room(task, too_long, len(read), context)
    if not kept:
        raise RequestError(
            f"all {len(read)} prompts are too long for the model, which looks at {context} tokens",
            where=f'too_long = "skip" in {task.path}',
            fix="take a model with a longer context, shorter prompts, or a smaller max_new_tokens",
        )
    return Prepared(
        task=task,
        examples=tuple(kept),
        generations=_batches([ask for ask in asked if ask.start is None], task.spec.batch),
        scorings=_batches([ask for ask in asked if ask.start is not None], task.spec.batch),
        cut=cut,
        skipped=len(read) - len(kept),
        prompt_tokens=sum(len(ask.ids) if ask.start is None else ask.start for ask in asked if ask.choice == 0),
        template=template,
    )


def _template(task: Task, tokenizer: Tokenizer) -> Template | None:
    """Return the chat template that a task names. Raises RequestError where the tokenizer has none of its own."""
    if task.spec.template is None:
        return None
    with _of_task(f"template in {task.path}"):
        return chat.named(task.spec.template, tokenizer)


@contextlib.contextmanager
def _of_task(where: str) -> Iterator[None]:
    """Say of what is wrong with a template that a task asked for it, not a command's option."""
    try:
        yield
    except RequestError as error:
        fix = "take another template, or leave it out for prompts that are text as it is"
        raise RequestError(error.what, where=where, fix=fix) from None


def _asks(task: Task, example: Example, place: int, tokenizer: Tokenizer, template: Template | None) -> list[Ask]:
    """Return what is asked for one example."""
    spec = task.spec
    asks = []
    if template is None:
        prompt = tokenizer.encode(example.prompt)
    else:
        with _of_task(f"{task.data}, line {example.row}"):
            prompt = template.prompt(example.messages or ())
    if spec.answer.kind == GENERATE:
        asks.append(Ask(example=place, ids=tuple(prompt or [tokenizer.end_of_text])))
    texts = example.choices
    if "perplexity" in spec.metrics:
        assert example.reference is not None, "a perplexity has a reference"
        texts = (example.reference,)
    if texts:
        if template is None:
            whole = [tokenizer.encode(example.prompt + text) for text in texts]
        else:  # which encodes what the assistant writes apart
            whole = [[*prompt, *tokenizer.encode(text)] for text in texts]
        # Tokens may reach over the end of the prompt: all choices are scored from where the first of them parts.
        start = min(_common(prompt, ids) for ids in whole)
        start = min(start, *(len(ids) - 1 for ids in whole))
        # What ends a document is what a model has seen before a first word.
        before = [] if start > 0 else [tokenizer.end_of_text]
        asks += [
            Ask(example=place, ids=(*before, *ids), start=start + len(before), choice=number)
            for number, ids in enumerate(whole)
        ]
    return asks


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))


def _surplus(ask: Ask, spec: TaskSpec, context: int | None) -> int:
    """Return how many tokens a sequence has that the model has no room for."""
    if context is None:
        return 0
    # The last token of a sequence that is scored is predicted, not read.
    needed = len(ask.ids) - 1 if ask.start is not None else len(ask.ids) + spec.answer.max_new_tokens
    return needed - context


def _cut(ask: Ask, task: Task, example: Example, surplus: int) -> Ask:
    """Return what is asked without the beginning of its prompt."""
    if surplus <= 0:
        return ask
    if surplus >= (len(ask.ids) if ask.start is None else ask.start):
        raise RequestError(
            "the answer alone is longer than the model's context: no part of the prompt is left",
            where=f"{task.data}, line {example.row}",
            fix="leave the row out, or take a smaller max_new_tokens or a model with a longer context",
        )
    start = None if ask.start is None else ask.start - surplus
    return Ask(example=ask.example, ids=ask.ids[surplus:], start=start, choice=ask.choice)


def _no_room(task: Task, too_long: list[Example], rows: int, context: int | None) -> RequestError:
    room = f"its answer.max_new_tokens = {task.spec.answer.max_new_tokens} among them"
    lines = ", ".join(str(example.row) for example in too_long[:5]) + (", ..." if len(too_long) > 5 else "")
    return RequestError(
        f"{len(too_long)} of {rows} prompts do not fit into the {context} tokens that the model looks at"
        + (f", {room}" if task.spec.answer.kind == GENERATE else ", their answers among them"),
        where=f"{task.data}, lines {lines}",
        fix='too_long = "cut" in the task drops the beginning of such prompts, "skip" leaves the rows out',
    )


def _batches(asked: Sequence[Ask], size: int) -> tuple[tuple[Ask, ...], ...]:
    """Return batches of similar lengths, the longest first: what does not fit into memory fails at once."""
    ordered = sorted(asked, key=lambda ask: (-len(ask.ids), ask.example, ask.choice))
    return tuple(tuple(ordered[start : start + size]) for start in range(0, len(ordered), size))
