"""Requests: what is read from words and files, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.config.dotted import flatten, unflatten
from halfstep.launcher.config.load import load
from halfstep.launcher.config.schema import run_keys
from halfstep.launcher.errors import RequestError

BASE = ["model=gpt2-nano", "data=/data"]


def refused(*arguments: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        load([*BASE, *arguments])
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
        (
            "precision=fp8",
            "precision=fp8: input should be 'fp32', 'tf32', 'fp16', 'bf16', 'fp16-autocast' or 'bf16-autocast'",
        ),
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
    assert {error.what.split("=")[0], *(problem.what.split("=")[0] for problem in error.more)} == {
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
    assert [problem.what for problem in caught.value.more] == ["data is missing"]


def test_steps_and_tokens_exclude_each_other() -> None:
    assert refused("steps=1", "tokens=1").what == "steps and tokens both say how long to train; give one of them"


def test_a_word_that_is_no_key_value_is_refused() -> None:
    assert refused("fast").what == "'fast' is neither key=value nor a run file"


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["=3"], "'=3' has no key before the =", "write key=value, such as zero=2"),
        (["ds.=1"], "'ds.=1' has no key before the =", "write key=value, such as zero=2"),
        (["batch=32"], "batch is a section, not a value", "set one of batch.global, batch.micro"),
        (["model.name.x=1"], "model.name is given both as a value and as a section", "keep one of model.name=... and"),
        (["--zero=2"], "'--zero=2' is neither key=value nor a run file", "run keys have no dashes: zero=2"),
        (["checkpoint.evry=10"], "unknown run key 'checkpoint.evry'", "did you mean checkpoint.every"),
    ],
)
def test_an_odd_word_is_understood_as_what_it_was_meant_for(arguments: list[str], what: str, fix: str) -> None:
    error = refused(*arguments)
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


# --- what no value may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "where_told"),
    [
        ("ds.comet.api_key=hunter2", "COMET_API_KEY"),
        ("ds.wandb.api_key=hunter2", "WANDB_API_KEY"),
        ("ds.wandb.some_key=hunter2", "WANDB_API_KEY"),
        ('ds.comet={"enabled":true,"api_key":"hunter2"}', "COMET_API_KEY"),
        ('ds.datastates_ckpt={"a":[{"password":"hunter2"}]}', "that its tool reads"),
        ("ds.x.credentials.user=hunter2", "that its tool reads"),
        ("ds.x.secret=12345", "that its tool reads"),
        ("hf_token=hunter2", "HF_TOKEN"),
        ("--api-key=hunter2", "that its tool reads"),
        ("data=https://me:hunter2@example.org/corpus", "the environment"),
        ("data=s3://me:hunter2@bucket/corpus", "the environment"),
        ("out=https://hunter2@example.org/x", "the environment"),
        ("model=hf:https://me:hunter2@huggingface.co/a/b", "the environment"),
        ("model=hf:a/b?token=hunter2", "the environment"),
        ("ds.tensorboard.output_path=https://x.org/?X-Amz-Signature=hunter2", "the environment"),
        ("ds.wandb.project=hf_" + "hunter2" * 5, "the environment"),
        ("hf_" + "hunter2" * 5, "the environment"),
        ("model=hf:hf_" + "hunter2" * 5, "the environment"),
    ],
)
def test_a_secret_is_refused_and_never_repeated(word: str, where_told: str) -> None:
    error = refused(word)
    assert "written into the run directory and every checkpoint" in error.what
    assert where_told in error.fix
    assert "hunter2" not in str(error)


def test_a_secret_in_a_run_file_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[ds.comet]\nenabled = true\napi_key = "hunter2"\n')
    error = refused(str(file))
    assert (error.what.partition(" is")[0], error.where) == ("ds.comet.api_key", str(file))
    assert "hunter2" not in str(error)


def test_a_run_that_was_started_with_a_secret_resumes(tmp_path: Path) -> None:
    file = tmp_path / "request.toml"
    file.write_text('data = "/data"\n[model]\nname = "gpt2-nano"\n[ds.comet]\napi_key = "hunter2"\n')
    assert load([str(file)], stored=True).spec.ds == {"comet.api_key": "hunter2"}


def test_what_only_sounds_like_a_secret_is_no_secret() -> None:
    arguments = ["tokens=1e6", "ds.comet.experiment_key=abc", "ds.data_efficiency.data_sampling.num_epochs=1"]
    arguments += ["ds.data_efficiency.data_routing.random_ltd.layer_token_lr_schedule={}", "data=/mnt/hf_datasets/a@b"]
    assert load(["model=gpt2-nano", *arguments], data=False).spec.tokens == 10**6


PATHS = ("data", "out", "nvme_path", "model")


@pytest.mark.parametrize("key", PATHS)
def test_a_path_that_no_file_system_takes_is_refused(key: str) -> None:
    prefix = "hf:/" if key == "model" else ""
    assert "a name of 300 bytes is longer than a file system takes (255)" in refused(f"{key}={prefix}{'x' * 300}").what
    assert "a name of 400 bytes" in refused(f"{key}={prefix}{'é' * 200}").what, "bytes count, not characters"
    assert "a path of" in refused(f"{key}={prefix}{'a/' * 3000}").what
    assert load([*BASE, f"{key}={prefix}{'x' * 255}"])


@pytest.mark.parametrize("key", PATHS)
def test_a_home_that_is_not_known_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = "hf:" if key == "model" else ""
    error = refused(f"{key}={prefix}~nosuchuser/x")
    assert "the home folder of a user 'nosuchuser' is not known" in error.what
    assert error.fix == "write the path in full"
    monkeypatch.setenv("HOME", "/home/me")
    spec = load([*BASE, f"{key}={prefix}~/x"]).spec
    assert getattr(spec, key) == "/home/me/x" if key != "model" else spec.model.name in ("hf:~/x", "hf:/home/me/x")


def test_a_study_takes_its_paths_alike() -> None:
    from halfstep.launcher.study.axes import absolute

    for key, value in (("out", "~nosuchuser"), ("data", "x" * 300), ("model.name", "hf:~nosuchuser/x")):
        with pytest.raises(RequestError):
            absolute(key, value, Path("/"))


def test_a_current_folder_that_was_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert refused("steps=1").what == "the current folder was removed"


@pytest.mark.parametrize("odd", ["\x1b[31m", "a\nb", "a\rb", "a\x00b", "\udcff", "\u2028", "\x9b"])
def test_control_characters_and_broken_text_are_refused_and_shown_as_codes(odd: str, tmp_path: Path) -> None:
    for word in (f"out={odd}", f"hardware={odd}", f"ds.wandb.project={odd}", f"k{odd}=1", odd, f"--x={odd}"):
        error = refused(word)
        assert "U+" in error.what
        assert odd not in str(error)
    if odd != "\udcff":
        file = tmp_path / "run.toml"
        file.write_text(f"hardware = {json.dumps(odd)}\n", encoding="utf-8")
        assert "U+" in refused(str(file)).what


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("ds.gradient_clipping=NaN", "ds.gradient_clipping is nan, not a finite number"),
        ("ds.gradient_clipping=-Infinity", "ds.gradient_clipping is -inf, not a finite number"),
        ("ds.gradient_clipping=1e999", "ds.gradient_clipping is inf, not a finite number"),
        ("ds.optimizer.params.betas=[0.9,1e999]", "ds.optimizer.params.betas[1] is inf, not a finite number"),
        ('ds.datastates_ckpt={"a":[{"b":NaN}]}', "ds.datastates_ckpt.a[0].b is nan, not a finite number"),
        ("ds.gradient_clipping=" + "9" * 400, "ds.gradient_clipping is a whole number of 1329 bits"),
        ("ds.gradient_clipping=" + "9" * 5000, "ds.gradient_clipping cannot be read: Exceeds the limit"),
        ("ds.x=" + "[" * 100_000, "ds.x is nested more than 32 levels deep"),
        ("ds.x=" + '{"a":' * 50 + "1" + "}" * 50, "is nested more than 32 levels deep"),
        ("ds." + "a." * 60 + "b=1", "is nested more than 32 levels deep"),
        ("ds." + "x" * 300 + "=1", "has more than 250 characters"),
        ("a." * 50_000 + "b=1", "has more than 250 characters"),
        ('ds.fp16={"enabled":true,"enabled":false}', "ds.fp16 cannot be read: the key 'enabled' stands there twice"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_no_number_and_what_is_a_maze_is_refused(word: str, what: str) -> None:
    error = refused(word)
    assert what in error.what
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[ds]\ngradient_clipping = nan\n", "ds.gradient_clipping is nan, not a finite number"),
        ("[ds]\ngradient_clipping = 1e999\n", "ds.gradient_clipping is inf, not a finite number"),
        ("[ds]\nx = 2020-01-01\n", "ds.x is a date, which JSON does not have"),
        ("steps = " + "9" * 5000, "the run file cannot be read: it is not TOML"),
        ("steps = 0x" + "f" * 5000, "steps is a whole number of 20000 bits"),
        ("x = " + "[" * 100_000 + "]" * 100_000, "it is nested more than 32 levels deep"),
        ("x = " + "[" * 60 + "]" * 60, "is nested more than 32 levels deep"),
        ("a." * 60 + "b = 1", "is nested more than 32 levels deep"),
        ("x" * 5000 + " = 1", "has more than 250 characters"),
        ("steps = 1\nsteps = 2", "the run file cannot be read: it is not TOML"),
    ],
    ids=lambda value: value[:30],
)
def test_a_run_file_is_held_to_the_same(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    error = refused(str(file))
    assert what in error.what
    assert error.where == str(file)


def test_a_run_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbfsteps = 7\n")
    assert load([*BASE, str(file)]).spec.steps == 7


def test_every_digit_of_a_whole_number_counts() -> None:
    assert load([*BASE, "seed=9007199254740993"]).spec.seed == 2**53 + 1
    assert load([*BASE, "tokens=1.5e3"]).spec.tokens == 1500


def test_a_file_named_behind_the_flag_must_be_there() -> None:
    assert refused("--ds-config").what == "--ds-config names no file"
    assert refused("--ds-config=").what == "--ds-config names no file"


some_keys = st.sampled_from(
    [*run_keys(), "ds.fp16", "ds.x.y", "ds", "model", "batch", "nonsense", "", ".", "a..b", "--x"]
)
some_values = st.text(max_size=12) | st.sampled_from(
    [
        "1",
        "-1",
        "1e9",
        "nan",
        "true",
        "~",
        "~nobodyhere",
        "hf:x",
        "[1,2]",
        '{"a":1}',
        "[" * 2000,
        "x" * 300,
        "/dev/zero",
    ]
)


def understood(*arguments: str) -> bool:
    """Tell whether words are a request; whatever they are, nothing but an error of ours comes of them."""
    try:
        return load([*BASE, *arguments], data=False).spec.model.name != ""
    except RequestError:
        return False


@given(st.lists(st.builds("{}={}".format, some_keys, some_values) | st.text(max_size=20), max_size=4))
def test_any_words_are_a_request_or_an_error_of_ours(arguments: list[str]) -> None:
    assert understood(*arguments) in (True, False)


@given(
    st.dictionaries(some_keys, some_values | st.floats() | st.booleans() | st.dates(), max_size=4), st.integers(0, 6)
)
def test_any_run_file_is_a_request_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object], cut: int
) -> None:
    file = tmp_path_factory.mktemp("any") / "run.toml"
    rows = [
        f"{json.dumps(key)} = {json.dumps(value) if isinstance(value, str) else str(value).lower()}"
        for key, value in content.items()
    ]
    file.write_text("\n".join(rows)[cut:], encoding="utf-8", errors="surrogatepass")
    assert understood(str(file)) in (True, False)


@pytest.mark.parametrize(
    "line", ["zero = true", "optimizer.lr = true", "fp16.initial_scale_power = false", "seed = true"]
)
def test_true_is_no_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.toml").write_text(f'model = "gpt2-nano"\ndata = "d"\n{line}\n')
    with pytest.raises(RequestError, match="true and false are not numbers"):
        load([str(tmp_path / "run.toml")])
