"""Give an export the chat template by which its examples were laid out, for those who ask it with transformers."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from halfstep.launcher.corpus import corpus_manifest
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.data import chat
from halfstep.launcher.data import tokenizer as data_tokenizer
from halfstep.launcher.errors import RequestError

_FILE = "chat_template.jinja"
"""Where transformers looks for it first (tokenization_utils_base.py, _from_pretrained)."""
_SAMPLE: list[chat.Message] = [{"role": "user", "content": "What is 2 + 2?\n\nSay it in a word."}]
_NO_ROLE = "{{ raise_exception('the template has no place for the role ' + message['role'] + ' here') }}"
_TEXTS = {
    # The line break behind the assistant's turn stands before the next message, so that a conversation begins with the
    # text of each shorter one.
    chat.CHATML: (
        "{% for message in messages %}"
        "{% if loop.previtem is defined and loop.previtem['role'] == 'assistant' %}{{ '\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
        "{% if message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{% if messages and messages[-1]['role'] == 'assistant' %}{{ '\\n' }}{% endif %}"
        "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    chat.ALPACA: (
        "{% for message in messages %}"
        "{% if loop.first %}"
        f"{{{{ (message['content'] if message['role'] == 'system' else {chat.TASK!r}) + '\\n\\n' }}}}"
        "{% elif loop.previtem['role'] == 'assistant' %}{{ '\\n\\n' }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token }}"
        "{% elif message['role'] != 'system' or not loop.first %}" + _NO_ROLE + "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{% if messages and messages[-1]['role'] == 'assistant' %}{{ '\\n\\n' }}{% endif %}"
        "{{ '### Response:\\n' }}{% endif %}"
    ),
    chat.PLAIN: (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}" + _NO_ROLE + "{% endif %}"
        "{% endfor %}"
    ),
}


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What an export asks its model by."""

    name: str
    stops: tuple[int, ...]
    """The ids that end a turn of the assistant, in order."""
    differs: bool
    """Whether a prompt gets other ids from the export than it had in training."""


def write(corpora: Iterable[Path], digests: Container[str], folder: Path) -> ChatTemplate | None:
    """Write the template of the first corpus that holds examples to the tokenizer in a folder; None where none does.

    The tokenizer's own template is there already. Of the corpora, those are passed over that have gone, or are others
    than were trained on, by their `digests`.
    """
    for corpus in corpora:
        try:
            facts = read_data(str(corpus))
            if facts.digest not in digests or not facts.has_examples:
                continue
            about = corpus_manifest.read(corpus)[0]
            own = data_tokenizer.load(corpus / about.tokenizer.path, about.tokenizer.kind)
        except (OSError, RequestError):
            continue
        assert about.examples is not None
        layout = chat.named(about.examples.template, own)
        if layout.name in _TEXTS:
            (folder / _FILE).write_text(_TEXTS[layout.name])
        library = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        try:
            expected = layout.prompt(_SAMPLE)
        except RequestError:  # somebody's own template, which asks for more than one question
            return ChatTemplate(name=layout.name, stops=tuple(sorted(layout.stops)), differs=False)
        made = library.apply_chat_template(_SAMPLE, add_generation_prompt=True, tokenize=True, return_dict=True)
        return ChatTemplate(
            name=layout.name, stops=tuple(sorted(layout.stops)), differs=list(made["input_ids"]) != expected
        )
    return None
