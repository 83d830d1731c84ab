"""Documents that are kept apart: where they begin, what of a window is asked, and that none moves another by a bit."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from unit.test_models_attention import Compiler, compile_blocks, compiler, made

from halfstep.launcher.cli.main import main
from halfstep.launcher.data.documents import Documents
from halfstep.launcher.data.tokens import TokenFile, TokenWriter, open_writer
from halfstep.launcher.engine.causal_check import refuse_crossing
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.errors import RefusedError
from halfstep.launcher.parity.cases import every_case
from halfstep.launcher.parity.cell import question_of
from halfstep.launcher.plan.data_plan import DataPlan, PartPlan
from halfstep.launcher.plan.plan import Plan, run_id_of
from halfstep.launcher.plan.present import lines
from halfstep.launcher.topology import Topology
from halfstep.models.causality import CHANGED, LENGTH, look_across
from halfstep.models.loss import IGNORED
from halfstep.models.micro_batch import MicroBatch
from halfstep.models.observe import NAME

__all__ = ["compiler"]  # a fixture


def written(prefix: Path, lengths: list[int]) -> Path:
    """Write documents of some lengths, of consecutive token ids."""
    with open_writer(prefix, np.dtype(np.uint16)) as writer:
        place = 0
        for length in lengths:
            writer.add_document(np.arange(place, place + length, dtype=np.uint16))
            place += length
    return prefix


def walked(lengths: list[int]) -> list[bool]:
    """Tell of each token whether a document begins with it, by walking through all of them."""
    return [place == 0 for length in lengths for place in range(length)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30), sequence=st.integers(1, 12), item=st.integers(1, 4)
)
def test_beginnings_are_those_of_a_walk_through_the_corpus(
    lengths: list[int], sequence: int, item: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Empty documents, several that begin in a window, none that does, and documents of many items."""
    if sum(lengths) < 2:
        lengths = [*lengths, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenWriter, "_ITEM_TOKENS", item)
        file = TokenFile(written(tmp_path_factory.mktemp("d") / "a", lengths))
    indices, expected = list(reversed(range(file.windows(sequence)))), walked(lengths)
    starts = file.document_starts(indices, sequence)
    assert starts.dtype == torch.bool
    assert starts.shape == (len(indices), sequence + 1)
    assert starts.tolist() == [expected[i * sequence : i * sequence + sequence + 1] for i in indices]


