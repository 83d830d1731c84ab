"""Lay conversations out as tokens: by a template that Halfstep knows by name, or by the tokenizer's own."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from halfstep.launcher.data.tokenizer import HuggingFace, Tokenizer
from halfstep.launcher.errors import RequestError

ALL, LAST = "all", "last"
"""Which of the assistant's turns are targets."""
CHATML, ALPACA, PLAIN, TOKENIZER = "chatml", "alpaca", "plain", "tokenizer"
CHOICES = (CHATML, ALPACA, PLAIN, TOKENIZER)
ASSISTANT = "assistant"

Message = dict[str, Any]
"""`role` and `content`, both text; the tokenizer's own template may know more."""


class Template(Protocol):
    """How a conversation is written; RequestError is raised for what a template does not take."""

    name: str
    stops: frozenset[int]
    """The ids that end a turn of the assistant."""

    def encode(self, messages: Sequence[Message], targets: str = ALL) -> tuple[list[int], list[int]]:
        """Return a conversation's token ids, and as many marks: 1 where the assistant writes the token, else 0.

        The end of a turn is the assistant's. `targets` is ALL, or LAST for its last turn alone.
        """
        ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids after which the assistant writes: what `encode` begins with when its turn follows."""
        ...

    def answer(self, ids: Sequence[int]) -> str:
        """Return the text of a turn that was generated, without its end and what follows it."""
        ...


def named(name: str | None, tokenizer: Tokenizer) -> Template:
    """Return a template for a tokenizer; None: the tokenizer's own where it has one, else `plain`.

    Raises RequestError for a name that is none of CHOICES, and where the tokenizer has no template.
    """
    own = isinstance(tokenizer, HuggingFace) and bool(tokenizer.library.chat_template)
    if name is None:
        name = TOKENIZER if own else PLAIN
    if name == TOKENIZER:
        from halfstep.launcher.data.own_template import OwnTemplate

        if isinstance(tokenizer, HuggingFace) and own:
            return OwnTemplate(tokenizer)
        raise no_template()
    if name not in _LAYOUTS:
        raise RequestError(
            f"there is no template {name!r}", where=f"--template {name}", fix=f"one of {', '.join(CHOICES)}"
        )
    return _Named(name, tokenizer)


def no_template() -> RequestError:
    """Return what to say of a tokenizer that brings no template, as one that is trained here never does."""
    return RequestError(
        "the tokenizer has no chat template of its own",
        where="--template tokenizer",
        fix=f"name a template: --template {CHATML}, {ALPACA} or {PLAIN}",
    )


class _Stretch(NamedTuple):
    """Some text of a layout; None is the end of text."""

    text: str | None
    author: int | None = None
    """The number of the message, where the assistant writes it."""
    control: bool = False
    """Whether it is a control token, where the vocabulary has it."""


class _Named:
    """A template that is text around the messages.

    What the assistant writes is encoded apart from what stands before and after it, so that a prompt's tokens are those
    of the whole. Control tokens that a message spells stay plain text.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self._tokenizer, self._layout = name, tokenizer, _LAYOUTS[name]
        end = tokenizer.control(END) if name == CHATML else None
        self.stops = frozenset({tokenizer.end_of_text} if end is None else {tokenizer.end_of_text, end})

    def encode(self, messages: Sequence[Message], targets: str = ALL) -> tuple[list[int], list[int]]:
        """Return ids and marks as `Template.encode` says; after a last turn of the assistant stands the end of text."""
        _refuse_unwritten(self.name, messages)
        stretches = list(self._layout(messages))
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if turns and turns[-1] == len(messages) - 1:
            while stretches[-1].author is None:  # the way to a next message
                stretches.pop()
            if self._ids(stretches[-1]) != [self._tokenizer.end_of_text]:
                stretches.append(_Stretch(None, turns[-1]))
        counted = set(turns if targets == ALL else turns[-1:])
        ids, marks = [], []
        for stretch in self._merged(stretches):
            own = self._ids(stretch)
            ids += own
            marks += [int(stretch.author in counted)] * len(own)
        return ids, marks

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return ids as `Template.prompt` says."""
        _refuse_unwritten(self.name, messages)
        stretches = [*self._layout(messages), *_OPENINGS[self.name]]
        return [token for stretch in self._merged(stretches) for token in self._ids(stretch)]

    def answer(self, ids: Sequence[int]) -> str:
        """Return text as `Template.answer` says."""
        text = self._tokenizer.decode(until(self.stops, ids))
        return text.partition(END)[0] if self.name == CHATML else text

    def _ids(self, stretch: _Stretch) -> list[int]:
        if stretch.text is None:
            return [self._tokenizer.end_of_text]
        token = self._tokenizer.control(stretch.text) if stretch.control else None
        return self._tokenizer.encode(stretch.text) if token is None else [token]

    def _merged(self, stretches: Sequence[_Stretch]) -> Iterator[_Stretch]:
        """Yield neighbours of plain text and of one author as one."""
        before: _Stretch | None = None
        for stretch in stretches:
            plain = stretch.text is not None and not (stretch.control and self._tokenizer.control(stretch.text))
            stretch = stretch._replace(control=not plain)
            if before is None:
                before = stretch
            elif plain and not before.control and before.author == stretch.author:
                before = before._replace(text=f"{before.text}{stretch.text}")
            else:
                yield before
                before = stretch
        if before is not None:
            yield before


def written(name: str, messages: Sequence[Message]) -> str:
    """Return a conversation as a named template writes it, without its end of text. Raises RequestError as `encode`."""
    _refuse_unwritten(name, messages)
    return "".join(stretch.text or "" for stretch in _LAYOUTS[name](messages))


def _refuse_unwritten(name: str, messages: Sequence[Message]) -> None:
    """Refuse what a named template would leave out without a word."""
    for number, message in enumerate(messages, start=1):
        if message.get("tool_calls"):
            raise RequestError(
                f"message {number} has tool_calls, which the template {name} does not write",
                where=f"--template {name}",
                fix=f"take the tokenizer's own template: --template {TOKENIZER}, or leave such rows out: --skip-bad",
            )


def until(stops: frozenset[int], ids: Sequence[int]) -> list[int]:
    """Return the ids before the first that ends a turn."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


