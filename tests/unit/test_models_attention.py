"""Attention without a mask, blocks that run as a whole, and one compilation for all blocks of a kind."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import PreTrainedModel, masking_utils

from halfstep.launcher.engine import build as engine_build
from halfstep.launcher.errors import RefusedError
from halfstep.models.micro_batch import MicroBatch
from halfstep.models.network import build, skeleton
from halfstep.models.observe import NAME, Observed, blocks, leave_out_masks, observe

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
          "vocab_size": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
_GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 32,
         "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
_MIXTURE = {**_SMALL, "model_type": "mixtral", "num_local_experts": 4, "sliding_window": None}
TOKENS = torch.arange(48).reshape(2, 24) % 64


def config(family: str, layers: int = 2, **more: Any) -> dict[str, Any]:
    if family == "gpt2":
        return {**_GPT2, "n_layer": layers, **more}
    return {**_SMALL, "model_type": family, "num_hidden_layers": layers, **more}


def made(family: str, layers: int = 2, **more: Any) -> PreTrainedModel:
    """Return a model as an engine gets it."""
    model = build(config(family, layers, **more), seed=1)
    if observe(skeleton(config(family, layers, **more))).plainly_causal:
        leave_out_masks(model)
    return model


class Compiler:
    """A backend that keeps what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return aot_eager(graph, inputs)

    def attention(self) -> list[tuple[bool, bool]]:
        """Return (has a mask, is causal by its argument) of every attention in the graphs."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        called = [node for node in nodes if node.target is torch._C._nn.scaled_dot_product_attention]
        return [(node.kwargs["attn_mask"] is not None, node.kwargs["is_causal"]) for node in called]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """Let torch compile with a backend that counts."""
    counting, compile_ = Compiler(), torch.compile
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=counting))
    torch._dynamo.reset()
    yield counting
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def compile_blocks(model: PreTrainedModel, zero: int = 0, seen: Observed | None = None) -> Any:
    engine: Any = SimpleNamespace(module=model)
    plan: Any = SimpleNamespace(zero=zero, model=SimpleNamespace(name="this"))
    engine_build._compile_blocks(engine, plan, seen or Observed())
    return engine


def trained(model: PreTrainedModel) -> tuple[float, list[Tensor]]:
    """Return the loss of two sequences and all gradients."""
    batch = MicroBatch.of_windows(TOKENS)
    loss = batch.loss(batch.logits(model))
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def same(first: tuple[float, list[Tensor]], second: tuple[float, list[Tensor]]) -> bool:
    return first[0] == second[0] and all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize(("family", "more", "plain"), [
    ("gpt2", {}, True),
    ("llama", {}, True),
    ("qwen3", {}, True),
    ("mistral", {"sliding_window": None}, True),
    ("mistral", {"sliding_window": 8}, False),
    ("cohere2", {"sliding_window": 8}, False),
    ("llama", {"attn_implementation": "eager"}, False),
    ("falcon", {}, False),
    ("mamba", {}, False),
])  # fmt: skip
def test_only_what_asks_for_the_plain_causal_mask_goes_without(family: str, more: dict[str, Any], plain: bool) -> None:
    assert observe(skeleton(config(family, **more))).plainly_causal == plain


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_mask_loss_and_gradients_are_the_same_to_the_bit(family: str) -> None:
    model = made(family)
    assert same(trained(build(config(family), seed=1)), trained(model))
    assert model.config._attn_implementation == NAME
    assert NAME not in str(model.config.to_dict()), "it is no part of a saved configuration"


def test_windows_are_not_searched_for_documents_and_documents_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama").eval()
    searched: list[Tensor] = []
    search = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda where: (searched.append(where), search(where))[1]
    )
    whole = MicroBatch(TOKENS, TOKENS).logits(model)
    assert not searched
    places = torch.arange(24).remainder(12).expand(2, -1)
    packed = MicroBatch(TOKENS, TOKENS, places).logits(model)
    alone = MicroBatch(TOKENS[:, 12:], TOKENS[:, 12:]).logits(model)
    torch.testing.assert_close(packed[:, 12:], alone)
    assert len(searched) == 1
    assert not torch.allclose(whole[:, 12:], alone)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_mask_reaches_a_compiled_attention_whether_blocks_or_all_is_compiled(
    compiler: Compiler, family: str
) -> None:
    model = made(family)
    compile_blocks(model)
    MicroBatch(TOKENS, TOKENS).logits(model)
    assert compiler.attention() == [(False, True)]
    whole = torch.compile(made(family))
    MicroBatch(TOKENS, TOKENS).logits(whole)
    assert set(compiler.attention()) == {(False, True)}
    assert len(compiler.attention()) > 1


def test_a_sliding_window_keeps_its_mask_compiled(compiler: Compiler) -> None:
    model = made("mistral", sliding_window=8)
    expected = MicroBatch(TOKENS, TOKENS).logits(model)
    compile_blocks(model)
    torch.testing.assert_close(MicroBatch(TOKENS, TOKENS).logits(model), expected)
    assert compiler.attention() == [(True, False)]


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_blocks_of_a_kind_are_compiled_once_for_training_and_once_for_evaluation(
    compiler: Compiler, family: str, layers: int
) -> None:
    model = made(family, layers)
    expected = trained(made(family, layers))
    names = [name for name, _ in model.named_parameters()]
    engine = compile_blocks(model)
    assert engine_build.is_compiled(engine)
    for _ in range(2):
        model.zero_grad()
        assert same(trained(model), expected)
    assert len(compiler.graphs) == 1
    with torch.no_grad():
        MicroBatch(TOKENS, TOKENS).logits(model.eval())
    assert len(compiler.graphs) == 2
    assert [name for name, _ in model.named_parameters()] == names


def test_blocks_that_differ_in_a_number_are_all_compiled(compiler: Compiler) -> None:
    model = made("gpt2", 10, scale_attn_by_inverse_layer_idx=True)
    compile_blocks(model)
    MicroBatch(TOKENS, TOKENS).logits(model)
    assert len(compiler.attention()) == 10, "more kinds than torch compiles of a function by itself"


def test_a_checkpointed_block_is_compiled_with_its_recomputation(compiler: Compiler) -> None:
    model = build(config("gpt2"), seed=1, activation_checkpointing=True)
    compile_blocks(model)
    assert same(trained(model), trained(build(config("gpt2"), seed=1)))
    assert len(compiler.graphs) == 1


def test_stage_3_compiles_only_what_it_gathers_whole(compiler: Compiler) -> None:
    with pytest.raises(RefusedError, match="no block can be compiled that stage 3 gathers whole"):
        compile_blocks(made("gpt2"), zero=3)
    engine = compile_blocks(made("gpt2"), zero=3, seen=Observed(whole_blocks=("transformer.h.1",)))
    compiled = [hasattr(block.forward, "_torchdynamo_orig_callable") for block in blocks(engine.module).values()]
    assert compiled == [False, True]


def test_a_model_without_blocks_is_not_said_to_be_compiled(compiler: Compiler) -> None:
    with pytest.raises(RefusedError, match="no block can be compiled"):
        compile_blocks(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_blocks_that_run_once_from_tensor_to_tensor_are_whole() -> None:
    assert observe(skeleton(config("llama"))).whole_blocks == ("model.layers.0", "model.layers.1")
    assert len(observe(skeleton({**_MIXTURE, "num_hidden_layers": 2})).whole_blocks) == 2


def change_by_keyword(model: Any) -> None:
    """Let a model give its hidden states to the first block by name: torch's hooks do not see them there."""
    block, run = model.model.layers[0], type(model.model.layers[0]).__call__
    call = {"__call__": lambda self, x, **more: run(self, hidden_states=x, **more)}
    block.__class__ = type("ByName", (type(block),), call)


def change_by_running_twice(model: Any) -> None:
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3
    model.config.layer_types = [*model.config.layer_types, "full_attention"] if model.config.layer_types else None


def change_by_sharing(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight


def change_by_freezing(model: Any) -> None:
    """Let the first block's input need no gradient: a hook of torch's fires before the block's own are there."""
    model.model.embed_tokens.requires_grad_(False)


@pytest.mark.parametrize("change", [change_by_keyword, change_by_running_twice, change_by_sharing, change_by_freezing])
def test_a_block_whose_gradients_a_hook_on_it_would_miss_is_not_whole(change: Any) -> None:
    model: Any = skeleton(config("llama", layer_types=None, vocab_size=32))
    change(model)
    assert observe(model).whole_blocks == ("model.layers.1",)


def test_nothing_is_said_of_a_model_that_needs_values_to_run() -> None:
    assert observe(skeleton(config("jamba"))) == Observed()
