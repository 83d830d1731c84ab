"""Corpora mixed by weight: what is drawn when is exact, and the same for any ranks; what is no mixture is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes.pairs import write_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.launcher.cli import main
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.corpus.vocabulary import tokenizer_sha256
from halfstep.launcher.data.order import draws_of_step, permute, windows_of_step
from halfstep.launcher.engine import loop
from halfstep.launcher.engine.feed import Feed
from halfstep.launcher.engine.ranks import reports
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import facts, present
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory, trust
from halfstep.launcher.rundir.metric_rows import EvaluationRecord, of_row
from halfstep.launcher.study.axes import absolute
from halfstep.launcher.topology import Rank, Topology

SIZES = {"web": 64_001, "code": 6_401, "books": 12_801}
"""Training tokens: of 64 each 1000, 100 and 200 windows."""
seeds = st.integers(0, 10**18)
weightings = st.lists(st.integers(1, 10**6), min_size=2, max_size=9).map(
    lambda parts: [part / sum(parts) for part in parts]
)


# --- the order


def drawn(seed: int, sequences: int, weights: list[float], sizes: list[int], batch: int) -> tuple[np.ndarray, ...]:
    steps = [draws_of_step(seed, step, batch, weights, sizes) for step in range(1, sequences // batch + 1)]
    return tuple(np.concatenate([step[which] for step in steps]) for which in (0, 1))


@settings(max_examples=40)
@given(weights=weightings, seed=seeds)
def test_after_every_sequence_each_part_has_its_share_to_less_than_two(weights: list[float], seed: int) -> None:
    parts, _ = drawn(seed, 600, weights, [7] * len(weights), 60)
    counts = np.cumsum(parts[:, None] == np.arange(len(weights)), axis=0)
    off = np.abs(counts - np.arange(1, 601)[:, None] * np.array(weights)).max()
    assert off <= {2: 0.5, 3: 1.0}.get(len(weights), 1.68) + 1e-6


@settings(max_examples=40)
@given(weights=weightings, seed=seeds, sizes=st.lists(st.integers(1, 60), min_size=9, max_size=9))
def test_each_part_is_walked_through_epoch_by_epoch_without_a_gap(
    weights: list[float], seed: int, sizes: list[int]
) -> None:
    sizes = sizes[: len(weights)]
    parts, windows = drawn(seed, 480, weights, sizes, 24)
    for part, size in enumerate(sizes):
        own = windows[parts == part]
        for epoch in range(len(own) // size):
            assert np.array_equal(np.sort(own[epoch * size : (epoch + 1) * size]), np.arange(size))
        rest = own[len(own) // size * size :]
        assert len(set(rest.tolist())) == len(rest)


@settings(max_examples=40)
@given(weights=weightings, seed=seeds, step=st.integers(1, 10**10), size=st.integers(1, 10**12))
def test_a_draw_does_not_depend_on_how_the_run_is_cut_into_steps(
    weights: list[float], seed: int, step: int, size: int
) -> None:
    """No step but this one is looked at: what comes before it costs neither time nor memory."""
    sizes = [size + part for part in range(len(weights))]
    whole = draws_of_step(seed, step, 16, weights, sizes)
    halves = [draws_of_step(seed, half, 8, weights, sizes) for half in (2 * step - 1, 2 * step)]
    for which in (0, 1):
        assert np.array_equal(whole[which], np.concatenate([half[which] for half in halves]))


def test_the_order_is_the_one_it_will_always_be() -> None:
    """Worked out once and kept: changing it breaks the resume of every mixture."""
    parts, windows = draws_of_step(1234, 3, 10, [0.7, 0.2, 0.1], [1000, 100, 3])
    assert parts.tolist() == [0, 1, 0, 0, 2, 0, 0, 0, 1, 0]
    assert windows.tolist() == [539, 65, 472, 788, 0, 629, 90, 151, 40, 740]
    parts, windows = draws_of_step(0, 10**9, 4, [1 / 3, 2 / 3], [10**12, 10**12])
    assert (parts.tolist(), windows.tolist()) == (
        [1, 0, 1, 1],
        [430832522049, 913217076182, 276325511858, 438458358708],
    )


def test_equal_parts_have_orders_of_their_own() -> None:
    parts, windows = drawn(5, 2000, [0.5, 0.5], [1000, 1000], 100)
    both = [windows[parts == part] for part in (0, 1)]
    assert (both[0] == both[1]).sum() < 10
    assert (both[0] == permute(np.arange(1000), 1000, 5)).sum() < 10, "nor that of a corpus by itself"


def test_shares_lie_within_the_binomial_band_of_the_weights() -> None:
    weights, sequences = [0.7, 0.2, 0.1], 3000
    parts, _ = drawn(3, sequences, weights, [1000, 100, 3], 30)
    for part, weight in enumerate(weights):
        assert abs((parts == part).sum() - sequences * weight) < 1 < math.sqrt(sequences * weight * (1 - weight))


# --- a corpus for each part


@pytest.fixture
def corpora(corpus: Path, tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, tokens in SIZES.items():
        folder = Path(shutil.copytree(corpus, tmp_path / name))
        write_pair(folder / "train", tokens)
        tree = json.loads((folder / "manifest.json").read_text())
        sizes = {ending: (folder / f"train.{ending}").stat().st_size for ending in ("bin", "idx")}
        tree["splits"]["train"] |= {"tokens": tokens, "bytes": sizes}
        tree["source"] = {"asked": name}
        (folder / "manifest.json").write_text(json.dumps(tree))
        made[name] = folder
    return made


def mixed(corpora: dict[str, Path], *weights: float) -> str:
    return "data=" + ",".join(f"{path}:{weight}" for path, weight in zip(corpora.values(), weights, strict=False))


def planned(*arguments: str, ranks: int = 2) -> tuple[Request, Plan]:
    request = load(["model=gpt2-nano", "sequence=64", "batch.global=8", "batch.micro=2", "steps=50", *arguments])
    world = Topology(world_size=ranks, ranks_per_node=ranks, accelerator="cpu")
    return request, resolve(request, world, facts.read(request.spec))


def feed(plan: Plan, rank: int) -> Feed:
    about = Rank(rank=rank, local_rank=rank, world_size=2, local_world_size=2, source="by hand")
    return Feed(plan, about, torch.device("cpu"))


def tokens_of(plan: Plan, steps: range) -> list[list[list[int]]]:
    """Return the windows of each step of all ranks, in the order in which one rank alone would read them."""
    ranks = [feed(plan, rank) for rank in range(plan.batch.ranks)]
    listed = []
    for step in steps:
        of_ranks = [list(rank.micro_batches(step)) for rank in ranks]
        listed.append([row for turn in zip(*of_ranks, strict=True) for batch in turn for row in batch.inputs.tolist()])
    return listed


def test_the_words_the_file_and_the_study_say_the_same(corpora: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'data = [{ path = "web", weight = 7 }, { path = "code", weight = 2 }, { path = "books", weight = 1 }]'
    )
    _, of_file = planned(str(file))
    _, of_words = planned(mixed(corpora, 0.7, 0.2, 0.1))
    assert of_file.run_id == of_words.run_id
    assert of_file.identity == of_words.identity
    assert of_file.data.weights == [0.7, 0.2, 0.1]
    study = absolute("data", [{"path": "web", "weight": 0.7}, {"path": "code", "weight": 0.3}], tmp_path)
    assert study == f"{corpora['web']}:0.7,{corpora['code']}:0.3"


def test_the_plan_shows_every_part_and_how_often_it_is_read(corpora: dict[str, Path]) -> None:
    _, plan = planned(mixed(corpora, 0.5, 0.3, 0.2), "steps=100", "eval.sequences=6")
    shown = [line.split() for line in present.lines(plan)]
    assert ["part", "weight", "tokens", "windows", "validation", "epochs"] in shown
    for name, row in {
        "web": ["0.5", "64,001", "1,000", "6", "0.4"],
        "code": ["0.3", "6,401", "100", "6", "2.4"],
        "books": ["0.2", "12,801", "200", "6", "0.8"],
    }.items():
        assert [str(corpora[name]), *row] in shown
    assert plan.warnings == [f"the run reads {corpora['code']} 2.4 times over"]
    assert (plan.data.train_tokens, plan.data.train_windows, plan.data.validation_windows) == (83_203, 1300, 18)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_single_path_is_planned_as_it_always_was(corpora: dict[str, Path]) -> None:
    _, plan = planned(f"data={corpora['web']}")
    assert list(plan.to_dict()["data"]) == [
        *("path", "train_prefix", "validation_prefix", "digest", "train_tokens", "train_windows"),
        *("validation_windows", "tokens_digest"),
    ]
    assert "data.weights" not in plan.identity
    parts, windows = feed(plan, 0).sequences(9)
    assert windows.tolist() == windows_of_step(0, 9, 8, 1000).tolist()
    assert parts.tolist() == [0] * 8


def test_two_ranks_read_what_one_reads_and_a_resume_what_comes_next(corpora: dict[str, Path]) -> None:
    arguments = [mixed(corpora, 0.5, 0.3, 0.2), "seed=7"]
    two, alone = planned(*arguments)[1], planned(*arguments, ranks=1)[1]
    whole = tokens_of(alone, range(1, 51))
    assert tokens_of(two, range(1, 51)) == whole
    for step in (2, 17, 50):
        assert tokens_of(two, range(step, 51)) == whole[step - 1 :], "a new Feed that begins at any step"
    parts = np.concatenate([feed(two, 0).sequences(step)[0] for step in range(1, 51)])
    assert np.bincount(parts).tolist() == [200, 120, 80]


def test_a_sequence_holds_the_tokens_of_its_parts_window(corpora: dict[str, Path]) -> None:
    """A part's own tokens, told apart by their first ids: the fixture writes n % 100 at place n."""
    _, plan = planned(mixed(corpora, 0.5, 0.3, 0.2), ranks=1)
    for file, shift in ((corpora["code"], 1), (corpora["books"], 2)):
        content = np.fromfile(file / "train.bin", dtype=np.uint16)
        (file / "train.bin").write_bytes(((content + 100 * shift).astype(np.uint16)).tobytes())
    parts, windows = feed(plan, 0).sequences(3)
    (rows,) = tokens_of(plan, range(3, 4))
    expected = [
        [100 * part + (64 * window + place) % 100 for place in range(64)]
        for part, window in zip(parts, windows, strict=True)
    ]
    assert set(parts.tolist()) == {0, 1, 2}
    assert rows == expected


