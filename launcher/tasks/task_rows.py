"""The examples of a task: each row of its data as a prompt, a reference and choices."""

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config.task_file import CHOICES, Task, TaskSpec
from halfstep.launcher.data import formats, streams
from halfstep.launcher.errors import RequestError, nearest

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task, as text."""

    row: int
    """The line that it stands in, from 1."""
    prompt: str
    messages: tuple[Message, ...] | None = None
    """The conversation that stands for the prompt, where a chat template lays it out."""
    reference: str | None = None
    """What a right answer is; None where nothing asks for it."""
    choices: tuple[str, ...] = ()
    right: int | None = None
    """Which choice the reference is."""


def read(task: Task) -> list[Example]:
    """Return a task's examples in the order of its data.

    Raises RequestError for data without rows and for a row that lacks what the task asks of it.
    """
    spec, examples = task.spec, []
    prompt, reference = _Layout(spec.prompt, "prompt", task), _Layout(spec.reference, "reference", task)
    for number, row in _rows(task.data):
        where = f"{task.data}, line {number}"
        if spec.messages is not None:
            *messages, last = _messages(row, spec.messages, where)
            example = Example(
                row=number,
                prompt=messages[-1]["content"],
                messages=tuple(messages),
                reference=last["content"],
                **_choices(spec, row, last["content"], last["content"], where),
            )
        else:
            text = prompt.of(row, where)
            right = reference.of(row, where) if spec.needs_reference else None
            example = Example(
                row=number,
                prompt=text,
                messages=({"role": "user", "content": text},) if spec.template else None,
                reference=right,
                **_choices(spec, row, right, reference.value_of(row), where),
            )
        examples.append(example)
        if len(examples) == spec.limit:
            break
    if not examples:
        raise RequestError("the data of the task has no rows", where=str(task.data), fix="write one JSON object a line")
    return examples


class _Layout:
    """A text with fields of a row in it."""

    def __init__(self, text: str, key: str, task: Task) -> None:
        try:
            self._parts = [
                (before, field, odd) for before, field, spec, odd in string.Formatter().parse(text) if not spec
            ]
            if any(odd or field == "" for _, field, odd in self._parts) or len(self._parts) < len(
                list(string.Formatter().parse(text))
            ):
                raise ValueError("a field is its name in braces, and nothing else")
        except ValueError as error:
            raise RequestError(
                f"{key} cannot be laid out: {error}",
                where=f"{key} in {task.path}",
                fix="write {field} for a field of the row, {{ and }} for braces",
            ) from None
        self._key, self._task = key, task

    def of(self, row: dict[str, Any], where: str) -> str:
        """Return the text for a row."""
        return "".join(
            before + ("" if field is None else self._text(row, field, where)) for before, field, _ in self._parts
        )

    def value_of(self, row: dict[str, Any]) -> Any:
        """Return the value of the field that is all of the text; None where it is more than a field."""
        fields = [field for before, field, _ in self._parts if field is not None and not before]
        return _inside(row, fields[0]) if len(fields) == len(self._parts) == 1 else None

    def _text(self, row: dict[str, Any], field: str, where: str) -> str:
        value = _inside(row, field)
        if value is None:
            names = list(row)
            meant = nearest(field, names) or names[:3] or ["nothing"]
            raise RequestError(
                f"the row has no field {field!r}, which {self._key} asks for",
                where=where,
                fix=f"it has {', '.join(map(repr, names[:8])) or 'none'}; "
                f"did you mean {' or '.join(meant)}? Change {self._key} in {self._task.path}",
            )
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RequestError(
                f"the field {field!r} holds {type(value).__name__}, not text or a number",
                where=where,
                fix=f"write it as text, or name another field in {self._key}",
            )
        return str(value)


def _inside(row: dict[str, Any], field: str) -> Any:
    """Return what a field holds; `meta.text` names a field inside another."""
    value: Any = row
    for part in (field,) if field in row else field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    given = formats.of(path, formats.JSON_LINES)
    with streams.opened(path, given) as file:
        for line in streams.lines(file, path):
            text = streams.decode(line.content, path, line.offset)
            if not text.strip():
                continue
            where = f"{path}, line {line.number}"
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"line {line.number} is not JSON: {error}", where=where, fix="write one object a line"
                ) from None
            if not isinstance(row, dict):
                raise RequestError(
                    f"line {line.number} is a JSON {type(row).__name__}, not an object",
                    where=where,
                    fix="write one object a line",
                )
            yield line.number, row


def _messages(row: dict[str, Any], field: str, where: str) -> list[Message]:
    """Return a conversation that has a prompt and an answer of the assistant's."""
    given = _inside(row, field)
    fits = isinstance(given, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in given
    )
    if not fits or len(given) < 2 or given[-1]["role"] != "assistant":
        raise RequestError(
            f"the field {field!r} holds no conversation that ends with the assistant's answer",
            where=where,
            fix='a list of {"role": ..., "content": ...}, the last one of role assistant',
        )
    return [{"role": message["role"], "content": message["content"]} for message in given]


def _choices(spec: TaskSpec, row: dict[str, Any], reference: str | None, value: Any, where: str) -> dict[str, Any]:
    """Return the choices of a row and which of them is right."""
    if spec.answer.kind != CHOICES:
        return {}
    choices = _inside(row, spec.answer.choices_field) if spec.answer.choices_field else spec.answer.choices
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise RequestError(
            f"the field {spec.answer.choices_field!r} holds no choices",
            where=where,
            fix="a list of two texts or more",
        )
    if not all(choice.strip() for choice in choices):
        raise RequestError(
            "a choice is empty, and has no likelihood",
            where=f"{where}, choice {[bool(choice.strip()) for choice in choices].index(False)}",
            fix="leave it out, or say in words what it stands for",
        )
    return {"choices": tuple(choices), "right": _right(choices, reference, value, where)}


def _right(choices: Sequence[str], reference: str | None, value: Any, where: str) -> int:
    """Return the place of the right choice, which the reference names by its text or by its number."""
    texts = [choice.strip() for choice in choices]
    if reference is not None and reference.strip() in texts:
        return texts.index(reference.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise RequestError(
        f"the reference {(reference or '')[:60]!r} is none of the choices",
        where=where,
        fix=f"it is one of {', '.join(map(repr, texts[:6]))}, or its number from 0",
    )
