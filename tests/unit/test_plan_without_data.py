"""A plan that is only looked at needs no data; whatever depends on data says so, and no run starts without."""

import json
from pathlib import Path

import pytest

from halfstep.launcher import train
from halfstep.launcher.cli import main

BIG = ["model=gpt3-175b", "nodes=128", "gpus_per_node=8", "hardware=H100", "zero=3", "batch.global=1024"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_175b_on_1024_gpus_is_planned_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *BIG)
    assert "gpt3-175b: 174,604,836,864 parameters" in text
    assert "vocabulary 50,304" in text
    assert "sequence     2048 tokens" in text
    assert "data         none named: how often it is read and what evaluation takes need data=" in text
    assert "run id       needs data=" in text
    assert "without the time of saving and of evaluation, which needs data=" in text
    assert "reads the corpus" not in text
    assert "no validation split" not in text


def test_its_json_has_the_same_keys_with_null_for_what_is_not_known(
    capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    arguments = ["--json", "model=gpt2-124m", "hardware=H100", "gpus_per_node=8"]
    without = json.loads(planned(capsys, *arguments))
    known = json.loads(planned(capsys, *arguments, f"data={corpus}", "sequence=1024"))
    assert without.keys() == known.keys()
    assert without["data"].keys() == known["data"].keys()
    assert set(without["data"].values()) == {None}
    assert (without["run_id"], without["time"]["evaluation_seconds"]) == (None, None)
    assert without["identity"].keys() == known["identity"].keys()
    for key in ("batch", "deepspeed", "memory", "model", "topology", "schedule"):
        assert without[key] == known[key]
    assert without["time"]["step_seconds"] == known["time"]["step_seconds"]


def test_a_preset_that_takes_its_vocabulary_from_data_asks_for_one_of_the_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["plan", "model=gpt2-nano"]) == 2
    said = capsys.readouterr().err
    assert "gpt2-nano takes the vocabulary of the data's tokenizer, and no data was named" in said
    assert "give data=DIR, or model.vocabulary=N" in said
    assert "vocabulary 512" in planned(capsys, "model=gpt2-nano", "model.vocabulary=512")


def test_a_model_from_a_config_brings_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = planned(capsys, f"model=hf:{tmp_path}")
    assert "vocabulary 500" in text
    assert "sequence     64 tokens" in text


def test_the_search_needs_none_either(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--search", "model=gpt2-1.5b", "hardware=H100", "nodes=1,2", "gpus=8")
    assert "the fastest: nodes=" in text


@pytest.mark.parametrize("arguments", [["run"], ["run", "--dry-run"], ["submit", "--dry-run"], None], ids=str)
def test_whatever_starts_something_needs_data(arguments: list[str] | None, capsys: pytest.CaptureFixture[str]) -> None:
    code = train.main(["model=gpt2-124m"]) if arguments is None else main.main([*arguments, "model=gpt2-124m"])
    assert code == 2
    said = capsys.readouterr().err
    assert "error: data is missing" in said
    assert "halfstep data prepare" in said