def test_every_part_has_its_own_validation(corpora: dict[str, Path]) -> None:
    _, plan = planned(mixed(corpora, 0.5, 0.5), "eval.sequences=6")
    for part in (0, 1):
        rows = [sum(count for _, count in feed(plan, rank).validation_batches(part)) for rank in (0, 1)]
        assert rows == [4, 2], "six sequences, two a batch, dealt to two ranks"
        assert len({len(list(feed(plan, rank).validation_batches(part))) for rank in (0, 1)}) == 1


def test_the_loss_of_an_evaluation_is_the_mean_of_its_parts_by_weight(
    corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parts that have 3 and 1 sequences of validation: by their sizes the mean would be another."""
    monkeypatch.setattr(loop, "sum_over_ranks", lambda values, device: [float(value) for value in values])
    _, plan = planned(mixed(corpora, 0.9, 0.1), ranks=1)
    parts = [
        dataclasses.replace(part, validation_windows=size) for part, size in zip(plan.data.parts, (3, 1), strict=True)
    ]
    plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, parts=parts))
    of_part = iter([2.0, 2.0, 7.0])  # of two batches and one, nats a token
    recorded: list[EvaluationRecord] = []
    run: Any = SimpleNamespace(
        plan=plan,
        feed=feed(plan, 0),
        judges=None,
        engine=SimpleNamespace(device=torch.device("cpu"), eval=lambda: None, train=lambda: None),
        phase=lambda name, step: None,
        stopping_anywhere=lambda: False,
        loss_of=lambda batch, engine, rows, reduction: torch.tensor(next(of_part) * rows * 64),
        on_evaluation=recorded.append,
        on_event=lambda kind, **details: None,
    )
    assert loop._evaluate(run, 3)
    (row,) = recorded
    assert row.eval_loss == pytest.approx(0.9 * 2 + 0.1 * 7, rel=1e-12)
    assert row.perplexity == pytest.approx(math.exp(2.5), rel=1e-12)
    assert row.eval_loss_by_part == {str(corpora["web"]): 2.0, str(corpora["code"]): 7.0}


# --- what makes it another run


def test_a_changed_weight_is_another_run_and_the_directory_says_so(corpora: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    request, plan = planned(mixed(corpora, 0.7, 0.3))
    run_directory.write_plan(out, request, plan)
    same = planned(mixed(corpora, 7, 3))[1]
    assert same.run_id == plan.run_id
    run_directory.refuse_another_run(out, same)
    other = planned(mixed(corpora, 0.6, 0.4))[1]
    assert other.run_id != plan.run_id
    with pytest.raises(RequestError) as refused:
        run_directory.refuse_another_run(out, other)
    assert refused.value.what == (
        f"{out} belongs to a different run: data.weights was [0.7, 0.3] and is now [0.6, 0.4]"
    )


def test_other_parts_and_a_part_alone_are_other_runs(corpora: dict[str, Path], tmp_path: Path) -> None:
    plans = [
        planned(f"data={corpora['web']}:1,{corpora['code']}:1")[1],
        planned(f"data={corpora['web']}:1,{corpora['books']}:1")[1],
        planned(f"data={corpora['code']}:1,{corpora['web']}:1")[1],
        planned(f"data={corpora['web']}")[1],
    ]
    assert len({plan.run_id for plan in plans}) == 4
    for plan in plans[1:]:
        assert plan.changed_from(plans[0].identity)


def test_a_mixture_that_was_moved_is_the_same_run(corpora: dict[str, Path], tmp_path: Path) -> None:
    _, plan = planned(mixed(corpora, 0.7, 0.3))
    moved = {name: path.rename(tmp_path / f"{name}-moved") for name, path in corpora.items()}
    assert planned(mixed(moved, 0.7, 0.3))[1].run_id == plan.run_id


def test_a_run_directory_of_a_mixture_reads_back(corpora: dict[str, Path], tmp_path: Path) -> None:
    request, plan = planned(mixed(corpora, 0.7, 0.3))
    run_directory.write_plan(tmp_path / "out", request, plan)
    again = load([str(tmp_path / "out" / "request.toml")], stored=True)
    assert again.spec == request.spec
    assert trust.beyond_request(again.spec, plan) is None
    forged = dataclasses.replace(plan.data.parts[1], train_prefix="/etc/passwd")
    data = dataclasses.replace(plan.data, parts=[plan.data.parts[0], forged])
    assert trust.beyond_request(request.spec, dataclasses.replace(plan, data=data)) == "data from /etc/passwd"


def test_a_part_that_changed_is_met_at_the_roll_call(corpora: dict[str, Path]) -> None:
    _, plan = planned(mixed(corpora, 0.7, 0.3))
    rank = Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, source="by hand")
    assert reports.report(rank, plan, ("127.0.0.1", 1), None).problem is None
    content = bytearray((corpora["code"] / "train.bin").read_bytes())
    content[0] ^= 1
    (corpora["code"] / "train.bin").write_bytes(content)
    assert "holds another corpus" in (reports.report(rank, plan, ("127.0.0.1", 1), None).problem or "")


# --- what is refused


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("web:0,code:0", "the weights of the mixture sum to 0, not to a positive number"),
        ("web:1,code:-1", "the weights of the mixture sum to 0, not to a positive number"),
        ("web:1,code:0", "the weight of {code} is 0, not a number from 1e-9 to 1e+9"),
        ("web:2,code:-1", "the weight of {code} is -1, not a number from 1e-9 to 1e+9"),
        ("web:nan,code:1", "the weight of {web} is nan, not a number from 1e-9 to 1e+9"),
        ("web:1,code:inf", "the weight of {code} is inf, not a number from 1e-9 to 1e+9"),
        ("web:1,code:1e-999999999", "the weight of {code} is 1e-999999999, not a number from 1e-9 to 1e+9"),
        ("web:1,code", "'code' has no weight"),
        ("web:1,code:much", "'code:much' has no weight"),
        ("web:1,", "a part of the mixture is empty"),
        ("web:1,web:2", "{web} is twice in the mixture"),
        ("web:1,link:2", "{link} and {web} are the same corpus"),
        ("web:1,gone:2", "there is no data at {gone}"),
        ("web:1,bare/train:1", "{bare}/train has no validation split, and a mixture is evaluated part by part"),
        ("web:1,other:1", "{web} and {other} were made with different tokenizers (4096 tokens, "),
        ("web:1,short:1", "sequence=64 is longer than the corpus, which has 20 training tokens"),
    ],
)
def test_what_is_no_mixture_is_refused_in_three_lines(
    corpora: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: str,
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(corpora["web"])
    corpora["books"].rename(tmp_path / "bare")
    (tmp_path / "bare" / "manifest.json").unlink()
    for name in ("other", "short"):
        folder = Path(shutil.copytree(corpora["code"], tmp_path / name))
        tree = json.loads((folder / "manifest.json").read_text())
        if name == "other":
            (folder / "tokenizer" / "tokenizer.model").write_bytes(b"another one")
            tree["tokenizer"]["sha256"] = tokenizer_sha256(folder / "tokenizer")
        else:
            write_pair(folder / "train", 20)
            sizes = {ending: (folder / f"train.{ending}").stat().st_size for ending in ("bin", "idx")}
            tree["splits"]["train"] |= {"tokens": 20, "bytes": sizes}
        (folder / "manifest.json").write_text(json.dumps(tree))
    assert main.main(["plan", "model=gpt2-nano", "sequence=64", f"data={data}"]) == 2
    said = capsys.readouterr().err.rstrip("\n").splitlines()
    names = {name: tmp_path / name for name in ("web", "code", "link", "gone", "bare", "other", "short")}
    assert said[0].startswith(f"error: {what.format_map(names)}")
    assert len(said) == 3


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ([{"path": "a", "weight": 1}], "data lists 1 corpora, and a mixture has two or more"),
        ([], "data lists 0 corpora, and a mixture has two or more"),
        ([{"path": "a"}, {"path": "b", "weight": 1}], "a part of data is {'path': 'a'}, not a path and a weight"),
        (["a", "b"], "a part of data is a, not a path and a weight"),
        (
            [{"path": "a", "weight": True}, {"path": "b", "weight": 1}],
            "a part of data is {'path': 'a', 'weight': True}",
        ),
        ([{"path": "a,b", "weight": 1}, {"path": "c", "weight": 1}], "the path /here/a,b holds a comma"),
        (
            [{"path": "a", "weight": "x"}, {"path": "c", "weight": 1}],
            "the weight of /here/a is 'x', which is no number",
        ),
        ([{"path": str(n), "weight": 1} for n in range(65)], "data mixes 65 corpora; at most 64 can be"),
    ],
)
def test_a_list_that_is_no_mixture_is_refused(tables: list[Any], what: str) -> None:
    with pytest.raises(RequestError) as refused:
        absolute("data", tables, Path("/here"))
    assert refused.value.what.startswith(what)


@pytest.mark.parametrize("path", ["a:0.7", "a,b", "a:b,c", "a:0.7/b", "a,b:c"])
def test_a_path_with_commas_or_colons_is_a_path(path: str) -> None:
    assert absolute("data", path, Path("/here")) == f"/here/{path}"


def test_evaluations_carry_their_parts_and_older_rows_have_none() -> None:
    row = {"step": 0, "eval_loss": 5.0, "perplexity": 148.4, "time": 0.5}
    assert of_row(row).eval_loss_by_part is None  # type: ignore[union-attr]
    parts = {"/a": 4.0, "/b": None}
    assert of_row({**row, "eval_loss_by_part": parts}).eval_loss_by_part == parts  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="eval_loss_by_part"):
        of_row({**row, "eval_loss_by_part": {"/a": "low"}})