def test_an_index_without_documents_is_one_document(plan: Callable[..., Plan], tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", [5, 4])
    index = Path(f"{prefix}.idx")
    whole = bytearray(index.read_bytes()[: -3 * 8])
    whole[26:34] = (0).to_bytes(8, "little")
    index.write_bytes(whole)
    assert not TokenFile(prefix).document_starts([0, 1], 4).any()
    made = plan(f"data={prefix}", "documents=masked", "model.vocabulary=4096", "sequence=4")
    assert [line for line in made.warnings if line.endswith("its index knows no second document")]


def test_a_window_costs_reads_by_the_logarithm_of_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads, start = TokenFile(written(tmp_path / "a", [4] * 4096)), [], Documents._start
    monkeypatch.setattr(
        Documents, "_start", lambda self, numbers: (reads.append(len(numbers)), start(self, numbers))[1]
    )
    assert file.document_starts([500], 8).tolist() == [[place % 4 == 0 for place in range(9)]]
    assert sum(reads) <= 2 * 13 + 3, "two searches among 4096, and three beginnings"


# --- what is asked of a window ---------------------------------------------------------------------------------------


def test_positions_begin_anew_and_the_first_token_of_a_document_is_no_target() -> None:
    starts = torch.tensor([[0, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    batch = MicroBatch.of_documents(torch.arange(14).reshape(2, 7), starts)
    assert batch.inputs.tolist() == [[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]]
    assert batch.targets.tolist() == [[1, IGNORED, IGNORED, 4, 5, IGNORED], [8, 9, 10, 11, 12, 13]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch.target_count == 9


def test_windows_in_which_nothing_begins_need_no_mask() -> None:
    """Neither the first token of a row nor the last target makes two documents of its inputs."""
    starts = torch.tensor([[1, 0, 0, 1]], dtype=torch.bool)
    batch = MicroBatch.of_documents(torch.arange(4)[None], starts)
    assert batch.positions is None
    assert batch.targets.tolist() == [[1, 2, IGNORED]]


LENGTHS = [7, 1, 1, 0, 30, 12, 5, 64, 3, 3, 3, 40, 2, 2, 2]


def feed(prefix: Path, ranks: int, rank: int, documents: str, sequence: int = 8) -> Feed:
    windows = TokenFile(prefix).windows(sequence)
    batch = SimpleNamespace(global_=8, micro=2, ranks=ranks, accumulation=4 // ranks)
    return fed(data_plan(prefix, windows), batch, rank, documents, sequence)


def data_plan(prefix: Path, windows: int, **more: Any) -> DataPlan:
    return DataPlan(
        path=str(prefix),
        train_prefix=str(prefix),
        validation_prefix=str(prefix),
        digest="",
        train_tokens=0,
        train_windows=windows,
        validation_windows=5,
        **more,
    )


def fed(data: DataPlan, batch: SimpleNamespace, rank: int, documents: str, sequence: int) -> Feed:
    plan: Any = SimpleNamespace(
        seed=3,
        documents=documents,
        documents_apart=documents == "masked",
        batch=batch,
        data=data,
        sequence=sequence,
        model=SimpleNamespace(vocabulary=2**16),
    )
    return Feed(plan, SimpleNamespace(rank=rank), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_knows_how_many_targets_all_ranks_have(tmp_path: Path, ranks: int) -> None:
    prefix = written(tmp_path / "a", LENGTHS)
    feeds = [feed(prefix, ranks, rank, "masked") for rank in range(ranks)]
    counts = set()
    for step in range(1, 7):  # across the end of an epoch of 21 windows
        counted = sum(batch.target_count for each in feeds for batch in each.micro_batches(step))
        assert [each.target_count(step) for each in feeds] == [counted] * ranks
        counts.add(counted)
    assert len(counts) > 1
    assert max(counts) < 64
    assert feed(prefix, 1, 0, "plain").target_count(1) == 64


def test_a_mixture_keeps_the_documents_of_its_parts_apart(tmp_path: Path) -> None:
    prefixes = [written(tmp_path / name, lengths) for name, lengths in (("a", LENGTHS), ("b", [5] * 60))]
    parts = [
        PartPlan(**own, weight=0.5)
        for prefix in prefixes
        for own in [
            {
                name: value
                for name, value in vars(data_plan(prefix, TokenFile(prefix).windows(8))).items()
                if name != "parts"
            }
        ]
    ]
    batch = SimpleNamespace(global_=8, micro=2, ranks=2, accumulation=2)
    mixed = data_plan(tmp_path, 0, parts=parts)
    feeds = [fed(mixed, batch, rank, "masked", 8) for rank in range(2)]
    for step in range(1, 4):
        chosen, _ = feeds[0].sequences(step)
        assert np.bincount(chosen).tolist() == [4, 4]
        counted = sum(each_batch.target_count for each in feeds for each_batch in each.micro_batches(step))
        assert [each.target_count(step) for each in feeds] == [counted] * 2
        assert counted < 64


def test_a_step_without_targets_has_none(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", [1] * 60)
    assert sum(batch.target_count for batch in feed(prefix, 1, 0, "masked").micro_batches(1)) == 0
    assert feed(prefix, 1, 0, "masked").target_count(1) == 0


def test_validation_keeps_documents_apart_as_training_does(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", LENGTHS)
    first, rows = next(feed(prefix, 1, 0, "masked").validation_batches(0))
    assert rows == 2
    assert first.targets.tolist() == [[1, 2, 3, 4, 5, 6, IGNORED, IGNORED], [IGNORED, *range(10, 17)]]
    plain, _ = next(feed(prefix, 1, 0, "plain").validation_batches(0))
    assert plain.targets.tolist() == [list(range(1, 9)), list(range(9, 17))]
    assert plain.positions is None


# --- what documents know of each other -------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
         "num_hidden_layers": 1, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
ENDS = ((0, 5, 6, 13, 24), (0, 9, 20, 24))
"""Where the documents of each row begin, and the end: one of a single token, one that the window cuts."""
TOKENS = torch.arange(50).reshape(2, 25) * 7 % 64


def batch_of(tokens: Tensor) -> MicroBatch:
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ends in zip(starts, ENDS, strict=True):
        row[list(ends)] = True
    return MicroBatch.of_documents(tokens, starts)


def seen(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, (row, position, vocabulary), and the loss of each target, (row, position)."""
    batch = batch_of(tokens)
    with torch.no_grad():
        logits = batch.logits(model)
    losses = cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")
    return logits, losses


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_editing_any_token_moves_no_logit_and_no_loss_of_another_document(
    compiler: Compiler, family: str, compiled: bool
) -> None:
    model = made(family).eval()
    if compiled:
        compile_blocks(model)
    logits, losses = seen(model, TOKENS)
    edited = 0
    for row, ends in enumerate(ENDS):
        for begin, end in pairwise(ends):
            mine = torch.zeros(2, 24, dtype=torch.bool)
            mine[row, begin:end] = True
            for place in range(begin, end):
                tokens = TOKENS.clone()
                tokens[row, place] = (tokens[row, place] + 31) % 64
                logits_now, losses_now = seen(model, tokens)
                assert torch.equal(logits_now[~mine], logits[~mine])
                assert torch.equal(losses_now[~mine], losses[~mine])
                assert not torch.equal(logits_now[row, place], logits[row, place])
                assert torch.equal(logits_now[row, begin:place], logits[row, begin:place])
                edited += 1
    assert edited == 48
    assert compiler.attention() == ([(True, False)] if compiled else [])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_document_is_what_it_is_alone_and_so_is_the_loss_and_its_gradient(family: str) -> None:
    model, alone = made(family), made(family)
    batch = batch_of(TOKENS)
    logits = batch.logits(model)
    batch.loss(logits).backward()
    total, count = torch.zeros(()), 0
    for row, ends in enumerate(ENDS):
        for begin, end in pairwise(ends):
            by_itself = alone(input_ids=TOKENS[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(logits[row, begin:end], by_itself)
            # Of the token behind the window nothing is known: row ends at 24, where a document begins.
            targets = TOKENS[row, begin + 1 : end]
            total = total + cross_entropy(by_itself[:-1], targets, reduction="sum")
            count += len(targets)
    assert count == batch.target_count == 48 - 7
    (total / count).backward()
    torch.testing.assert_close(batch.loss(logits), total / count)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_plain_windows_do_see_their_neighbours() -> None:
    model, tokens = made("llama").eval(), TOKENS.clone()
    tokens[0, 0] += 1
    first, second = (MicroBatch.of_windows(each).logits(model) for each in (TOKENS, tokens))
    assert not torch.equal(first[0, 5:], second[0, 5:])


# --- the plan --------------------------------------------------------------------------------------------------------


def test_documents_are_apart_where_that_is_asked_for_in_either_spelling(plan: Callable[..., Plan]) -> None:
    masked = plan("documents=masked")
    assert masked == plan("data.documents=masked")
    assert masked.documents == "masked"
    assert "documents    apart: attention and positions stay within each" in lines(masked)
    assert not any(line.startswith("documents") for line in lines(plan()))
    assert Plan.from_dict(masked.to_dict()) == masked


def test_a_corpus_of_one_document_has_nothing_to_keep_apart_and_the_plan_says_so(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    (said,) = [line for line in plan("documents=masked").warnings if "documents=masked" in line]
    assert said.endswith("corpus: its index knows no second document")
    two = written(tmp_path / "two", [500, 500])
    for keys in (("documents=plain",), ("documents=masked", f"data={two}", "model.vocabulary=4096")):
        assert not [line for line in plan(*keys).warnings if "documents=masked" in line]


def test_runs_that_are_older_than_the_key_are_those_with_plain_documents(plan: Callable[..., Plan]) -> None:
    plain, masked = plan("documents=plain"), plan("documents=masked")
    assert plain.run_id == plan().run_id
    assert plain.run_id != masked.run_id
    assert "documents" not in plain.identity
    assert masked.changed_from(plain.identity) == ["documents"]
    older = plain.to_dict()
    del older["documents"]
    assert run_id_of(older) == plain.run_id
    assert Plan.from_dict(older) == plain


def test_the_gate_is_asked_for_cases_whose_documents_are_apart(plan: Callable[..., Plan]) -> None:
    node = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
    apart, plain = question_of(plan("documents=masked"), node), question_of(plan(), node)
    assert {case.documents for case in apart.cases} == {"masked"}
    assert {case.world_size for case in apart.cases} == {1, 2}
    assert set(apart.cases) <= set(every_case())
    assert {case.documents for case in plain.cases} == {"plain"}
    assert not apart.unknown


def test_the_forecast_counts_the_masks(plan: Callable[..., Plan]) -> None:
    plain, masked = (plan(f"documents={how}", "batch.micro=4", "sequence=256") for how in ("plain", "masked"))
    layers, low = plain.model.config["n_layer"], 2
    kept = [next(term["bytes"] for term in each.memory["device_terms"] if term["name"] == "activations")
            for each in (plain, masked)]  # fmt: skip
    assert kept[1] - kept[0] == (layers * low + 1) * 4 * 256 * 256


def home_of(tmp_path: Path, family: str, **more: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 4096, **more}))
    return tmp_path


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, "it takes no positions"),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, "it takes no positions"),
        (
            "llama",
            {**SMALL, "attn_implementation": "eager"},
            "its attention is not transformers' common one",
        ),
    ],
)
def test_a_model_whose_attention_is_another_is_refused_by_the_plan(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, more: dict[str, Any], reason: str
) -> None:
    arguments = ["plan", f"model=hf:{home_of(tmp_path, family, **more)}", f"data={corpus}", "sequence=32"]
    assert main([*arguments, "documents=masked"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: attention cannot be kept inside documents in this model: {reason}",
        f" from: documents=masked and model=hf:{tmp_path}",
        "  try: take documents=plain, or another model",
    ]


def test_families_with_the_common_attention_are_planned(corpus: Path, tmp_path: Path) -> None:
    for family, more in {"llama": {}, "mistral": {"sliding_window": 8}, "gpt_neox": {}}.items():
        home = home_of(tmp_path, family, **SMALL, **more)
        assert main(["plan", f"model=hf:{home}", f"data={corpus}", "sequence=32", "documents=masked"]) == 0


# --- before the first step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_documents_of_a_family_with_the_common_attention_are_apart(family: str, dtype: torch.dtype) -> None:
    model = made(family, **({"sliding_window": 8} if family == "mistral" else {})).eval().to(dtype)
    crossing = look_across(
        lambda tokens, positions: model(input_ids=tokens, position_ids=positions).logits,
        vocabulary=64,
        longest=24,
        device=torch.device("cpu"),
    )
    assert crossing.apart
    assert (crossing.across, crossing.tokens, crossing.document) == (0.0, 24, CHANGED)
    assert crossing.within > 0.01


def test_a_model_that_looks_across_is_refused_before_the_first_step() -> None:
    model = made("llama")

    class Engine:
        """What the check asks of an engine; nothing chooses the attention that makes masks."""

        module, device = model, torch.device("cpu")
        eval, train = model.eval, model.train

        def __call__(self, **given: Any) -> Any:
            return model(**given)

    plan: Any = SimpleNamespace(
        model=SimpleNamespace(vocabulary=64, name="this", config={"model_type": "llama"}),
        sequence=64,
        precision="fp32",
        documents="masked",
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine: Any = Engine()
        assert refuse_crossing(engine, plan)["across"] == 0.0
        model.base_model._forward_pre_hooks.clear()
        model.config._attn_implementation = NAME
        with pytest.raises(
            RefusedError, match=rf"changing the first {CHANGED} of {LENGTH} tokens, a document"
        ) as caught:
            refuse_crossing(engine, plan)
    finally:
        dist.destroy_process_group()
    assert caught.value.where == "documents=masked and model=this, model_type 'llama'"
    assert caught.value.fix == "take documents=plain, or another model"
    assert model.training, "as it was"
