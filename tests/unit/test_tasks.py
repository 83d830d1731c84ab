"""Tasks: what a model is asked, what its answers are worth, and what is wrong with a task file."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import judges
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu, corpus_chrf
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfstep.launcher.cli.main import main
from halfstep.launcher.config import task_file
from halfstep.launcher.data import chat
from halfstep.launcher.data import prepare as data_prepare
from halfstep.launcher.data.tokenizer import HuggingFace
from halfstep.launcher.errors import RequestError
from halfstep.launcher.tasks import judge as judge_page
from halfstep.launcher.tasks import requests, scores
from halfstep.launcher.tasks.answers import Asked, until

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "def encode(",
    "x",
    "for item in a list of all values:\n    yield",
    "class",
    "",
    "import json\nfrom math import",
)
ROWS = [{"prompt": prompt, "completion": " return value"} for prompt in PROMPTS]
GENERATE = 'metrics = ["exact_match"]\n[answer]\nkind = "generate"\nmax_new_tokens = 12\n'
CHOOSE = 'metrics = ["accuracy", "macro_f1"]\n[answer]\nkind = "choices"\nchoices = [" return value", " pass"]\n'
FAMILIES = ("gpt2", "llama")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "text").mkdir()
    for name in ("json/encoder.py", "json/decoder.py", "random.py"):
        text = (Path(os.__file__).parent / name).read_text()
        (folder / "text" / Path(name).with_suffix(".txt").name).write_text(text)
    out = folder / "corpus"
    data_prepare.prepare(str(folder / "text"), out, vocab_size=512, validation=0.1, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def models(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {family: judges.model(home / family, corpus, family) for family in FAMILIES}


def _eval(model: Path, task: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["eval", str(model), "--task", str(task), "--json", *more]) == 0
    (result,) = json.loads(capsys.readouterr().out)["tasks"]
    return result


def _rows(model: Path, task: Path, tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "examples.jsonl"
    assert main(["eval", str(model), "--task", str(task), "--examples", str(file)]) == 0
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _judged(model: Path, task: Path, ranks: int = 1) -> judge_page.Judged:
    """Judge as so many ranks would that share the examples."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    asked = Asked(network=network, tokenizer=HuggingFace.load(str(model)), device=network.device)
    prepared = requests.prepare(task_file.read(task), asked.tokenizer, judges.CONTEXT)
    shares: list[judge_page.Share] = []
    everyone = threading.Barrier(ranks)

    def gather(share: judge_page.Share) -> list[judge_page.Share]:
        shares.append(json.loads(json.dumps(share)))
        everyone.wait(60)
        return shares

    with ThreadPoolExecutor(ranks) as pool:
        *_, judged = pool.map(
            lambda rank: judge_page.judge(prepared, asked, rank=rank, ranks=ranks, gather=gather), range(ranks)
        )
    answered = [tuple(answer[:3]) for share in shares for answer in share]
    assert len(answered) == len(set(answered))
    assert judged is not None
    return judged


# What answers are worth.


@pytest.mark.parametrize(
    ("answers", "references", "expected"),
    [
        (["a", "b", "a", "b"], ["a", "b", "b", "b"], (2 / 3 + 4 / 5) / 2),
        (["a", "a", "a"], ["a", "a", "b"], (4 / 5 + 0) / 2),  # nobody names b
        (["a", "c"], ["a", "b"], (1 + 0) / 2),  # c is no class of the references
        (["c", "c"], ["a", "b"], 0.0),
        (["a"], ["a"], 1.0),
    ],
)
def test_macro_f1_is_the_mean_over_the_classes_that_are_there(
    answers: list[str], references: list[str], expected: float
) -> None:
    assert scores.macro_f1(answers, references) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_macro_f1_is_two_precision_recall_over_their_sum(pairs: list[tuple[str, str]]) -> None:
    parts = []
    for label in {reference for _, reference in pairs}:
        hits = sum(answer == reference == label for answer, reference in pairs)
        named, there = (sum(pair[side] == label for pair in pairs) for side in (0, 1))
        precision, recall = (hits / named if named else 0.0), hits / there
        parts.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    answers, references = zip(*pairs, strict=True)
    assert scores.macro_f1(answers, references) == pytest.approx(sum(parts) / len(parts), abs=1e-12)