_BEGIN, END = "<|im_start|>", "<|im_end|>"
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def _chatml(messages: Sequence[Message]) -> Iterator[_Stretch]:
    for number, message in enumerate(messages):
        author = number if message["role"] == ASSISTANT else None
        yield _Stretch(_BEGIN, control=True)
        yield _Stretch(f"{message['role']}\n")
        yield _Stretch(message["content"], author)
        yield _Stretch(END, author, control=True)
        yield _Stretch("\n")


def _alpaca(messages: Sequence[Message]) -> Iterator[_Stretch]:
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in ("system", "user", ASSISTANT) or (role == "system" and number > 0):
            raise _no_role(ALPACA, role, "a system message first, user and assistant")
        if number == 0:
            yield _Stretch(f"{content if role == 'system' else TASK}\n\n")
        if role == "user":
            yield _Stretch(f"### Instruction:\n{content}\n\n")
        if role == ASSISTANT:
            yield _OPENINGS[ALPACA][0]
            yield _Stretch(content, number)
            yield _Stretch(None, number)
            yield _Stretch("\n\n")


def _plain(messages: Sequence[Message]) -> Iterator[_Stretch]:
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            yield _Stretch(message["content"], number)
            yield _Stretch(None, number)
        elif message["role"] == "user":
            yield _Stretch(message["content"])
        else:
            raise _no_role(PLAIN, message["role"], "user and assistant")


def _no_role(name: str, role: str, known: str) -> RequestError:
    return RequestError(
        f"the template {name} has no place for the role {role!r} here: it knows {known}",
        where=f"--template {name}",
        fix=f"take --template {CHATML}, which knows every role, or leave such rows out: --skip-bad",
    )


_LAYOUTS = {CHATML: _chatml, ALPACA: _alpaca, PLAIN: _plain}
_OPENINGS = {
    CHATML: [_Stretch(_BEGIN, control=True), _Stretch(f"{ASSISTANT}\n")],
    ALPACA: [_Stretch("### Response:\n")],
    PLAIN: [],
}
"""What stands between the last message and what the assistant writes."""
