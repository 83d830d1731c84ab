"""A task file: what a model is given, how its answer is taken, and what the answers are measured by."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfstep.launcher.config import legal
from halfstep.launcher.config.digest import digest
from halfstep.launcher.config.text_file import read_toml
from halfstep.launcher.errors import RequestError, nearest
from halfstep.launcher.system import foreign

GENERATE, CHOICES, PERPLEXITY = "generate", "choices", "perplexity"
KINDS_OF_METRIC = {
    "accuracy": (CHOICES, GENERATE),
    "macro_f1": (CHOICES, GENERATE),
    "exact_match": (GENERATE,),
    "bleu": (GENERATE,),
    "chrf": (GENERATE,),
    "perplexity": (PERPLEXITY, GENERATE),
    **{f"distinct_{n}": (GENERATE,) for n in range(1, 5)},
}
"""Every metric, and the ways of answering that it fits."""
_KINDS_OF_KEY = {
    "beams": (GENERATE,),
    "max_new_tokens": (GENERATE,),
    "stop": (GENERATE,),
    "choices": (CHOICES,),
    "choices_field": (CHOICES,),
    "per_token": (CHOICES,),
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_COUNT = Field(ge=1, le=1 << 20)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Answer(_Table):
    """`[answer]`: how the model's answer is taken."""

    kind: Literal["generate", "choices", "perplexity"]
    """generate: it continues the prompt; choices: the likeliest of given ones; perplexity: of the reference."""
    beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Beams of the search; 1 = greedy."""
    max_new_tokens: Annotated[int, _COUNT] = 64
    """Tokens that an answer may have."""
    stop: list[str] = []
    """Texts at which an answer ends; they are not part of it."""
    choices: list[str] | None = None
    """The choices, as they follow the prompt."""
    choices_field: str | None = None
    """The field that holds each row's own list of choices, instead."""
    per_token: bool = False
    """Compare likelihoods per token, so that a longer choice has no disadvantage."""

    @field_validator("stop", "choices")
    @classmethod
    def _no_empty_text(cls, texts: list[str] | None) -> list[str] | None:
        if texts is not None and "" in texts:
            raise ValueError("an empty text cannot be one of them")
        return texts

    @model_validator(mode="after")
    def _fits(self) -> "Answer":
        for key in sorted(self.model_fields_set & set(_KINDS_OF_KEY)):
            if self.kind not in _KINDS_OF_KEY[key]:
                raise ValueError(f'{key} belongs to kind = "{_KINDS_OF_KEY[key][0]}", not to "{self.kind}"')
        if self.kind == CHOICES:
            if (self.choices is None) == (self.choices_field is None):
                raise ValueError("choices or choices_field says what is chosen from; give one of them")
            if self.choices is not None and len(set(self.choices)) < max(2, len(self.choices)):
                raise ValueError("choices are two or more, and all different")
        return self


class TaskSpec(_Table):
    """The keys of a task file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,59}$")]
    """What results call it."""
    data: str
    """JSON lines, compressed or not; the path is relative to the task file."""
    prompt: str = "{prompt}"
    """What the model is given: text with {field}s of a row, and {{ }} for braces."""
    reference: str = "{completion}"
    """What a right answer is, in the same way; of choices also the number of the right one, from 0."""
    messages: str | None = None
    """The field that holds a conversation, instead of both: its last message is the reference."""
    template: Literal["chatml", "alpaca", "plain", "tokenizer"] | None = None
    """The chat template that the prompt, or the conversation, is laid out by; unset: the text as it is."""
    answer: Answer
    """How the answer is taken."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """What measures answers: accuracy, macro_f1, exact_match, bleu, chrf, perplexity, distinct_1 to distinct_4."""
    limit: Annotated[int, _COUNT] | None = None
    """Rows that are read, the first of the file; unset: all."""
    batch: Annotated[int, Field(ge=1, le=4096)] = 16
    """Sequences that are computed at a time."""
    too_long: Literal["refuse", "cut", "skip"] = "refuse"
    """Of prompts for which the model has no room: end with an error, drop their beginning, or leave the row out."""
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """sacrebleu's tokenizer for BLEU."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        for metric in metrics:
            if metric not in KINDS_OF_METRIC:
                close = nearest(metric, KINDS_OF_METRIC) or list(KINDS_OF_METRIC)
                raise ValueError(f"there is no metric {legal.shown(metric)}; did you mean {' or '.join(close)}?")
        if len(set(metrics)) < len(metrics):
            raise ValueError("a metric stands there twice")
        return metrics

    @model_validator(mode="after")
    def _fits(self) -> "TaskSpec":
        for metric in self.metrics:
            if self.answer.kind not in KINDS_OF_METRIC[metric]:
                fitting = ", ".join(name for name, kinds in KINDS_OF_METRIC.items() if self.answer.kind in kinds)
                raise ValueError(
                    f'metric {metric} does not fit answer.kind = "{self.answer.kind}"; these do: {fitting}'
                )
        if self.messages is not None and self.template is None:
            raise ValueError("messages are laid out by a chat template; give template, too")
        if self.messages is not None and self.model_fields_set & {"prompt", "reference"}:
            raise ValueError("messages stand for both prompt and reference; give one or the other")
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether a row has to say what a right answer is."""
        given = "reference" in self.model_fields_set
        return given or any(not metric.startswith("distinct_") for metric in self.metrics)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task file that was read."""

    path: Path
    data: Path
    spec: TaskSpec
    digest: str
    """Of what it asks and of the bytes of its data, wherever they lie."""
    longest_row: int | None = None
    """Bytes of the longest row of its data; None where they are compressed."""


