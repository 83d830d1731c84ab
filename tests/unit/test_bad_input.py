"""Wrong requests through the command line: exit code 2, three lines, no traceback, and the right hint in them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher import train
from halfstep.launcher.cli.main import main as cli_main

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    def run(*arguments: str, main: Callable[[list[str]], int] = cli_main) -> str:
        code = main(list(arguments))
        said = capsys.readouterr().err
        assert code == 2
        lines = said.splitlines()
        assert [line.partition(":")[0].strip() for line in lines] == ["error", "from", "try"], said
        assert all(line.partition(":")[2].strip() for line in lines), said
        return said

    return run


@pytest.mark.parametrize(
    ("pairs", "hint"),
    [
        (["optimizer.learning_rate=1"], "optimizer.learning_rate"),
        (["ds.zero_optimization.overlap_com=true"], "zero_optimization.overlap_comm"),
        (["zero=4"], "less than or equal to 3"),
        (["precision=fp8"], "'fp32', 'tf32', 'fp16', 'bf16', 'fp16-autocast' or 'bf16-autocast'"),
        (["offload=cpu", "zero=2"], "only where they are sharded, at ZeRO stage 3"),
        (["batch.global=32", "batch.micro=5"], "batch.micro="),
        (["sequence=200000"], "longer than the corpus"),
        (["model=gpt2-125m"], "gpt2-124m"),
        (["model=hf:/nowhere"], "/nowhere"),
        (["ds.fp16.enabled=auto"], "auto"),
        (["nonsense"], "neither key=value nor a run file"),
        (["fp16.window=0"], "fp16.window=0: input should be greater than or equal to 1"),
        (["fp16.hysteresis=0"], "fp16.hysteresis=0: input should be greater than or equal to 1"),
        (["fp16.initial_scale_power=33"], "less than or equal to 32"),
        (["fp16.min_scale=512", "fp16.initial_scale_power=8"], "fp16.min_scale=512 is above the initial scale, 2^8"),
        (["fp16.scale=128", "fp16.window=100"], "a fixed scale never moves, and fp16.window would move it"),
        (["precision=fp16", "ds.fp16.loss_scale=128"], "fp16.loss_scale is 128 in the DeepSpeed config"),
        (["numerics.max_skips=0"], "greater than or equal to 1"),
        (["numerics.evry=5"], "numerics.every"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_run_key_is_explained(refuse: Refuse, corpus: Path, pairs: list[str], hint: str) -> None:
    for verb in ("run", None):
        main = cli_main if verb else train.main
        assert hint in refuse(*filter(None, [verb, "model=gpt2-nano", f"data={corpus}", *pairs]), main=main)


def test_a_data_folder_that_is_missing_is_told_how_to_make(refuse: Refuse, tmp_path: Path) -> None:
    said = refuse("run", "model=gpt2-nano", f"data={tmp_path / 'none'}")
    assert "there is no data at" in said
    assert "halfstep data prepare" in said


def test_a_file_is_no_corpus_and_is_told_how_to_become_one(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    said = refuse("run", "model=gpt2-nano", f"data={tmp_path / 'text.jsonl'}")
    assert "text.jsonl is a file, not a prepared corpus" in said
    assert f"halfstep data prepare --source {tmp_path / 'text.jsonl'} --out data/text" in said


def test_a_file_of_a_corpus_is_answered_with_its_folder(refuse: Refuse, tmp_path: Path, corpus: Path) -> None:
    said = refuse("run", "model=gpt2-nano", f"data={corpus / 'manifest.json'}")
    assert "manifest.json is a file of a prepared corpus" in said
    assert f"name its folder: data={corpus}" in said
    odd = tmp_path / "my rows.jsonl.gz"
    odd.write_bytes(b"")
    assert f"--source '{odd}' --out 'data/my rows' --vocab-size 4096" in refuse("run", "model=gpt2-nano", f"data={odd}")


def test_corpora_without_weights_are_told_how_to_mix_them(refuse: Refuse, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "other").mkdir()
    said = refuse("run", "model=gpt2-nano", f"data={corpus},{tmp_path / 'other'}")
    assert f"data={corpus}:1,{tmp_path / 'other'}:1 reads as much of each" in said


def test_adapters_alone_are_no_model(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    said = refuse("generate", str(tmp_path), "--prompt", "a", main=cli_main)
    assert "holds adapters alone" in said
    assert "export the run without --adapter" in said


def test_a_data_folder_without_a_manifest_is_half_written(refuse: Refuse, corpus: Path) -> None:
    (corpus / "manifest.json").unlink()
    assert "was not finished" in refuse("run", "model=gpt2-nano", f"data={corpus}")


@pytest.mark.parametrize("name", ["train.bin", "validation.idx"])
def test_a_data_folder_that_was_cut_short_names_the_file(refuse: Refuse, corpus: Path, name: str) -> None:
    file = corpus / name
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{name} has" in refuse("run", "model=gpt2-nano", f"data={corpus}")
    file.unlink()
    assert f"{name} is missing" in refuse("run", "model=gpt2-nano", f"data={corpus}")


def test_a_data_folder_of_another_tokenizer_is_refused(refuse: Refuse, corpus: Path) -> None:
    (corpus / "tokenizer" / "tokenizer.model").write_bytes(b"another one")
    assert "made with another tokenizer" in refuse("run", "model=gpt2-nano", f"data={corpus}")


def test_a_model_with_another_tokenizer_than_the_data_is_refused(refuse: Refuse, corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 128, "vocab_size": 5000}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    assert "another tokenizer than the model's own" in refuse("run", f"model=hf:{model}", f"data={corpus}")


@pytest.mark.parametrize(
    "content", ["", "{", '{"kind": "other", "format": 9}', '{"kind": "halfstep-data", "format": 1}']
)
def test_a_damaged_manifest_is_named(refuse: Refuse, corpus: Path, content: str) -> None:
    (corpus / "manifest.json").write_text(content)
    assert "manifest" in refuse("run", "model=gpt2-nano", f"data={corpus}")


def test_a_syntax_error_in_a_run_file_gives_its_line(refuse: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "gpt2-nano"\n\nzero = \n')
    assert "line 3" in refuse("run", str(file))


def test_an_out_of_a_different_run_is_refused_before_anything_starts(
    refuse: Refuse, corpus: Path, tmp_path: Path
) -> None:
    from halfstep.launcher import topology
    from halfstep.launcher.config.load import load
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve
    from halfstep.launcher.rundir import run_directory

    request = load(["model=gpt2-nano", f"data={corpus}", "seed=7"])
    world = topology.describe(2, 2)
    run_directory.write_plan(tmp_path / "out", request, resolve(request, world, facts.read(request.spec)))
    said = refuse("run", "model=gpt2-nano", f"data={corpus}", f"out={tmp_path / 'out'}")
    assert "seed was 7 and is now 0" in said


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    text = tmp_path / "small.txt"
    text.write_text("one two three\n" * 50)
    said = refuse("data", "prepare", "--source", str(text), "--out", str(tmp_path / "out"), "--vocab-size", "30000")
    assert "30000" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "hints"),
    [
        ("empty.txt", b"", ["empty"]),
        ("bad.txt", b"good text\n" * 100 + b"\xff\xfe more", ["bad.txt", "1000"]),
        ("rows.jsonl", b'{"text": "fine"}\n{"body": "no"}\n', ["rows.jsonl", "2", "text"]),
        ("cut.jsonl", b'{"text": "fine"}\n{"text": \n', ["cut.jsonl", "2"]),
    ],
)
def test_text_that_cannot_be_used_is_named_with_its_place(
    refuse: Refuse, tmp_path: Path, name: str, content: bytes, hints: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    said = refuse(
        "data", "prepare", "--source", str(tmp_path / name), "--out", str(tmp_path / "out"), "--vocab-size", "300"
    )
    assert all(hint in said for hint in hints), said
    assert not (tmp_path / "out").exists()


def test_an_unknown_verb_or_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["doctor", "--jsno"], ["run", "--wiht", "torchrun"]):
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(cli_main(arguments))
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err
