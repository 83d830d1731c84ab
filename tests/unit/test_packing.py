"""Examples as sequences: each once and whole, best fit, and the same for any number of ranks and order of calls."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes.examples import drawn, write_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from unit.test_models_attention import made

from halfstep.launcher.config.load import load
from halfstep.launcher.corpus import example_counts, packing
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.data.packed import PackedExamples
from halfstep.launcher.data.tokens import open_writer
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.data_plan import CorpusPlan, DataPlan, ExamplesPlan, PartPlan
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.present import lines
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology
from halfstep.models.loss import IGNORED
from halfstep.models.micro_batch import MicroBatch

SEQUENCE = 12
lengths_of = st.lists(st.integers(0, 20), min_size=1, max_size=60)


def written(prefix: Path, lengths: list[int]) -> Path:
    """Write examples of consecutive ids, of which every second token is a target; the third example has none."""
    with (
        open_writer(prefix, np.dtype(np.uint16)) as writer,
        open_writer(Path(f"{prefix}.mask"), np.dtype(np.uint8)) as masks,
    ):
        place = 0
        for number, length in enumerate(lengths):
            writer.add_document(np.arange(place, place + length, dtype=np.uint16))
            masks.add_document(np.arange(length, dtype=np.uint8) % 2 * np.uint8(number != 2))
            place += length
    return prefix


def histogram(lengths: list[int]) -> packing.Lengths:
    return tuple(sorted(Counter(lengths).items()))


def by_hand(lengths: list[int], sequence: int) -> list[list[int]]:
    """Pack by looking at every bin for every example, the longest first."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [each for each in bins if sum(each) + length <= sequence]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80), sequence=st.integers(30, 70))
def test_it_is_best_fit(lengths: list[int], sequence: int) -> None:
    bins = packing.best_fit(histogram(lengths), sequence)
    packed = Counter({each.contents: 0 for each in bins})
    for each in bins:
        assert sum(length * number for length, number in each.contents) <= sequence
        packed[each.contents] += each.repeats
    # Which of two equally full bins is filled is left open: what is left in bins is not.
    rooms = Counter(sum(length * number for length, number in contents) for contents in packed.elements())
    assert rooms == Counter(map(sum, by_hand(lengths, sequence)))
    items = Counter(length for contents in packed.elements() for length, number in contents for _ in range(number))
    assert items == Counter(lengths)