def read(path: Path, where: str = "the command line") -> Task:
    """Read a task file; `where` is who named it. Raises RequestError for whatever is wrong with it."""
    tree = read_toml(path, "the task file", where)
    try:
        spec = TaskSpec.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(dict(detail), path) for detail in error.errors()]
        raise problems[0].with_more(problems[1:]) from None
    data = Path(legal.absolute("data", spec.data, path.absolute().parent, str(path)))
    try:
        with foreign.open_regular(data, follow=True) as stream:
            content, longest = _read_through(stream)
    except OSError as error:
        raise RequestError(
            f"the data of task {spec.name} cannot be read: {error.strerror}",
            where=f"data = {legal.shown(spec.data)} in {path}",
            fix="check the path: it is relative to the task file",
        ) from None
    asked = spec.model_dump(mode="json", exclude={"name", "data", "batch"})
    return Task(
        path=path,
        data=data,
        spec=spec,
        digest=digest({"asked": asked, "data": content}),
        longest_row=None if data.suffix.lower() in _COMPRESSED else longest,
    )


def require_room(task: Task, context: int) -> None:
    """Raise RequestError for answers that leave no room to a prompt in the tokens that a model looks at."""
    wanted = task.spec.answer.max_new_tokens
    if task.spec.answer.kind == GENERATE and wanted >= context:
        raise RequestError(
            f"an answer may have {wanted} tokens, and the model looks at {context}, those of the prompt among them",
            where=f"answer.max_new_tokens in {task.path}",
            fix=f"answer.max_new_tokens below {context}, or a model with a longer context",
        )


def _read_through(stream: BinaryIO) -> tuple[str, int]:
    """Return the SHA-256 of a file and the bytes of its longest line."""
    content, longest, line = hashlib.sha256(), 0, 0
    while part := stream.readline(1 << 20):
        content.update(part)
        line += len(part)
        longest = max(longest, line)
        line = 0 if part.endswith(b"\n") else line
    return content.hexdigest(), longest


def _problem(detail: dict[str, Any], path: Path) -> RequestError:
    key = ".".join(str(part) for part in detail["loc"])
    inside = [name for name in detail["loc"] if isinstance(name, str)]
    if detail["type"] == "extra_forbidden":
        table: type[BaseModel] = Answer if inside[0] == "answer" and len(inside) > 1 else TaskSpec
        known = list(table.model_fields)
        elsewhere = [f"answer.{name}" for name in Answer.model_fields if name == inside[-1] and table is TaskSpec]
        close = elsewhere or nearest(inside[-1], known) or known
        return RequestError(
            f"a task has no key {legal.shown(key)}", where=str(path), fix=f"did you mean {' or '.join(close)}?"
        )
    if detail["type"] == "missing":
        return RequestError(f"the task does not say its {key}", where=str(path), fix=f"{key}: {_about(inside)}")
    message = re.sub(r"^(Value error, |Input )", "", detail["msg"])
    if not inside or isinstance(detail["input"], dict):
        return RequestError(message, where=str(path), fix="change one of the two, or leave it out")
    return RequestError(
        f"{key} = {legal.shown(detail['input'])}: {message}", where=str(path), fix=f"{key}: {_about(inside)}"
    )


def _about(inside: list[str]) -> str:
    table: Any = Answer if inside[0] == "answer" and len(inside) > 1 else TaskSpec
    return str(table.model_fields[inside[-1]].description).rstrip(".")
