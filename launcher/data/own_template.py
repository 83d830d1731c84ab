"""Lay conversations out by the template that a tokenizer of transformers brings, token for token as transformers does.

A template with `{% generation %}` says itself what the assistant writes. Of others it is found out by prefixes: what a
conversation has more than the one before the assistant's turn, with the prompt for it, up to the end of that turn.
"""

import re
from collections.abc import Sequence
from typing import Any

from halfstep.launcher.data.chat import ALL, ASSISTANT, LAST, TOKENIZER, Message, until
from halfstep.launcher.data.tokenizer import HuggingFace
from halfstep.launcher.errors import RequestError

_WHERE = f"--template {TOKENIZER}"
_SKIP = "correct the row, or leave such rows out: --skip-bad"
_OTHER = "take a named one: --template chatml"


class OwnTemplate:
    """The chat template of a tokenizer."""

    name = TOKENIZER

    def __init__(self, tokenizer: HuggingFace) -> None:
        self._tokenizer, self._library = tokenizer, tokenizer.library
        try:
            text = self._library.get_chat_template()
        except ValueError as error:
            raise RequestError(_short(error), where=_WHERE, fix=_OTHER) from None
        self._marks_itself = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        if not self._library.is_fast:
            raise RequestError(
                "the tokenizer does not say which characters a token stands for, nor so which are the assistant's",
                where=_WHERE,
                fix=_OTHER,
            )
        self._special = sorted(filter(None, self._library.all_special_tokens), key=len, reverse=True)
        self.stops = self._ends()

    def encode(self, messages: Sequence[Message], targets: str = ALL) -> tuple[list[int], list[int]]:
        """Return ids and marks as `Template.encode` says; both are those of `apply_chat_template`."""
        self._refuse_control(messages)
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if targets == LAST:
            turns = turns[-1:]
        if self._marks_itself:
            return self._by_marks(messages, turns, targets)
        whole = self._text(messages)
        ids, places = self._tokens(whole)
        marks = [0] * len(ids)
        for turn in turns:
            begin, end = self._span(messages, turn, whole)
            for token, (first, after) in enumerate(places):
                if after > begin and first < end:
                    marks[token] = 1
        return ids, marks

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return ids as `Template.prompt` says."""
        self._refuse_control(messages)
        return self._tokens(self._text(messages, asks=True))[0]

    def answer(self, ids: Sequence[int]) -> str:
        """Return text as `Template.answer` says."""
        return self._tokenizer.decode(until(self.stops, ids))

    def _by_marks(self, messages: Sequence[Message], turns: list[int], targets: str) -> tuple[list[int], list[int]]:
        made = self._applied(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = made["input_ids"], made["assistant_masks"]
        if targets == LAST and turns and turns[0] > 0:
            whole = self._text(messages)
            begin = self._prefix(whole, self._text(messages[: turns[0]]))
            marks = [
                mark if first >= begin else 0 for mark, (first, _) in zip(marks, self._tokens(whole)[1], strict=True)
            ]
        return list(ids), list(marks)

    def _span(self, messages: Sequence[Message], turn: int, whole: str) -> tuple[int, int]:
        """Return where the assistant's turn begins and ends in the text of a conversation."""
        if turn == 0:
            raise RequestError(
                "the conversation begins with the assistant, and nothing says where its turn begins in the template",
                where=_WHERE,
                fix=_SKIP,
            )
        begin = self._prefix(whole, self._text(messages[:turn], asks=True))
        end = len(whole)
        if turn + 1 < len(messages):
            end = self._prefix(whole, self._text(messages[: turn + 1]))
        written = whole[begin:end].rstrip()
        # A line break after the token that ends a turn is the template's: nobody reads what is generated after it.
        return begin, begin + len(written) if written.endswith(tuple(self._special)) else end

    def _prefix(self, whole: str, part: str) -> int:
        if not whole.startswith(part):
            raise RequestError(
                "the template writes earlier turns otherwise when others follow, so the assistant's tokens cannot be "
                "told apart",
                where=_WHERE,
                fix="mark them in the template with {% generation %}, or take --targets last or --template chatml",
            )
        return len(part)

    def _text(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        return self._applied(messages, tokenize=False, add_generation_prompt=asks)

    def _applied(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._library.apply_chat_template(list(messages), **options)
        except Exception as error:  # a template is somebody's program, and may raise anything
            raise RequestError(f"the template refuses it: {_short(error)}", where=_WHERE, fix=_SKIP) from None

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text that a template made, and which characters each stands for."""
        made = self._library(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return made["input_ids"], made["offset_mapping"]

    def _refuse_control(self, messages: Sequence[Message]) -> None:
        """Refuse a message that would end its own turn: transformers takes what it spells for the template's."""
        for number, message in enumerate(messages, start=1):
            spelled = next((token for token in self._special if token in (message.get("content") or "")), None)
            if spelled is not None:
                raise RequestError(
                    f"message {number} spells {spelled!r}, which the tokenizer takes for its special token",
                    where=_WHERE,
                    fix=_SKIP,
                )

    def _ends(self) -> frozenset[int]:
        """Return what ends a text, and the special token that ends a turn, where the template has such."""
        stops = {self._tokenizer.end_of_text}
        try:
            ids, marks = self.encode([{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "a"}])
        except RequestError:  # of a role or a length that this template wants: each row is asked by itself
            return frozenset(stops)
        written = [token for token, mark in zip(ids, marks, strict=True) if mark]
        special = [token for token in written[1:] if token in self._library.all_special_ids]
        return frozenset(stops | set(special[-1:]))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
