"""Requests: what is read from words and files, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.spec.dotted import flatten, unflatten
from launcher.spec.load import load
from launcher.spec.schema import run_keys

BASE = ["model=gpt2-nano", "data=/data"]


def refused(*words: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        load([*BASE, *words])
    return caught.value


def test_words_become_a_typed_spec_and_keep_their_origin() -> None:
    request = load([*BASE, "zero=3", "optimizer.lr=6e-4", "batch.global=64", "compile=true", "tokens=2e9"])
    spec = request.spec
    assert (spec.zero, spec.optimizer.lr, spec.batch.global_, spec.compile, spec.tokens) == (
        3,
        6e-4,
        64,
        True,
        2_000_000_000,
    )
    assert spec.model.name == "gpt2-nano"
    assert request.origins["zero"] == "the command line"


def test_a_misspelt_run_key_names_the_nearest_right_one() -> None:
    error = refused("optimizer.lerning_rate=1")
    assert error.what == "unknown run key 'optimizer.lerning_rate'"
    assert refused("presicion=fp16").fix == "did you mean precision?"
    assert refused("optimizer.lrr=1").fix == "did you mean optimizer.lr?"
    assert refused("lr=1").fix == "did you mean optimizer.lr?"


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("zero=4", "zero=4: input should be less than or equal to 3"),
        ("zero=two", "zero=two: input should be a valid integer, unable to parse string as an integer"),
        ("precision=fp8", "precision=fp8: input should be 'fp32', 'fp16' or 'bf16'"),
        ("steps=0", "steps=0: input should be greater than or equal to 1"),
        ("optimizer.lr=nan", "optimizer.lr=nan: input should be a finite number"),
        ("model.dropout=1", "model.dropout=1: input should be less than 1"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_the_bound(word: str, what: str) -> None:
    error = refused(word)
    assert error.what == what
    assert error.where == "the command line"
    assert error.fix.startswith(word.partition("=")[0] + " is: ")


def test_all_problems_are_reported_together() -> None:
    error = refused("zero=4", "precision=fp8", "stepz=1")
    assert {error.what.split("=")[0], *(one.what.split("=")[0] for one in error.more)} == {
        "zero",
        "precision",
        "unknown run key 'stepz'",
    }


def test_an_unknown_preset_names_the_nearest_ones() -> None:
    with pytest.raises(RequestError) as caught:
        load(["model=gpt2-125m", "data=/data"])
    assert "gpt2-124m" in caught.value.what


def test_missing_model_and_data_are_asked_for() -> None:
    with pytest.raises(RequestError) as caught:
        load([])
    assert caught.value.what == "model.name is missing"
    assert [one.what for one in caught.value.more] == ["data is missing"]


def test_steps_and_tokens_exclude_each_other() -> None:
    assert refused("steps=1", "tokens=1").what == "steps and tokens both say how long to train; give one of them"


def test_a_word_that_is_no_key_value_is_refused() -> None:
    assert refused("fast").what == "'fast' is neither key=value nor a run file"


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["=3"], "'=3' has no key before the =", "write key=value, such as zero=2"),
        (["ds.=1"], "'ds.=1' has no key before the =", "write key=value, such as zero=2"),
        (["batch=32"], "batch is a section, not a value", "set one of batch.global, batch.micro"),
        (["model.name.x=1"], "model.name is given both as a value and as a section", "keep one of model.name=... and"),
        (["--zero=2"], "'--zero=2' is neither key=value nor a run file", "run keys have no dashes: zero=2"),
        (["checkpoint.evry=10"], "unknown run key 'checkpoint.evry'", "did you mean checkpoint.every"),
    ],
)
def test_an_odd_word_is_understood_as_what_it_was_meant_for(words: list[str], what: str, fix: str) -> None:
    error = refused(*words)
    assert error.what == what
    assert error.fix.startswith(fix)


def test_a_path_with_an_equals_sign_is_still_a_run_file(tmp_path: Path) -> None:
    folder = tmp_path / "zero=2"
    folder.mkdir()
    (folder / "run.toml").write_text('model = "gpt2-nano"\ndata = "/data"\n')
    assert load([str(folder / "run.toml")]).spec.model.name == "gpt2-nano"


def test_a_run_file_is_read_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "gpt2-nano"\ndata = "corpus"\nzero = 2\n'
        "[optimizer]\nlr = 6e-4\n[ds.zero_optimization]\noverlap_comm = true\n"
    )
    request = load([str(file), "zero=3"])
    assert request.spec.zero == 3
    assert request.spec.optimizer.lr == 6e-4
    assert request.spec.data == str(tmp_path / "corpus"), "a run file's paths are taken from its own folder"
    assert request.spec.ds == {"zero_optimization.overlap_comm": True}
    assert request.origins["optimizer.lr"] == str(file)


def test_a_syntax_error_in_a_run_file_gives_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "gpt2-nano"\nprecision = fp16\n')
    with pytest.raises(RequestError) as caught:
        load([str(file)])
    assert "line 2" in caught.value.what
    assert caught.value.where == str(file)


@pytest.mark.parametrize(("content", "what"), [(b"\xff\xfe", "not UTF-8 at byte 0"), (None, "does not exist")])
def test_an_unreadable_run_file_is_named(tmp_path: Path, content: bytes | None, what: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        load([str(file)])
    assert what in caught.value.what


def test_relative_paths_are_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(["model=gpt2-nano", "data=corpus", "out=it is/here"]).spec.out == str(tmp_path / "it is/here")


def test_ds_keys_take_their_type_from_json() -> None:
    spec = load(
        [
            *BASE,
            "ds.optimizer.params.betas=[0.9, 0.95]",
            "ds.communication_data_type=fp16",
            "ds.wall_clock_breakdown=true",
        ]
    ).spec
    assert spec.ds == {
        "optimizer.params.betas": [0.9, 0.95],
        "communication_data_type": "fp16",
        "wall_clock_breakdown": True,
    }


def test_every_run_key_has_a_sentence() -> None:
    assert {
        "zero",
        "batch.global",
        "batch.micro",
        "model.name",
        "fp16.initial_scale_power",
        "eval.every",
    } <= run_keys().keys()
    assert all(sentence.endswith((".", ")")) for sentence in run_keys().values())


keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.dictionaries(keys, st.integers(), max_size=3),
    lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree: dict) -> None:
    leaves = flatten(tree)
    assert flatten(unflatten(leaves)) == leaves
