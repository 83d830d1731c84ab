"""Ask a model: continue prompts in batches, or say how likely the ends of sequences are."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from halfstep.launcher.config.task_file import Answer
from halfstep.launcher.data.chat import Template
from halfstep.launcher.data.tokenizer import Tokenizer
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.tasks.requests import Ask
from halfstep.models.hf_config import one_line


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a model makes of a prompt."""

    ids: tuple[int, ...]
    """The new tokens, without the one that ends a text."""
    text: str
    """Their text, up to the first stop."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How likely the end of a sequence is."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    tokens: int


@dataclass(kw_only=True)
class Asked:
    """A model that can be asked, and how it computes."""

    network: Any
    """A causal language model of transformers, in evaluation mode."""
    tokenizer: Tokenizer
    device: torch.device
    autocast: torch.dtype | None = None
    """The type that torch.autocast computes in; None: that of the weights."""
    synced: bool = False
    """Whether ranks hold a part of each weight: then all of them run the same number of forward passes."""
    cached: bool = True
    """Whether keys and values are kept between tokens; off where transformers cannot with this architecture."""

    @torch.no_grad()
    def answer(self, batch: Sequence[Ask], how: Answer, template: Template | None = None) -> list[Continued | Scored]:
        """Return the answers to a batch, all of one kind; `template` is what laid its prompts out.

        Raises RefusedError where the model or its device cannot.
        """
        try:
            with self._computing():
                return list(self._continue(batch, how, template) if batch[0].start is None else self._score(batch))
        except torch.OutOfMemoryError as error:
            raise RefusedError(
                f"a batch of {len(batch)} does not fit in the GPU's memory: {str(error).splitlines()[0]}",
                where="batch in the task file",
                fix="take a smaller one",
            ) from None

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _score(self, batch: Sequence[Ask]) -> list[Scored]:
        """Score the ends of sequences, padded behind, where nothing looks."""
        width = max(len(ask.ids) for ask in batch) - 1
        inputs = torch.tensor([[*ask.ids[:-1], *[0] * (width - len(ask.ids) + 1)] for ask in batch], device=self.device)
        logits = self.network(input_ids=inputs, use_cache=False).logits
        scored = []
        for row, ask in zip(logits, batch, strict=True):
            assert ask.start is not None
            targets = torch.tensor(ask.ids[ask.start :], device=row.device)
            likelihoods = row[ask.start - 1 : len(ask.ids) - 1].float().log_softmax(-1)
            total = likelihoods.gather(1, targets[:, None]).sum(dtype=torch.float64)
            scored.append(Scored(log_likelihood=float(total), tokens=len(targets)))
        return scored

    def _continue(self, batch: Sequence[Ask], how: Answer, template: Template | None) -> list[Continued]:
        """Continue prompts, padded in front, where the mask hides it; positions are counted without it."""
        end, width = self.tokenizer.end_of_text, max(len(ask.ids) for ask in batch)
        ends = self._ends(template)
        prompts = [[*[end] * (width - len(ask.ids)), *ask.ids] for ask in batch]
        mask = [[*[0] * (width - len(ask.ids)), *[1] * len(ask.ids)] for ask in batch]
        inputs = torch.tensor(prompts, device=self.device), torch.tensor(mask, device=self.device)
        made = self._generate(*inputs, how, ends)
        continued = []
        for row in made[:, width:].tolist():
            ids = row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
            text = self.tokenizer.decode(ids) if template is None else template.answer(ids)
            continued.append(Continued(ids=tuple(ids), text=until(text, how.stop)))
        return continued

    def _ends(self, template: Template | None) -> list[int]:
        """Return the tokens that end a text: the tokenizer's, the template's, and what the model itself names."""
        own = getattr(self.network.generation_config, "eos_token_id", None)
        stops = template.stops if template else ()
        return sorted(
            {self.tokenizer.end_of_text, *stops, *(own if isinstance(own, list) else [] if own is None else [own])}
        )

    def _generate(self, prompts: Tensor, mask: Tensor, how: Answer, ends: list[int]) -> Tensor:
        end = self.tokenizer.end_of_text
        stops: list[Any] = [_Stops(how.stop, self.tokenizer, prompts.shape[1])] if how.stop else []
        problem: Exception | None = None
        for cached in (True, False) if self.cached else (False,):
            settings = GenerationConfig(
                max_new_tokens=how.max_new_tokens,
                num_beams=how.beams,
                do_sample=False,
                use_cache=cached,
                eos_token_id=ends,
                pad_token_id=end,
            )
            try:
                made = self.network.generate(
                    prompts,
                    attention_mask=mask,
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList(stops),
                    synced_gpus=self.synced,
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of any kind: every architecture has its own
                problem = problem or error
            else:
                self.cached = cached
                return made
        assert problem is not None
        raise RefusedError(
            f"transformers cannot generate with this model: {one_line(problem)}",
            where=f"model_type {self.network.config.model_type}",
            fix='judge it by answer.kind = "choices" or "perplexity"',
        ) from problem


class _Stops(StoppingCriteria):
    """Ends an answer in which one of the texts stands."""

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer, width: int) -> None:
        self._stops, self._decode, self._width = stops, tokenizer.decode, width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = [self._decode(row) for row in input_ids[:, self._width :].tolist()]
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device, dtype=torch.bool)


def until(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stops that stands in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
