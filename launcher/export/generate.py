"""Let an exported model continue a text."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.launcher.data.chat import END
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.export import exported
from halfstep.models.hf_config import one_line


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A text and where it came from."""

    prompt: str
    text: str
    """What follows the prompt."""
    prompt_tokens: int
    new_tokens: int
    stopped: str
    """`end of text`, or `length`."""
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as programs read it."""
        return asdict(self)


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    chat: bool = False,
) -> Generated:
    """Return what an exported model makes of a prompt: the likeliest token each time, or drawn at a temperature.

    With `chat` the prompt is a user's message, laid out by the tokenizer's chat template, and the text is the answer.
    Raises RequestError for settings that mean nothing, for a prompt that leaves no room in the model's context, and
    where there is no chat template or it takes no message of a user alone.
    """
    _check(max_new_tokens, temperature, top_k)
    tokenizer: Any = exported.tokenizer(folder)
    if chat:
        ids = _message(tokenizer, prompt, folder)
    else:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        if tokenizer.bos_token_id is None:
            raise RequestError("there is no text to continue", where="--prompt ''", fix="give a text")
        ids = [tokenizer.bos_token_id]
    network: Any = exported.load(folder)
    room = _room(network, len(ids), max_new_tokens, folder)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        # top_k is named even where it is off: left out, transformers takes 50.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}
    end = network.generation_config.eos_token_id
    sampling["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = torch.tensor([ids], device=network.device)
    new = _continued(network, tokens, seed, folder, max_new_tokens=room, **sampling)
    ends = end if isinstance(end, list) else [end]
    text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if chat and END in tokenizer.get_chat_template():  # text like any other where the vocabulary has no token for it
        text = text.partition(END)[0]
    return Generated(
        prompt=prompt,
        text=text,
        prompt_tokens=len(ids),
        new_tokens=len(new),
        stopped="end of text" if new and new[-1] in ends else "length",
        device=str(network.device),
        dtype=str(network.dtype).removeprefix("torch."),
    )


def _message(tokenizer: Any, text: str, folder: Path) -> list[int]:
    """Return the ids after which the answer to a user's message follows."""
    if not tokenizer.chat_template:
        raise RequestError(
            "the export's tokenizer has no chat template: the model was trained on text",
            where=f"--chat and {folder}",
            fix="leave --chat out: the prompt is then continued as it stands",
        )
    messages = [{"role": "user", "content": text}]
    try:
        # In training, too, markers that a message spells are text.
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, sanitize_control_tokens=True
        )
    except Exception as error:  # a template is somebody's program, and may raise anything
        raise RequestError(
            f"the chat template refuses a user's message by itself: {one_line(error)}",
            where=f"--chat and {folder}",
            fix="lay the prompt out by hand and leave --chat out",
        ) from None
    return list(made["input_ids"])


@torch.no_grad()
def _continued(network: Any, tokens: torch.Tensor, seed: int, folder: Path, **settings: Any) -> list[int]:
    """Return the tokens that follow; without transformers' cache where it does not know the architecture."""
    problem: Exception | None = None
    for cached in (True, False):
        torch.manual_seed(seed)
        try:
            continued = network.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=cached, **settings)
        except Exception as error:  # of any kind: what its generation_config.json says, and every architecture's own
            problem = problem or error
        else:
            return continued[0, tokens.shape[1] :].tolist()
    assert problem is not None
    raise RefusedError(
        f"transformers cannot generate with this model: {one_line(problem)}",
        where=f"DIR {folder}, model_type {network.config.model_type}",
        fix="measure it with `halfstep eval`, or generate with the library that the architecture comes from",
    ) from problem


def _check(max_new_tokens: int, temperature: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise RequestError(
            "that many new tokens are no text", where=f"--max-new-tokens {max_new_tokens}", fix="1 or more"
        )
    if not 0 <= temperature < float("inf"):
        raise RequestError(
            "a temperature is 0 (the likeliest token) or above",
            where=f"--temperature {temperature}",
            fix="--temperature 0.8",
        )
    if top_k < 0:
        raise RequestError("that many tokens cannot be drawn from", where=f"--top-k {top_k}", fix="1 or more; 0 = all")
    if top_k and not temperature:
        raise RequestError(
            "without a temperature the likeliest token is taken, and nothing is drawn",
            where=f"--top-k {top_k}",
            fix=f"--top-k {top_k} --temperature 0.8, or leave --top-k out",
        )


def _room(network: Any, prompt_tokens: int, wanted: int, folder: Path) -> int:
    """Return how many tokens may follow: what was asked for, or what is left of the context."""
    context = exported.context(network)
    if context is None or prompt_tokens + wanted <= context:
        return wanted
    if prompt_tokens >= context:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and the model looks at {context} at most, the text that follows "
            "included",
            where=f"--prompt, and max_position_embeddings in {folder / 'config.json'}",
            fix=f"shorten the prompt below {context} tokens",
        )
    print(f"the context of {context} tokens leaves room for {context - prompt_tokens} new ones", file=sys.stderr)
    return context - prompt_tokens
