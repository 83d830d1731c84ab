"""Whether a model sees the future: known leaks of every kind are seen, and no model of transformers is accused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from halfstep.models.causality import CHANGED, LENGTH, Sight, look
from halfstep.models.network import build

VOCABULARY = 64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def sight(forward: Callable[[Tensor], Tensor], longest: int = 128) -> Sight:
    return look(forward, vocabulary=VOCABULARY, longest=longest, device=torch.device("cpu"))


def of_family(family: str, dtype: torch.dtype = torch.float32, **changed: object) -> Sight:
    more = {"num_key_value_heads": 2} if family == "mixtral" else {}
    sizes = {**SIZES, **more, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    config = CONFIG_MAPPING[family](**sizes, **changed).to_dict()
    model = build(config, seed=1, dtype=dtype).eval()
    return sight(lambda tokens: model(input_ids=tokens).logits)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_a_causal_model_moves_no_earlier_logit_by_a_bit(family: str, dtype: torch.dtype):
    seen = of_family(family, dtype)
    assert seen.causal
    assert seen.later > 0.01
    assert (seen.tokens, seen.first_changed) == (LENGTH, CHANGED)
    assert not seen.rows or family == "mixtral"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("family", ["bert", "roformer", "xlm-roberta"])
def test_an_encoder_is_found_in_every_precision_and_as_a_decoder_is_none(family: str, dtype: torch.dtype):
    assert not of_family(family, dtype).causal
    assert of_family(family, dtype, is_decoder=True).causal


def attention(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return one layer of attention with a mask of its own over (query, key)."""
    generator = torch.Generator().manual_seed(0)
    table, mix = (torch.randn(VOCABULARY, 16, generator=generator) for _ in range(2))

    def forward(tokens: Tensor) -> Tensor:
        states = table[tokens] + torch.linspace(0, 1, tokens.shape[1])[:, None]
        scores = (states @ states.transpose(1, 2)).masked_fill(~mask[: tokens.shape[1], : tokens.shape[1]], -1e9)
        return scores.softmax(-1) @ states @ mix.T

    return forward


EVERYTHING = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
BLOCKS = torch.arange(LENGTH) // 4
LEAKS = {
    "one token ahead": EVERYTHING.tril(1),
    "twelve tokens ahead": EVERYTHING.tril() | torch.diag(torch.ones(LENGTH - 12, dtype=torch.bool), 12),
    "inside blocks of four": EVERYTHING.tril() | (BLOCKS[:, None] == BLOCKS[None]),
    "the first token sees all": EVERYTHING.tril() | (torch.arange(LENGTH) == 0)[:, None],
    "everybody sees the last": EVERYTHING.tril() | (torch.arange(LENGTH) == LENGTH - 1)[None],
    "no mask": EVERYTHING,
}


@pytest.mark.parametrize("mask", LEAKS.values(), ids=LEAKS)
def test_a_hole_in_the_mask_is_found_wherever_it_is(mask: Tensor):
    assert sight(attention(EVERYTHING.tril())).causal
    assert not sight(attention(mask)).causal


def test_a_convolution_that_is_padded_on_both_sides_is_found():
    table, filters = nn.Embedding(VOCABULARY, 8), nn.Conv1d(8, VOCABULARY, 3, padding=1)
    late = nn.Conv1d(8, VOCABULARY, 3, padding=2)
    assert not sight(lambda tokens: filters(table(tokens).mT).mT).causal
    assert sight(lambda tokens: late(table(tokens).mT).mT[:, : tokens.shape[1]]).causal


def test_experts_that_choose_their_tokens_are_found():
    """What an expert takes from the whole sequence depends on later tokens, though every product is row by row."""
    torch.manual_seed(0)
    table, router, expert = torch.randn(VOCABULARY, 16), torch.randn(16, 4), torch.randn(4, 16, VOCABULARY)

    def forward(tokens: Tensor) -> Tensor:
        states = table[tokens[0]]
        logits = states @ expert[0]
        scores = (states @ router).softmax(-1)
        for which in range(1, 4):
            chosen = scores[:, which].topk(len(states) // 4).indices
            logits = logits.index_add(0, chosen, states[chosen] @ expert[which] * scores[chosen, which, None])
        return logits[None]

    assert not sight(forward).causal


def test_numbers_that_are_none_accuse_nobody():
    """A run whose weights are lost is stopped by its guard, with another reason."""
    assert sight(lambda tokens: torch.full((*tokens.shape, VOCABULARY), float("nan"))).causal
    sometimes = torch.tensor([float("nan"), 1.0])
    last = (1 + 37 * (LENGTH - 1)) % VOCABULARY
    assert not sight(lambda tokens: sometimes[int(tokens[0, -1] == last)].expand(*tokens.shape, VOCABULARY)).causal


@pytest.mark.parametrize("longest", [1, 2, 3, 13, 14, 28, 29, 4096])
def test_a_probe_is_never_longer_than_what_is_trained(longest: int):
    shapes = []

    def forward(tokens: Tensor) -> Tensor:
        shapes.append(tokens.shape)
        return nn.functional.one_hot(tokens.flip(1), VOCABULARY).float()

    seen = sight(forward, longest)
    assert seen.causal == (longest == 1)
    assert {shape[1] for shape in shapes} == ({min(longest, LENGTH)} if longest > 1 else set())


def test_what_is_random_in_evaluation_is_the_same_for_both_and_the_callers_state_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert sight(lambda tokens: torch.randn(*tokens.shape, VOCABULARY) + tokens.cumsum(1)[..., None]).causal
    assert torch.equal(torch.get_rng_state(), state)


def test_kernels_that_never_give_the_same_bits_accuse_nobody_and_hide_no_leak():
    state = torch.Generator().manual_seed(0)

    def noisy(forward: Callable[[Tensor], Tensor], size: float) -> Callable[[Tensor], Tensor]:
        return lambda tokens: forward(tokens) + size * torch.rand(*tokens.shape, VOCABULARY, generator=state)

    for _ in range(50):
        seen = sight(noisy(attention(EVERYTHING.tril()), 1e-5))
        assert seen.causal
        assert 0 < seen.noise < 2e-5
        assert not sight(noisy(attention(LEAKS["one token ahead"]), 1e-5)).causal