def test_a_million_examples_are_packed_by_their_lengths_alone() -> None:
    drawn = np.random.default_rng(0).lognormal(5.5, 0.8, 1_000_000).astype(int).clip(1, 4096)
    bins = packing.best_fit(histogram(drawn.tolist()), 4096)
    assert len(bins) < 20_000
    assert sum(each.repeats for each in bins) <= 1.001 * -(-drawn.sum() // 4096)


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_of, seed=st.integers(0, 2**64 - 1), pack=st.booleans(), too_long=st.sampled_from(["cut", "drop"])
)
def test_every_example_is_in_one_sequence_and_whole(
    lengths: list[int], seed: int, pack: bool, too_long: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    read = [min(length, SEQUENCE) if too_long == "cut" else length for length in lengths]
    begins = np.cumsum([0, *lengths])[:-1].tolist()
    numbers = {begin: number for number, begin in enumerate(begins) if lengths[number]}
    expected = Counter((begin, length) for begin, length in zip(begins, read, strict=True) if 0 < length <= SEQUENCE)
    if not expected:
        return
    prefix = written(tmp_path_factory.mktemp("packed") / "a", lengths)
    packed = PackedExamples(str(prefix), SEQUENCE, pack=pack, too_long=too_long, seed=seed)
    windows = list(range(len(packed)))
    seen = packed.examples(windows)
    assert Counter(span for spans in seen for span in spans) == expected
    assert all(sum(length for _, length in spans) <= SEQUENCE for spans in seen)
    assert pack or all(len(spans) == 1 for spans in seen)
    fitting = packing.fitted(histogram(lengths), SEQUENCE, too_long)
    planned = packing.bins_of(histogram(lengths), SEQUENCE, packing=pack, too_long=too_long)
    assert (packing.total(planned), sum(count for _, count in fitting)) == (len(packed), sum(expected.values()))
    again = PackedExamples(str(prefix), SEQUENCE, pack=pack, too_long=too_long, seed=seed)
    assert [again.examples([window])[0] for window in reversed(windows)] == seen[::-1]
    ids, starts, counted = packed.rows(windows)
    for row, spans in enumerate(seen):
        place = 0
        for begin, length in spans:
            assert ids[row, place : place + length].tolist() == list(range(begin, begin + length))
            assert starts[row, place : place + length].tolist() == [True] + [False] * (length - 1)
            targets = [at % 2 == 1 and numbers[begin] != 2 for at in range(length)]
            assert counted[row, place : place + length].tolist() == targets
            place += length
        assert starts[row, place:].tolist() == [True] + [False] * (SEQUENCE - place)
        assert not counted[row, place:].any()
    assert packed.target_count(windows) == int(counted.sum())


def test_the_seed_decides_which_examples_of_a_length_meet(tmp_path: Path) -> None:
    prefix = str(written(tmp_path / "a", [4] * 30 + [5] * 30))
    packed = [PackedExamples(prefix, 9, pack=True, too_long="refuse", seed=seed) for seed in (1, 2)]
    partners = [set(map(frozenset, each.examples(range(len(each))))) for each in packed]
    assert len(partners[0]) == len(partners[1]) == 30
    assert len(partners[0] & partners[1]) < 10


# --- the feed --------------------------------------------------------------------------------------------------------

LENGTHS = [3, 12, 7, 2, 5, 9, 1, 4, 4, 11, 6, 2, 8, 3, 3, 10] * 3


def corpus(prefix: Path, *, pack: bool = True, kind: type[CorpusPlan] = DataPlan, **more: Any) -> Any:
    lengths = histogram(LENGTHS)
    windows = packing.total(packing.bins_of(lengths, SEQUENCE, packing=pack, too_long="refuse"))
    about = ExamplesPlan(packing=pack, too_long="refuse", train=48, validation=48, longest=12)
    return kind(
        path=str(prefix),
        train_prefix=str(prefix),
        validation_prefix=str(prefix),
        digest="",
        train_tokens=sum(LENGTHS),
        train_windows=windows,
        validation_windows=windows,
        examples=about,
        **more,
    )


def fed(data: DataPlan, rank: int, ranks: int, global_batch: int, micro: int, documents: str = "plain") -> Feed:
    accumulation = global_batch // micro // ranks
    plan: Any = SimpleNamespace(
        seed=3,
        documents=documents,
        documents_apart=True,
        batch=SimpleNamespace(global_=global_batch, micro=micro, ranks=ranks, accumulation=accumulation),
        data=data,
        sequence=SEQUENCE,
        model=SimpleNamespace(vocabulary=2**16),
    )
    return Feed(plan, SimpleNamespace(rank=rank), torch.device("cpu"))  # type: ignore[arg-type]


def asked(feeds: list[Feed], step: int) -> Counter[tuple[int, int]]:
    """Return the targets of a step, each with the token before it, over all ranks."""
    pairs: Counter[tuple[int, int]] = Counter()
    for each in feeds:
        for batch in each.micro_batches(step):
            rows = batch.targets != IGNORED
            pairs.update(zip(batch.inputs[rows].tolist(), batch.targets[rows].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 2), (2, 4), (1, 8)])
def test_any_number_of_ranks_sees_the_same_targets_and_knows_their_number(
    tmp_path: Path, ranks: int, micro: int, pack: bool
) -> None:
    data = corpus(written(tmp_path / "a", LENGTHS), pack=pack)
    feeds = [fed(data, rank, ranks, 8, micro) for rank in range(ranks)]
    alone = [fed(data, 0, 1, 8, 8)]
    for step in range(1, 9):  # over the end of an epoch
        pairs = asked(feeds, step)
        assert pairs == asked(alone, step)
        assert [each.target_count(step) for each in feeds] == [pairs.total()] * ranks


