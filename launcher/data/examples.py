"""What an example of supervised fine-tuning is: a conversation, read from a row of one of two shapes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from halfstep.launcher.data.chat import ASSISTANT, Message
from halfstep.launcher.data.row_fields import SKIP, Wanted
from halfstep.launcher.errors import RequestError

ROLES = ("system", "user", ASSISTANT, "tool")
_SHAPES = '{"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
_SHOWN_NAMES = 8
_SHOWN_CHARACTERS = 40


class Example(NamedTuple):
    """A conversation, checked."""

    messages: list[Message]
    where: str
    """The file and the line or row that it stands in."""
    name: str
    """What a message calls that line or row."""

    @property
    def text(self) -> str:
        """What all have said, in lines."""
        return "\n".join(message.get("content") or "" for message in self.messages)


def of_row(row: dict[str, Any], where: str, name: str) -> Example | RequestError:
    """Return the example in a row: `messages`, or `prompt` and `completion`, each a text or a list of messages."""
    given = {field for field in ("messages", "prompt", "completion") if row.get(field) is not None}
    if given == {"messages"}:
        messages = row["messages"]
    elif given == {"prompt", "completion"}:
        if isinstance(row["completion"], str) and not row["completion"].strip():
            return RequestError(f"the completion of {name} is empty", where=where, fix=SKIP)
        prompt, completion = _turns(row["prompt"], "user"), _turns(row["completion"], ASSISTANT)
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return RequestError(f"prompt and completion of {name} are not both text", where=where, fix=SKIP)
        messages = prompt + completion
    else:
        shown = ", ".join(repr(key[:_SHOWN_CHARACTERS]) for key in list(row)[:_SHOWN_NAMES]) or "nothing"
        both = "both messages and prompt or completion" if "messages" in given else None
        what = f"{name} has {both}" if both else f"{name} has neither messages nor prompt and completion, but {shown}"
        return RequestError(what, where=where, fix=f"write {_SHAPES}; or leave such rows out: --skip-bad")
    if row.get("tools"):
        return RequestError(
            f"{name} has tools, which no template is given",
            where=where,
            fix="write them into its system message, or --skip-bad",
        )
    if (problem := _problem(messages, name)) is not None:
        return RequestError(problem, where=where, fix=SKIP)
    return Example([{key: value for key, value in each.items() if value is not None} for each in messages], where, name)


WANTED = Wanted(
    fields=("messages", "prompt", "completion", "tools"),
    keys=("messages", "prompt", "completion", "role", "content"),
    take=of_row,
    shape="an object with messages, or prompt and completion",
)


def _turns(given: Any, role: str) -> Any:
    return [{"role": role, "content": given}] if isinstance(given, str) else given


def _problem(messages: Any, name: str) -> str | None:
    """Return what is wrong with the messages of a row; None where nothing is."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"the messages of {name} are no list of messages"
    for number, message in enumerate(messages, start=1):
        which = f"message {number} of {name}"
        if not isinstance(message, dict):
            return f"{which} is no object with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"{which} has the role {repr(role)[:_SHOWN_CHARACTERS]}; roles are {', '.join(ROLES)}"
        if content is None and role == ASSISTANT and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            return f"the content of {which} is {type(content).__name__}, not text"
        if message.get("weight") not in (None, 1):
            return (
                f"{which} has the weight {repr(message['weight'])[:_SHOWN_CHARACTERS]}, and every target counts alike"
            )
        if role == ASSISTANT and not content.strip() and not message.get("tool_calls"):
            return f"{which}, a completion, is empty"
        try:
            content.encode()
        except UnicodeEncodeError as error:
            return f"{which} holds half a surrogate pair at character {error.start}, which is no text"
    return None