SENTENCES = st.lists(st.text("ab c.,ü文", max_size=30), min_size=1, max_size=6)


@given(SENTENCES, st.data())
def test_bleu_and_chrf_are_sacrebleus(answers: list[str], data: st.DataObject) -> None:
    references = data.draw(st.lists(st.text("ab c.,ü文", max_size=30), min_size=len(answers), max_size=len(answers)))
    for tokenize in ("13a", "zh", "char"):
        expected = corpus_bleu(answers, [references], tokenize=tokenize).score
        assert scores.bleu(answers, references, tokenize) == expected
    assert scores.chrf(answers, references) == corpus_chrf(answers, [references]).score


def test_bleu_by_hand() -> None:
    # 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 n-grams are right, and the lengths are equal.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert scores.bleu(["the cat sat on mats"], ["the cat sat on it"]) == pytest.approx(expected)
    assert "tok:13a" in scores.bleu_signature()
    assert "nc:6" in scores.chrf_signature()


@pytest.mark.parametrize(
    ("answers", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab, ba, ab
        (["a b", "a b"], 2, 1 / 2),
        (["a", ""], 2, None),
    ],
)
def test_distinct_n_counts_different_n_grams(answers: list[str], n: int, expected: float | None) -> None:
    assert scores.distinct(answers, n) == expected


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("a\nb\n", ["\n"], "a"), ("a b", [], "a b"), ("abc", ["c", "b"], "a"), ("abc", ["x"], "abc"), ("", ["x"], "")],
)
def test_an_answer_ends_at_the_first_stop(text: str, stops: list[str], expected: str) -> None:
    assert until(text, stops) == expected


