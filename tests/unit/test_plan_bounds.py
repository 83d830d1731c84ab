"""However large a number is: what is counted equals what would be enumerated, and every plan answers at once."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.cli import main
from halfstep.launcher.config import bucket_sizes
from halfstep.launcher.config.schema import run_keys
from halfstep.launcher.forecast import fit
from halfstep.launcher.plan import batch
from halfstep.launcher.plan.plan import CheckpointPlan, Plan

Make = Callable[..., Plan]
ROOT = Path(__file__).resolve().parents[2]


def saving(every: int, at_end: bool) -> CheckpointPlan:
    return CheckpointPlan(every=every, keep=3, keep_every=0, at_end=at_end, resume="auto", on_failure="stop", grace=0.0)


@given(st.integers(0, 12), st.booleans(), st.integers(1, 100))
def test_saves_are_counted_as_they_would_be_made(every: int, at_end: bool, steps: int) -> None:
    plan = saving(every, at_end)
    assert plan.count(steps) == sum(plan.due(step, steps) for step in range(1, steps + 1))


@given(st.integers(1, 3000), st.integers(1, 4000), st.integers(1, 4))
def test_the_nearest_divisors_are_those_of_all(number: int, wanted: int, count: int) -> None:
    every = [size for size in range(1, number + 1) if number % size == 0]
    assert batch.nearest_divisors(number, wanted, count) == sorted(
        sorted(every, key=lambda size: abs(size - wanted))[:count]
    )


@given(st.integers(2, 3000))
def test_the_largest_part_of_a_number_is_its_largest_divisor_below_it(number: int) -> None:
    assert fit.largest_part(number) == max(size for size in range(1, number) if number % size == 0)


@given(
    st.integers(1, 10**12),
    st.integers(1, 10**9),
    st.integers(1, 10**6),
    st.sampled_from([0, 1, 2, 3]),
)
def test_a_bucket_of_stages_1_and_2_is_even_and_holds_every_tensor(
    parameters: int, largest: int, width: int, zero: int
) -> None:
    sizes = bucket_sizes.Sizes(parameters=parameters, largest_tensor=min(largest, parameters), width=width)
    size = bucket_sizes.bucket(sizes, zero)
    assert size >= min(sizes.largest_tensor, 500_000_000)
    assert size <= max(500_000_000, parameters) + 1
    if zero in (1, 2):
        assert size % 2 == 0
        assert size - bucket_sizes.bucket(sizes, 3) in (0, 1)


@pytest.mark.parametrize("zero", [1, 2])
def test_an_odd_number_of_parameters_gets_even_buckets(plan: Make, zero: int) -> None:
    made = plan(f"zero={zero}", "model.width=15", "model.heads=3", "model.layers=1", "model.vocabulary=4098")
    assert made.model.parameters % 2 == 1
    section = made.deepspeed["zero_optimization"]
    sizes = {section["allgather_bucket_size"], section["reduce_bucket_size"]}
    assert sizes == {made.model.parameters + 1}


def test_evaluations_are_counted_as_they_would_be_made(plan: Make) -> None:
    made = plan()

    @given(st.integers(1, 60), st.integers(0, 20))
    def check(steps: int, every: int) -> None:
        asked = {0, steps} | ({step for step in range(1, steps) if step % every == 0} if every else set())
        assert dataclasses.replace(made, steps=steps, eval_every=every).evaluations == len(asked)

    check()


def test_a_run_of_a_million_million_steps_that_saves_each_is_planned(plan: Make) -> None:
    made = plan("steps=1e12", "checkpoint.every=1", "eval.every=1", "numerics.every=1")
    assert made.steps == made.checkpoint.count(made.steps) == 10**12
    assert made.evaluations == 10**12 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steps=1e18"], "steps=1e18: input should be less than or equal to 1000000000000"),
        (["tokens=1e19"], "tokens=1e19: input should be less than or equal to 1000000000000000000"),
        (["batch.global=1e12", "batch.micro=7"], "batch.global=1e12: input should be less than or equal to 1000000000"),
        (
            ["batch.global=1e9", "batch.micro=7"],
            "batch.global=1000000000 is not batch.micro=7 x a whole accumulation x 2 ranks",
        ),
        (["model.layers=1e9"], "model.layers=1e9: input should be less than or equal to 10000"),
        (["model.width=1e9"], "model.width=1e9: input should be less than or equal to 1048576"),
        (["model.vocabulary=1e10"], "model.vocabulary=1e10: input should be less than or equal to 2147483647"),
        (["nodes=1e6", "gpus_per_node=1e6"], "nodes x gpus_per_node is 1000000000000 ranks; at most 1048576 can be"),
        (["seed=1e30"], "seed=1e30: input should be less than or equal to 1000000000000000000"),
        (["seed=1e31"], "seed=1e31: no number of a run has more than 30 digits"),
        (["steps=1e999999999"], "steps=1e999999999: no number of a run has more than 30 digits"),
        (["watch.timeout=1e300"], "watch.timeout=1e300: input should be less than or equal to 100000000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_out_of_all_bounds_is_refused_with_the_bound(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["plan", "model=gpt2-nano", "model.vocabulary=64", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_micro_batches_that_do_work_are_named_for_the_largest_batch(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=gpt2-nano", "model.vocabulary=64", "gpus_per_node=1", "batch.global=999999936"]
    assert main.main(["plan", *arguments, "batch.micro=999999"]) == 2
    assert "or batch.micro=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**12),
        ("vocab_size", 10**12),
        ("num_local_experts", 10**6),
        ("num_hidden_layers", 1e300),
    ],
)
def test_a_models_config_that_says_too_much_is_refused_before_it_is_counted(
    key: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for config in ({"model_type": "llama", key: value}, {"model_type": "gemma3", "text_config": {key: value}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main.main(["plan", f"model=hf:{tmp_path}"]) == 2
        assert f"the model's config says {key}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a,H100,8,1,1000000000,128", "layers is 1000000000; at most 10000 can be predicted"),
        ("a,H100,8,1,12,100000000", "hidden is 100000000; at most 1048576 can be predicted"),
        ("a,H100,1e17,1,12,128", "n_gpus is 100000000000000000; at most 1048576 can be predicted"),
    ],
)
def test_a_published_row_that_says_too_much_is_refused(
    row: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text(f"row_id,gpu,n_gpus,model_params_B,layers,hidden\n{row}\n")
    assert main.main(["plan", "score", "--rows", str(tmp_path / "rows.csv")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1e308", "nan", "-1", "9" * 5000])
def test_a_price_beyond_all_money_is_no_price(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "model=gpt2-124m", f"--price={text}"]) == 2
    said = capsys.readouterr().err
    assert "is not a price" in said
    assert len(said) < 400


EXTREMES = [
    *("1e18", "1e9", "2147483647", "-1", "0", "nan", "1e400", "9" * 5000, "true", "", "{}", "hf:/dev/zero"),
    *("x" * 5000, "a/" * 3000, "é" * 200, "~nosuchuser/a", "/dev/zero", "[" * 100_000, "a\x1b[31m", "\udcff"),
]  # fmt: skip
PROGRAM = """
import contextlib, io, json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from halfstep.launcher.cli.main import main
answers = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", *words])
    answers.append([code, len(out.getvalue()) + len(err.getvalue()), err.getvalue()[:300]])