def test_an_epoch_has_every_target_once_packed_or_not(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", LENGTHS)
    expected: Counter[tuple[int, int]] = Counter()
    begin = 0
    for number, length in enumerate(LENGTHS):
        expected.update((begin + k - 1, begin + k) for k in range(1, length, 2) if number != 2)
        begin += length
    for pack in (True, False):
        data = corpus(prefix, pack=pack)
        assert asked([fed(data, 0, 1, data.train_windows, 1)], 1) == expected
        batches = fed(data, 0, 1, 4, 2).validation_batches(0)
        assert sum(batch.rows(rows).target_count for batch, rows in batches if rows) == expected.total()


def test_positions_begin_anew_with_each_example_and_with_the_padding(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", [5, 4])
    about = ExamplesPlan(packing=True, too_long="refuse", train=2, validation=2, longest=5)
    data = DataPlan(
        path="a", train_prefix=str(prefix), validation_prefix=None, digest="", train_tokens=9, train_windows=1,
        validation_windows=0, examples=about,
    )  # fmt: skip
    (batch,) = fed(data, 0, 1, 1, 1).micro_batches(1)
    assert batch.inputs.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    i = IGNORED
    assert batch.targets.tolist() == [[1, i, 3, i, i, 6, i, 8, i, i, i, i]]


def test_a_mixture_of_examples_and_text_has_the_targets_of_each(tmp_path: Path) -> None:
    examples = corpus(written(tmp_path / "a", LENGTHS), kind=PartPlan, weight=0.5)
    with open_writer(tmp_path / "b", np.dtype(np.uint16)) as writer:
        writer.add_document(np.arange(1000, 1000 + 20 * SEQUENCE + 1, dtype=np.uint16))
    text = PartPlan(
        path="b", train_prefix=str(tmp_path / "b"), validation_prefix=None, digest="", train_tokens=241,
        train_windows=20, validation_windows=0, weight=0.5,
    )  # fmt: skip
    mixed = DataPlan(
        path="a:0.5,b:0.5", train_prefix="", validation_prefix=None, digest="", train_tokens=0, train_windows=40,
        validation_windows=0, parts=[examples, text],
    )  # fmt: skip
    assert mixed.has_examples
    feeds = [fed(mixed, rank, 2, 8, 2) for rank in range(2)]
    for step in range(1, 5):
        pairs = asked(feeds, step)
        assert [each.target_count(step) for each in feeds] == [pairs.total()] * 2
        assert sum(count for (token, _), count in pairs.items() if token >= 1000) == 4 * SEQUENCE
        assert pairs == asked([fed(mixed, 0, 1, 8, 1)], step)


# --- what an example knows of its neighbours -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_editing_an_example_moves_no_logit_and_no_loss_of_another_in_its_row(tmp_path: Path, family: str) -> None:
    folder = write_examples(tmp_path / "a", drawn([9, 7, 5, 2], 1), drawn([3, 3], 2))
    packed = PackedExamples(str(folder / "train"), 24, pack=True, too_long="refuse", seed=0)
    ids, starts, counted = packed.rows([0])
    model: Any = made(family).eval()

    def seen(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = MicroBatch.of_documents(tokens, starts, counted)
        with torch.no_grad():
            logits = batch.logits(model)
        return logits, cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")

    logits, losses = seen(ids)
    owners = starts[0, :24].cumsum(0)
    assert owners.unique().tolist() == [1, 2, 3, 4, 5], "four examples and the padding"
    for place in range(24):
        tokens = ids.clone()
        tokens[0, place] = (tokens[0, place] + 31) % 64
        logits_now, losses_now = seen(tokens)
        others = owners != owners[place]
        assert torch.equal(logits_now[0, others], logits[0, others])
        assert torch.equal(losses_now[0, others], losses[0, others])
        assert not torch.equal(logits_now[0, place], logits[0, place])


# --- the plan --------------------------------------------------------------------------------------------------------


def planned(folder: Path | str, *keys: str) -> Plan:
    request = load(["model=gpt2-nano", f"data={folder}", "sequence=16", "batch.global=4", "steps=10", *keys])
    world = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
    return resolve(request, world, facts.read(request.spec))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 40 examples of which three are longer than 16 tokens, and four of validation, of which one is."""
    home = tmp_path_factory.mktemp("planned") / "examples"
    return write_examples(home, drawn([4] * 17 + [7] * 20 + [17, 25, 40], 1), drawn([4, 4, 5, 30], 2))


def test_examples_that_are_too_long_are_refused_with_their_number_and_the_longest(folder: Path) -> None:
    with pytest.raises(RequestError) as refused:
        planned(folder)
    assert refused.value.what == "4 of 44 examples are longer than sequence=16; the longest has 40 tokens"
    assert refused.value.where == f"data={folder}"
    assert refused.value.fix == "take sequence=40, or say what becomes of them: too_long=cut or too_long=drop"
    assert planned(folder, "sequence=40").data.examples is not None


@pytest.mark.parametrize(("too_long", "train", "validation", "windows"), [("cut", 40, 4, 18), ("drop", 37, 3, 15)])
def test_what_is_cut_or_dropped_is_counted_and_shown(
    folder: Path, too_long: str, train: int, validation: int, windows: int
) -> None:
    plan = planned(folder, f"too_long={too_long}")
    assert plan.data.examples == ExamplesPlan(
        packing=True,
        too_long=too_long,
        train=train,
        validation=validation,
        longest=40,
        longer=4,
        padding=1 - (17 * 4 + 20 * 7 + (48 if too_long == "cut" else 0)) / (windows * 16),
    )
    assert plan.data.train_windows == windows
    shown = next(line for line in lines(plan) if line.startswith("examples"))
    assert f"{train} for training and {validation} for validation, whole beside each other" in shown
    assert shown.endswith(f"4 longer than the sequence are {'cut' if too_long == 'cut' else 'dropped'}")
    assert "documents    apart: attention and positions stay within each" in lines(plan)
    feed = Feed(plan, SimpleNamespace(rank=0), torch.device("cpu"))  # type: ignore[arg-type]
    assert len(list(feed.micro_batches(1))) == plan.batch.accumulation
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("part", [1, 30, 1 << 24])
def test_where_the_first_target_stands_is_read_from_the_mask(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_counts, "_MASK_PART", part)
    given = drawn([1, 9, 17, 3, 40, 1, 25] * 3, 4)
    expected = Counter(marks.index(1, 1) for _, marks in given if 1 in marks[1:])
    first = read_data(str(write_examples(tmp_path / "made", given, drawn([9, 9], 1)))).train_first_targets
    assert first == tuple(sorted(expected.items()))


def test_examples_that_are_cut_before_their_first_target_are_counted_or_refused(tmp_path: Path) -> None:
    def behind(tokens: int) -> tuple[list[int], list[int]]:
        return [5] * (tokens + 4), [0] * tokens + [1] * 4

    some = write_examples(tmp_path / "some", [behind(4), behind(15), behind(16), behind(40)], [behind(3)])
    (said,) = [line for line in planned(some, "too_long=cut", "batch.global=2").warnings if "without a target" in line]
    assert said.startswith(f"too_long=cut leaves 2 examples of {some} without a target, which stands behind 16 tokens")
    for keys in (("too_long=cut", "sequence=64"), ("too_long=drop", "sequence=19")):
        assert not [line for line in planned(some, *keys, "batch.global=2").warnings if "without a target" in line]
    none = write_examples(tmp_path / "none", [behind(20), behind(16)], [behind(3)])
    with pytest.raises(RequestError, match="too_long=cut leaves no example a target: all begin with 16") as refused:
        planned(none, "too_long=cut", "batch.global=2")
    assert refused.value.fix == "take a longer sequence, or too_long=drop for the examples that fit"


def test_nothing_is_left_where_all_are_too_long(folder: Path) -> None:
    with pytest.raises(RequestError, match="all training examples are longer than sequence=3, and too_long"):
        planned(folder, "sequence=3", "too_long=drop")


def test_how_examples_become_sequences_makes_another_run_and_of_text_does_nothing(folder: Path, corpus: Path) -> None:
    packed, apart = planned(folder, "too_long=cut"), planned(folder, "too_long=cut", "packing=false")
    assert apart.data.train_windows == 40
    assert packed.changed_from(apart.identity) == ["packing"]
    assert len({packed.run_id, apart.run_id, planned(folder, "too_long=drop").run_id}) == 3
    text = planned(corpus)
    assert not {"packing", "too_long"} & set(text.identity)
    assert "examples" not in text.to_dict()["data"]
    both = planned(corpus, "packing=false", "too_long=cut")
    assert (both.run_id, both.identity) == (text.run_id, text.identity)
    assert "packing=false does nothing: the data is no examples" in both.warnings
    assert not text.documents_apart


def test_examples_are_mixed_with_text_of_the_same_tokenizer(folder: Path, corpus: Path) -> None:
    examples = write_examples(folder.parent / "others", drawn([5] * 30, 3), drawn([5] * 3, 4), vocabulary=4096)
    plan = planned(f"{corpus}:0.5,{examples}:0.5")
    assert [part.examples is not None for part in plan.data.parts] == [False, True]
    assert plan.documents_apart
    assert (plan.documents, plan.data.parts[1].train_windows) == ("plain", 10)
    assert any(line.startswith(f"examples     {examples}: 30 for training") for line in lines(plan))


def test_a_pair_of_examples_is_not_read_without_its_mask(folder: Path) -> None:
    with pytest.raises(RequestError, match="which of its tokens are targets is said by the mask beside it"):
        read_data(str(folder / "train"))