# What a model is asked.


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_made_one_by_one(
    family: str, beams: int, models: dict[str, Path], tmp_path: Path
) -> None:
    task = f"{GENERATE}beams = {beams}\n"
    together = _rows(models[family], judges.task(tmp_path / "a", ROWS, f"batch = 6\n{task}"), tmp_path)
    apart = _rows(models[family], judges.task(tmp_path / "b", ROWS, f"batch = 1\n{task}"), tmp_path)
    assert together == apart
    assert len({row["answer"] for row in together}) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_likeliest_token_after_token(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(models[family]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    for row in _rows(models[family], judges.task(tmp_path, ROWS, GENERATE), tmp_path):
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        new: list[int] = []
        while len(new) < 12:
            with torch.no_grad():
                token = int(network(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        assert (row["answer"], row["new_tokens"]) == (tokenizer.decode(new), len(new))


def test_a_stop_ends_an_answer_and_the_others_go_on(models: dict[str, Path], tmp_path: Path) -> None:
    whole = _rows(models["gpt2"], judges.task(tmp_path / "a", ROWS, GENERATE), tmp_path)
    stop = whole[0]["answer"][4:7]
    task = judges.task(tmp_path / "b", ROWS, f"{GENERATE}stop = [{json.dumps(stop)}]\n")
    stopped = _rows(models["gpt2"], task, tmp_path)
    assert [row["answer"] for row in stopped] == [row["answer"].partition(stop)[0] for row in whole]
    assert stopped[0]["new_tokens"] < whole[0]["new_tokens"]
    assert {row["new_tokens"] for row in stopped} == {stopped[0]["new_tokens"], 12}


@pytest.mark.parametrize("per_token", [False, True])
def test_the_likeliest_choice_is_the_answer(per_token: bool, models: dict[str, Path], tmp_path: Path) -> None:
    task = judges.task(tmp_path, ROWS, f"{CHOOSE}per_token = {str(per_token).lower()}\n")
    network = AutoModelForCausalLM.from_pretrained(models["gpt2"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["gpt2"])
    for row in _rows(models["gpt2"], task, tmp_path):
        expected = []
        for choice in (" return value", " pass"):
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            ids = tokenizer(row["prompt"] + choice, add_special_tokens=False)["input_ids"]
            assert ids[: len(prompt)] == prompt
            before = prompt or [tokenizer.eos_token_id]
            ids = before + ids[len(prompt) :]
            with torch.no_grad():
                logits = network(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            scored = [float(logits[place - 1, ids[place]]) for place in range(len(before), len(ids))]
            expected.append(math.fsum(scored) / (len(scored) if per_token else 1))
        assert row["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
        assert row["answer"] == (" return value", " pass")[expected[1] > expected[0]]


def test_perplexity_is_of_the_references_tokens_alone(models: dict[str, Path], tmp_path: Path) -> None:
    text = 'metrics = ["perplexity"]\n[answer]\nkind = "perplexity"\n'
    task = judges.task(tmp_path, ROWS, text)
    rows = _rows(models["llama"], task, tmp_path)
    mean = -sum(row["log_likelihood"] for row in rows) / sum(row["reference_tokens"] for row in rows)
    assert _judged(models["llama"], task).metrics == {"perplexity": pytest.approx(math.exp(mean), rel=1e-9)}
    assert {row["reference_tokens"] for row in rows} == {rows[0]["reference_tokens"]}
    both = text.replace('kind = "perplexity"', 'kind = "generate"\nmax_new_tokens = 3')
    judged = _judged(models["llama"], judges.task(tmp_path / "both", ROWS, both))
    assert judged.metrics == {"perplexity": pytest.approx(math.exp(mean), rel=1e-9)}


@pytest.mark.parametrize("text", [GENERATE, CHOOSE], ids=["generate", "choices"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_that_share_a_task_come_to_what_a_single_one_does(
    ranks: int, text: str, models: dict[str, Path], tmp_path: Path
) -> None:
    task = judges.task(tmp_path, ROWS, f"batch = 2\n{text}")
    alone, shared = _judged(models["gpt2"], task), _judged(models["gpt2"], task, ranks)
    assert (shared.metrics, shared.rows) == (alone.metrics, alone.rows)


def test_a_layout_has_fields_braces_and_rows_of_its_own_choices(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"q": {"text": "one"}, "options": [" a", " b", " c"], "label": 2, "n": 7},
        {"q": {"text": "two"}, "options": [" d", " e"], "label": 0, "n": 1.5},
    ]
    text = (
        'prompt = "{{{q.text}}} {n}:"\nreference = "{label}"\nmetrics = ["accuracy"]\n'
        '[answer]\nkind = "choices"\nchoices_field = "options"\n'
    )
    answered = _rows(models["gpt2"], judges.task(tmp_path, rows, text), tmp_path)
    assert [row["prompt"] for row in answered] == ["{one} 7:", "{two} 1.5:"]
    assert [row["reference"] for row in answered] == [" c", " d"]
    assert [len(row["log_likelihoods"]) for row in answered] == [3, 2]


def test_what_is_too_long_is_refused_cut_or_left_out_as_asked(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, {"prompt": "value of the " * 40 + "class", "completion": " return value"}]
    for text, counted in ((GENERATE, "answer.max_new_tokens = 12 among them"), (CHOOSE, "answers among them")):
        assert main(["eval", str(models["gpt2"]), "--task", str(judges.task(tmp_path, rows, text))]) == 2
        what, where, fix = capsys.readouterr().err.splitlines()[-3:]
        assert "1 of 7 prompts do not fit into the 64 tokens" in what
        assert counted in what
        assert where.endswith("rows.jsonl, lines 7")
        assert 'too_long = "cut"' in fix
        skipped = _eval(models["gpt2"], judges.task(tmp_path, rows, f'too_long = "skip"\n{text}'), capsys)
        assert (skipped["examples"], skipped["skipped"], skipped["cut"]) == (6, 1, 0)
        cut = _eval(models["gpt2"], judges.task(tmp_path, rows, f'too_long = "cut"\n{text}'), capsys)
        assert (cut["examples"], cut["skipped"], cut["cut"]) == (7, 0, 1)
    task = judges.task(tmp_path, rows, f'too_long = "cut"\n{GENERATE}')
    tokenizer = AutoTokenizer.from_pretrained(models["gpt2"])
    kept = tokenizer(rows[-1]["prompt"], add_special_tokens=False)["input_ids"][-(judges.CONTEXT - 12) :]
    again = judges.task(tmp_path / "kept", [{**rows[-1], "prompt": tokenizer.decode(kept)}], GENERATE)
    assert _rows(models["gpt2"], task, tmp_path)[-1]["answer"] == _rows(models["gpt2"], again, tmp_path)[0]["answer"]
    none = judges.task(tmp_path / "none", rows[-1:], f'too_long = "skip"\n{GENERATE}')
    assert main(["eval", str(models["gpt2"]), "--task", str(none)]) == 2
    assert "all 1 prompts are too long" in capsys.readouterr().err
    answer = judges.task(tmp_path / "no room", ROWS, f'too_long = "cut"\n{GENERATE.replace("12", "64")}')
    assert main(["eval", str(models["gpt2"]), "--task", str(answer)]) == 2
    assert "an answer may have 64 tokens, and the model looks at 64" in capsys.readouterr().err


def test_results_say_what_was_judged_and_how(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = judges.task(tmp_path, ROWS, GENERATE.replace('"exact_match"', '"exact_match", "bleu", "distinct_1"'))
    result = _eval(models["gpt2"], task, capsys)
    assert list(result["metrics"]) == ["exact_match", "bleu", "distinct_1"]
    assert (result["name"], result["kind"], result["examples"]) == ("small", "generate", 6)
    assert (result["model"], result["dtype"], result["device"]) == (str(models["gpt2"]), "float32", "cpu")
    assert result["digest"] == task_file.read(task).digest
    assert result["answer_tokens"] == 6 * 12
    assert result["tokens_per_second"] == pytest.approx(result["answer_tokens"] / result["seconds"])
    assert "tok:13a" in result["signatures"]["bleu"]
    assert _eval(models["gpt2"], task, capsys, "--dtype", "bf16")["dtype"] == "bfloat16"
    assert main(["eval", str(models["gpt2"]), "--task", str(task)]) == 0
    heading, *metrics = capsys.readouterr().out.splitlines()
    assert heading.startswith("small: 6 examples, 72 tokens in ")
    assert [line.split()[0] for line in metrics] == ["exact_match", "bleu", "distinct_1"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    assert task_file.read(task).digest != result["digest"]


# What is wrong with a task.


@pytest.mark.parametrize(
    ("text", "said", "advice"),
    [
        (GENERATE.replace("exact_match", "blue"), "there is no metric blue", "bleu"),
        (GENERATE.replace("exact_match", "accuracy_norm"), "there is no metric accuracy_norm", "accuracy"),
        (CHOOSE.replace('"accuracy"', '"bleu"'), 'metric bleu does not fit answer.kind = "choices"', "accuracy"),
        (GENERATE.replace('["exact_match"]', "[]"), "metrics", "measures answers"),
        (GENERATE.replace("max_new_tokens", "max_tokens"), "no key answer.max_tokens", "max_new_tokens"),
        (f"beams = 2\n{GENERATE}", "no key beams", "answer.beams"),
        (f"promt = 'x'\n{GENERATE}", "no key promt", "prompt"),
        (f"{CHOOSE}beams = 2\n", 'beams belongs to kind = "generate"', "leave it out"),
        (CHOOSE.replace(' "choices"', ' "choice"'), "answer.kind = choice", "answer"),
        (CHOOSE.replace('" pass"', '""'), "an empty text cannot be one of them", "choices"),
        (CHOOSE.replace('" return value", ', ""), "two or more", ""),
        (f"{CHOOSE}choices_field = 'x'\n", "choices or choices_field", ""),
        (GENERATE.replace("12", "0"), "answer.max_new_tokens = 0", "Tokens"),
        (GENERATE.replace("12", '"12"'), "answer.max_new_tokens = 12", "Tokens"),
        ("metrics = ['bleu']\n", "does not say its answer", "answer"),
        (f"prompt = '{{question}}'\n{GENERATE}", "the row has no field 'question'", "'prompt'"),
        (f"prompt = '{{'\n{GENERATE}", "prompt cannot be laid out", "braces"),
        (f"prompt = '{{prompt!r}}'\n{GENERATE}", "prompt cannot be laid out", "braces"),
        (f"prompt = '{{}}'\n{GENERATE}", "prompt cannot be laid out", "braces"),
        (f"reference = '{{right}}'\n{GENERATE}", "the row has no field 'right'", "reference"),
        (f"messages = 'messages'\n{GENERATE}", "laid out by a chat template", ""),
        (CHOOSE.replace(" return value", " raise"), "' return value' is none of the choices", "'raise'"),
        ("name = 1", "cannot be read", "fix that line"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_in_three_lines(
    text: str, said: str, advice: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = judges.task(tmp_path, ROWS, text)
    assert main(["eval", str(models["gpt2"]), "--task", str(task)]) == 2
    what, where, fix = capsys.readouterr().err.splitlines()[:3]
    assert said in what
    assert str(tmp_path) in where
    assert advice in what + fix


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("\n  \n", "has no rows"),
        ("[1]\n", "a JSON list, not an object"),
        ("{\n", "line 1 is not JSON"),
        ('{"prompt": "a", "completion": null}\n', "no field 'completion'"),
        ('{"prompt": ["a"], "completion": "b"}\n', "holds list, not text"),
    ],
)
def test_data_that_is_no_data_is_named_by_its_line(
    content: str, said: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = judges.task(tmp_path, ROWS, GENERATE)
    (tmp_path / "rows.jsonl").write_text(content)
    assert main(["eval", str(models["gpt2"]), "--task", str(task)]) == 2
    what, where, _ = capsys.readouterr().err.splitlines()
    assert said in what
    assert "rows.jsonl" in where


@pytest.mark.parametrize("choices", [[" a"], [" a", "  "], "a", [" a", 1], None])
def test_a_rows_own_choices_are_two_texts_or_more(choices: Any, tmp_path: Path) -> None:
    text = 'metrics = ["accuracy"]\n[answer]\nkind = "choices"\nchoices_field = "options"\n'
    file = judges.task(tmp_path, [{"prompt": "x", "completion": " a", "options": choices}], text)
    with pytest.raises(RequestError, match=r"holds no choices|a choice is empty"):
        requests.task_rows.read(task_file.read(file))


def test_missing_files_and_options_that_do_not_fit_are_named(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, model = judges.task(tmp_path, ROWS, GENERATE), str(models["gpt2"])
    (tmp_path / "rows.jsonl").unlink()
    for arguments, said in (
        ([model, "--task", str(task)], "the data of task small cannot be read: No such file"),
        ([model, "--task", str(tmp_path / "gone.toml")], "does not exist"),
        ([model], "nothing to judge by"),
        ([model, "--task", str(task), "--data", "d"], "different ways to judge"),
        ([model, "--task", str(task), "--sequence", "8"], "--sequence belongs to --data"),
        ([model, "--data", "d", "--step", "8"], "--step belongs to --task"),
        ([str(tmp_path), "--task", str(task)], "cannot be read"),
    ):
        assert main(["eval", *arguments]) == 2
        what, *rest = capsys.readouterr().err.splitlines()
        assert said in what
        assert len(rest) == 2


# The harness of others.


def test_without_the_harness_its_extra_is_named(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(models["gpt2"]), "--lm-eval", "small"]) == 2
    what, where, fix = capsys.readouterr().err.splitlines()
    assert "lm-evaluation-harness is not installed" in what
    assert where == " from: --lm-eval"
    assert "pip install 'halfstep[eval]'" in fix
    for arguments, said in (
        (["--lm-eval", "small", "--examples", "x"], "--examples belongs to --task"),
        (["--lm-eval", "small", "--task", "x"], "--task and --lm-eval are different ways"),
        (["--lm-eval", "small", "--limit", "0"], "0 is too few"),
    ):
        assert main(["eval", str(models["gpt2"]), *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra `eval` is not installed")
def test_the_harness_judges_a_local_task_as_a_task_file_does(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = (" return value", " pass", " raise error")
    rows = [
        {"prompt": row["prompt"] or "#", "completion": choices[place % 3], "label": place % 3}
        for place, row in enumerate(ROWS)
    ]
    text = CHOOSE.replace('" pass"]', '" pass", " raise error"]')
    ours = _eval(models["gpt2"], judges.task(tmp_path / "ours", rows, text), capsys)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "local.yaml").write_text(
        f"task: local\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'ours' / 'rows.jsonl'}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{prompt}}"\ntarget_delimiter: " "\n'
        'doc_to_choice: ["return value", "pass", "raise error"]\ndoc_to_target: "{{label}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )

    def harness(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "halfstep",
            "eval",
            str(models["gpt2"]),
            "--lm-eval-path",
            str(tmp_path / "theirs"),
        ]
        kept = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        return subprocess.run([*command, *more], env=kept, capture_output=True, text=True, cwd=ROOT)

    done = harness("--lm-eval", "local", "--json")
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert theirs["results"]["local"]["acc"] == pytest.approx(ours["metrics"]["accuracy"])
    assert theirs["examples"] == {"local": len(rows)}
    assert (theirs["model"], theirs["dtype"]) == (str(models["gpt2"]), "float32")
    unknown = harness("--lm-eval", "locale")
    assert unknown.returncode == 2
    assert "the harness knows no task 'locale'" in unknown.stderr


# Chat templates.


@pytest.mark.parametrize(
    ("template", "opening"),
    [("plain", ""), ("chatml", "<|im_start|>assistant\n"), ("alpaca", "### Response:\n")],
)
def test_a_conversation_is_laid_out_as_it_is_for_training(
    template: str, opening: str, models: dict[str, Path], tmp_path: Path
) -> None:
    text = f'too_long = "cut"\n{GENERATE}'
    talks = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": " a"}] for row in ROWS[:4]]
    layout = f'template = "{template}"\nmessages = "talk"\n'
    answered = _rows(
        models["gpt2"], judges.task(tmp_path / "a", [{"talk": talk} for talk in talks], layout + text), tmp_path
    )
    rows = [{"prompt": chat.written(template, talk[:1]) + opening, "completion": " a"} for talk in talks]
    expected = _rows(models["gpt2"], judges.task(tmp_path / "b", rows, text), tmp_path)
    assert [row["answer"] for row in answered] == [row["answer"] for row in expected]
    assert [(row["prompt"], row["reference"]) for row in answered] == [(row["prompt"], " a") for row in ROWS[:4]]


def test_a_prompt_is_what_a_user_says(models: dict[str, Path], tmp_path: Path) -> None:
    text = CHOOSE.replace("[answer]", 'template = "plain"\n[answer]')
    rows = [row for row in ROWS if row["prompt"]]
    templated = _rows(models["gpt2"], judges.task(tmp_path / "a", rows, text), tmp_path)
    assert templated == _rows(models["gpt2"], judges.task(tmp_path / "b", rows, CHOOSE), tmp_path)


def test_what_a_template_refuses_is_said_of_the_task(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
    for template, rows, said in (
        ("plain", [{"talk": talk}], "has no place for the role 'tool'"),
        ("tokenizer", [{"talk": talk}], "has no chat template of its own"),
        ("chatml", [{"talk": talk[:1]}], "no conversation that ends with the assistant's answer"),
        ("chatml", [{"talk": "hello"}], "no conversation"),
    ):
        text = GENERATE.replace("[answer]", f'template = "{template}"\nmessages = "talk"\n[answer]')
        assert main(["eval", str(models["gpt2"]), "--task", str(judges.task(tmp_path, rows, text))]) == 2
        what, where, fix = capsys.readouterr().err.splitlines()[-3:]
        assert said in what
        assert str(tmp_path) in where
        assert "--" not in fix