json.dump(answers, sys.stdout)
"""


def test_every_run_key_with_any_value_is_planned_or_refused_in_a_few_words_and_little_memory() -> None:
    """The address space bounds what a plan may take; the time limit is only there for what never ends."""
    base = ["model=gpt2-nano", "model.vocabulary=64"]
    keys = [*run_keys(), "ds.zero_optimization.reduce_bucket_size", "ds.optimizer.params.lr", "ds.fp16", "ds.x"]
    cases = [[*base, f"{key}={value}"] for key in keys for value in EXTREMES]
    cases += [
        [*base, "steps=1e12", "checkpoint.every=1"],
        [*base, "model.layers=10000", "model.width=1048576", "model.heads=1"],
        [*base, "nodes=1024", "gpus_per_node=1024", "batch.global=1048576", "precision=fp32", "zero=2"],
        [*base, "batch.micro=499999993", "batch.global=999999986", "hardware=H100"],
        ["--search", "model=gpt2-124m", "hardware=H100", "nodes=1,2,1048576", "gpus=1"],
        ["--search", "model=gpt2-124m", "hardware=H100", "nodes=" + "9" * 5000],
        ["--search", "model=gpt2-124m", "hardware=H100", "nodes=" + ",".join(["1"] * 100)],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(cases),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bad = [
        (code, [word[:60] for word in case], said)
        for case, (code, size, said) in zip(cases, json.loads(done.stdout), strict=True)
        if code not in (0, 2, 3) or size > 200_000 or (code == 2 and size > 20_000)
    ]
    assert bad == []
