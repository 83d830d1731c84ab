"""Exports: transformers loads them, computes what the model computed and reads text as the corpus was read."""

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import judges, saved
from fakes.examples import drawn, write_examples
from fakes.experts import ROUTED
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from halfstep.launcher.checkpoint.manifest import read
from halfstep.launcher.checkpoint.shards import Shards, probe_tokens
from halfstep.launcher.cli.main import main
from halfstep.launcher.config.load import load
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.data import chat, train_tokenizer
from halfstep.launcher.data import prepare as data_prepare
from halfstep.launcher.data import tokenizer as data_tokenizer
from halfstep.launcher.data.tokenizer import SentencePiece
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.export import convert as convert_page
from halfstep.launcher.export import evaluate as evaluate_page
from halfstep.launcher.export import generate as generate_page
from halfstep.launcher.export import judged as judged_page
from halfstep.launcher.export import tokenizer_files as tokenizer_page
from halfstep.launcher.export import weights
from halfstep.launcher.export import write_export as write_page
from halfstep.launcher.export.compare import TOLERANCE
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir.run_directory import write_plan
from halfstep.launcher.topology import Topology
from halfstep.models.network import build

STDLIB = Path(os.__file__).parent
SEQUENCE = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    source = folder / "text"
    source.mkdir()
    for name in ("json/encoder.py", "json/decoder.py", "random.py", "textwrap.py"):
        (source / Path(name).with_suffix(".txt").name).write_text((STDLIB / name).read_text())
    out = folder / "corpus"
    data_prepare.prepare(str(source), out, vocab_size=512, validation=0.1, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def sentencepiece(corpus: Path) -> SentencePiece:
    return SentencePiece((corpus / "tokenizer" / "tokenizer.model").read_bytes())


class Trained:
    """A run with one checkpoint, and the model that it is of."""

    def __init__(
        self, home: Path, corpus: Path, pairs: list[str], ranks: int, precision: str = "fp32", sequence: int = SEQUENCE
    ) -> None:
        self.run, self.sequence = home / "run", sequence
        pairs = [*pairs, f"data={corpus}", f"sequence={sequence}", f"precision={precision}"]
        request = load([*pairs, "eval.sequences=5", "batch.global=12"])
        world = Topology(world_size=ranks, ranks_per_node=ranks, accelerator="cpu")
        self.plan = resolve(request, world, facts.read(request.spec))
        write_plan(self.run, request, self.plan)
        saved.rows(self.run / "metrics.jsonl", 20)
        self.model = build(self.plan.model.config, seed=3).eval()
        named = dict(self.model.named_parameters())
        self.parameters = {
            name: parameter.detach().numpy() for name, parameter in named.items() if parameter.requires_grad
        }
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - named.keys()
        state = self.model.state_dict().items()
        self.buffers = {name: tensor.numpy() for name, tensor in state if name not in {*self.parameters, *tied}}
        tokens = probe_tokens(sequence, self.plan.model.vocabulary)
        with torch.no_grad():
            self.logits = self.in_precision(precision)(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
        self.corpus = corpus
        self.save(10, ranks, precision)

    def in_precision(self, precision: str) -> Any:
        if precision == "fp32":
            return self.model
        return build(self.plan.model.config, seed=3, dtype=weights.DTYPES[precision]).eval()

    def save(self, step: int, ranks: int, precision: str = "fp32", **more: Any) -> Path:
        return saved.save(
            self.run,
            self.parameters,
            step=step,
            bounds=saved.even(self.parameters, ranks),
            config=self.plan.model.config,
            logits=more.pop("logits", self.logits),
            buffers=more.pop("buffers", [self.buffers, *[{}] * (ranks - 1)]),
            sequence=self.sequence,
            precision=precision,
            identity=self.plan.identity,
            data={"path": str(self.corpus), "digest": read_data(str(self.corpus)).digest},
            **more,
        )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("gpt2"), corpus, ["model=gpt2-nano"], 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Trained:
    """An untied one: its head is a parameter of its own."""
    home = tmp_path_factory.mktemp("llama")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 64}
    config |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
    (home / "config.json").write_text(json.dumps(config))
    return Trained(home, corpus, [f"model=hf:{home}"], 3)


@pytest.fixture(scope="module")
def exported(gpt2: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_page.export(gpt2.run, folder, step=10)
    return folder


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_an_export_computes_exactly_what_the_model_computed(
    which: str,
    max_shard_bytes: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_CHUNK_ELEMENTS", 1000)  # so that parameters come in several
    trained: Trained = request.getfixturevalue(which)
    done = write_page.export(trained.run, tmp_path / "out", step=10, max_shard_bytes=max_shard_bytes)
    assert done.compare is not None
    assert (done.compare["ok"], done.compare["largest_difference"]) == (True, 0.0)
    files = [name for name in done.files if name.endswith(".safetensors")]
    assert ("model.safetensors.index.json" in done.files) == (len(files) > 1) == (max_shard_bytes < 10**9)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    tied = which == "gpt2"
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    tokens = torch.randint(0, 512, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=tokens).logits, trained.model(input_ids=tokens).logits)


def test_tied_weights_are_written_once_and_no_optimizer_states(exported: Path, gpt2: Trained) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(exported / "model.safetensors")
    assert set(tensors) == set(gpt2.parameters)
    assert "lm_head.weight" not in tensors
    # Named there, a Llama that is trained further would never train the token that ends a document.
    assert json.loads((exported / "config.json").read_text()).get("pad_token_id") is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_weights_are_the_masters_rounded_to_the_dtype_asked_for(dtype: str, llama: Trained, tmp_path: Path) -> None:
    done = write_page.export(llama.run, tmp_path / "out", dtype=dtype)
    assert done.compare is not None
    assert done.compare["ok"]
    assert done.compare["largest_difference"] == 0
    assert 0 < done.compare["rounding"] < TOLERANCE[dtype] * done.compare["largest_logit"]
    assert f"to the bit (largest {done.compare['largest_logit']:.3g}); rounding the weights moves" in done.sentence
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == weights.DTYPES[dtype]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(llama.parameters[name]).to(weights.DTYPES[dtype]))


def test_a_16_bit_run_is_compared_in_its_own_precision(tmp_path: Path, corpus: Path) -> None:
    trained = Trained(tmp_path, corpus, ["model=llama-nano"], 2, "bf16")
    done = write_page.export(trained.run, tmp_path / "out")
    assert done.compare is not None
    assert (done.compare["precision"], done.compare["largest_difference"]) == ("bf16", 0.0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_value_that_fp16_cannot_hold_is_refused(gpt2: Trained, tmp_path: Path) -> None:
    broken = {**gpt2.parameters, "transformer.ln_f.bias": gpt2.parameters["transformer.ln_f.bias"] + 1e5}
    saved.save(tmp_path / "run", broken, config=gpt2.plan.model.config, data={"path": "/nowhere", "digest": "0"})
    with pytest.raises(RefusedError, match=r"transformer.ln_f.bias has values beyond fp16's 65504"):
        write_page.export(tmp_path / "run", tmp_path / "out", dtype="fp16")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]


def test_an_export_that_computes_something_else_never_appears(gpt2: Trained, tmp_path: Path) -> None:
    gpt2.save(11, 2, logits=gpt2.logits + 0.01)
    with pytest.raises(RefusedError, match="the export computes something else than the training engine did"):
        write_page.export(gpt2.run, tmp_path / "out", step=11)
    assert list(tmp_path.iterdir()) == []
    done = write_page.export(gpt2.run, tmp_path / "out", step=11, comparing=False)
    assert done.compare is None


def test_logits_that_are_not_finite_are_said_not_judged(gpt2: Trained, tmp_path: Path) -> None:
    gpt2.save(12, 2, logits=np.where(gpt2.logits > 0, np.nan, gpt2.logits))
    done = write_page.export(gpt2.run, tmp_path / "out", step=12)
    assert done.compare is not None
    assert done.compare["ok"] is None
    assert "not finite" in (done.sentence or "")
    json.loads((tmp_path / "out" / "halfstep.json").read_text(), parse_constant=pytest.fail)


def test_the_configuration_generates_with_a_cache(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert (config.get("use_cache"), config["architectures"]) == (True, ["GPT2LMHeadModel"])


def test_the_note_says_what_the_export_is(exported: Path, gpt2: Trained) -> None:
    note = json.loads((exported / "halfstep.json").read_text())
    assert (note["step"], note["loss"], note["dtype"], note["sequence"]) == (10, 4.9, "fp32", SEQUENCE)
    assert note["evaluation_sequences"] == 5
    assert note["data"]["digest"] == gpt2.plan.data.digest
    assert note["compare"]["largest_difference"] == 0
    assert note["tokenizer"]["differs"] is None


# --- what is refused


def test_a_damaged_checkpoint_is_named_and_an_older_one_proposed(llama: Trained, tmp_path: Path) -> None:
    folder = llama.save(20, 3)
    saved.flip(folder / "rank-00001.safetensors")
    with pytest.raises(RequestError) as error:
        write_page.export(llama.run, tmp_path / "out")
    assert error.value.what == (
        "the checkpoint of step 20 is damaged: rank-00001.safetensors is not what was written: its hash differs"
    )
    assert error.value.fix == f"halfstep checkpoint export {llama.run} --to {tmp_path / 'out'} --step 10"
    assert list(tmp_path.iterdir()) == []
    saved.flip(folder / "rank-00001.safetensors")


def test_a_target_that_holds_something_is_left_alone(gpt2: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(RequestError, match="exists and is not empty"):
        write_page.export(gpt2.run, tmp_path)
    with pytest.raises(RequestError, match="exists"):
        write_page.export(gpt2.run, tmp_path / "mine")
    assert [item.name for item in tmp_path.iterdir()] == ["mine"]


def test_a_step_that_is_not_there_is_answered_with_those_that_are(gpt2: Trained, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no checkpoint of step 999") as error:
        write_page.export(gpt2.run, tmp_path / "out", step=999)
    assert error.value.fix.startswith("take one of ")


def test_another_model_than_was_trained_is_refused(gpt2: Trained, tmp_path: Path) -> None:
    config = {**gpt2.plan.model.config, "n_layer": 3}
    saved.save(tmp_path / "run", gpt2.parameters, config=config)
    with pytest.raises(RefusedError, match=r"builds another model than was trained: 12 parameters differ"):
        write_page.export(tmp_path / "run", tmp_path / "out")
    saved.save(tmp_path / "run", gpt2.parameters, step=11, config={"model_type": "house"})
    with pytest.raises(RequestError, match="transformers knows no model_type 'house'"):
        write_page.export(tmp_path / "run", tmp_path / "out")


DEEPSEEK = {
    **ROUTED,
    "vocab_size": 512,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Trained:
    home = tmp_path_factory.mktemp("deepseek")
    (home / "config.json").write_text(json.dumps(DEEPSEEK))
    return Trained(home, corpus, [f"model=hf:{home}"], 2)


def with_bias(trained: Trained, bias: list[float]) -> np.ndarray:
    """Return the logits of a model whose router has a bias, and set it in what is saved next."""
    value = torch.tensor(bias)
    trained.model.get_buffer(BIAS).copy_(value)
    trained.buffers[BIAS] = value.numpy()
    with torch.no_grad():
        return trained.model(input_ids=torch.tensor([probe_tokens(SEQUENCE, 512)])).logits[0].numpy()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_routers_bias_is_exported_with_every_bit(deepseek: Trained, tmp_path: Path, dtype: str) -> None:
    step = {"fp32": 20, "bf16": 30, "fp16": 40}[dtype]
    deepseek.save(step, 2, logits=with_bias(deepseek, [0.1001, -0.1002, 0.1003, 0.0]))
    done = write_page.export(deepseek.run, tmp_path / "out", step=step, dtype=dtype)
    assert done.compare is not None
    assert (done.compare["ok"], done.compare["largest_difference"]) == (True, 0.0)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.get_buffer(BIAS), torch.tensor([0.1001, -0.1002, 0.1003, 0.0]))


def test_a_checkpoint_of_before_buffers_were_kept_says_how_to_get_one(deepseek: Trained, tmp_path: Path) -> None:
    deepseek.save(21, 2, buffers=None)
    with pytest.raises(
        RefusedError, match=f"before buffers and frozen parameters were kept, and lacks {BIAS}"
    ) as error:
        write_page.export(deepseek.run, tmp_path / "out", step=21)
    assert error.value.fix == "resume the run for some steps: the checkpoint that it writes now has them"


def test_frozen_parameters_are_exported_and_are_no_other_model(tmp_path: Path, corpus: Path) -> None:
    config = {"model_type": "roformer", "vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64, "is_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = Trained(tmp_path, corpus, [f"model=hf:{tmp_path}"], 2)
    assert list(trained.buffers) == ["roformer.encoder.embed_positions.weight"]
    for dtype in ("bf16", "fp32"):
        done = write_page.export(trained.run, tmp_path / dtype, step=10, dtype=dtype)
        assert done.compare is not None
        assert done.compare["largest_difference"] == 0
    assert (tmp_path / "fp32" / "tokenizer.json").is_file()


@pytest.mark.parametrize("flipped", [1, 7, 8, 16])
def test_a_router_that_chose_otherwise_at_some_tokens_is_told_and_not_refused(
    deepseek: Trained, tmp_path: Path, flipped: int
) -> None:
    logits = with_bias(deepseek, [0.0] * 4)
    logits[16 - flipped :] += 0.3 * np.abs(logits).max()
    deepseek.save(100 + flipped, 2, logits=logits)
    if flipped >= 8:
        with pytest.raises(RefusedError, match="the export computes something else"):
            write_page.export(deepseek.run, tmp_path / "out", step=100 + flipped)
        return
    done = write_page.export(deepseek.run, tmp_path / "out", step=100 + flipped)
    assert done.compare is not None
    assert (done.compare["ok"], done.compare["flipped"]) == (True, flipped)
    assert f"at {flipped} of 16 tokens a router chose otherwise" in (done.sentence or "")


def test_one_token_that_is_off_is_one_too_many_without_a_router(gpt2: Trained, tmp_path: Path) -> None:
    logits = gpt2.logits.copy()
    logits[3] += 0.3 * np.abs(logits).max()
    gpt2.save(13, 2, logits=logits)
    with pytest.raises(RefusedError, match="the export computes something else"):
        write_page.export(gpt2.run, tmp_path / "out", step=13)


def test_lossy_weights_are_compared_with_the_masters_bit_by_bit(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = weights._converted

    def wrong(values: np.ndarray, entry: weights.Entry) -> memoryview:
        return exact(values * (1.01 if entry.name == "model.layers.1.mlp.up_proj.weight" else 1), entry)

    monkeypatch.setattr(weights, "_converted", wrong)
    with pytest.raises(
        RefusedError, match=r"model.layers.1.mlp.up_proj.weight in the export is not what was trained, r"
    ):
        write_page.export(llama.run, tmp_path / "out", step=10, dtype="bf16")
    assert list(tmp_path.iterdir()) == []


def test_buffers_travel_with_a_conversion(deepseek: Trained, tmp_path: Path) -> None:
    ranks = [{**deepseek.buffers, BIAS: np.array([1, 2, 3, 4], dtype=np.float32)}]
    ranks.append({BIAS: np.array([5, 6, 7, 8], dtype=np.float32)})  # of rank 1, which has another
    deepseek.save(50, 2, buffers=ranks)
    for count, own in ((1, 1.0), (2, 5.0), (3, 1.0)):
        done = convert_page.convert(deepseek.run, tmp_path / str(count), step=50, ranks=count)
        files = Shards(done.folder, read(done.folder))
        assert files.buffer(BIAS).tolist() == [1, 2, 3, 4]
        assert files.buffer(BIAS, count - 1)[0] == own
        assert files.manifest.model["buffers"][BIAS] == {"shape": [4], "dtype": "float32"}


# --- code of its own


@pytest.fixture
def with_code(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export that brings code: for the model, the configuration and the tokenizer."""
    import shutil

    folder = tmp_path / "with code"
    shutil.copytree(exported, folder)
    (folder / "own.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n1 / 0\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModel": "own.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.T", "own.T"]}),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "auto_map": classes}))

    def never(*_: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_an_export_with_code_of_its_own_is_used_without_it(with_code: Path, corpus: Path, tmp_path: Path) -> None:
    assert generate_page.generate(with_code, "def ", max_new_tokens=2).new_tokens > 0
    assert evaluate_page.evaluate(with_code, str(corpus), sequences=1).sequences == 1
    assert not list(tmp_path.rglob("ran"))


def test_an_export_that_needs_its_own_code_is_refused_without_a_question(
    with_code: Path, corpus: Path, tmp_path: Path
) -> None:
    own = json.loads((with_code / "tokenizer_config.json").read_text())
    (with_code / "tokenizer_config.json").write_text(json.dumps({**own, "tokenizer_class": "OwnTokenizer"}))
    assert generate_page.generate(with_code, "def ", max_new_tokens=2).new_tokens > 0, "tokenizer.json is enough"
    (with_code / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"brings Python code of its own|tokenizer cannot be loaded"):
        generate_page.generate(with_code, "def ", max_new_tokens=2)
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(
        RequestError, match=r"brings Python code of its own \(auto_map in config.json\), which is never"
    ):
        evaluate_page.evaluate(with_code, str(corpus), sequences=1)
    assert not list(tmp_path.rglob("ran"))


def test_an_export_names_no_code_that_is_not_in_it(tmp_path: Path, corpus: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 512, "n_positions": 64}
    config["auto_map"] = {"AutoModelForCausalLM": "elsewhere.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = Trained(tmp_path, corpus, [f"model=hf:{tmp_path}"], 1)
    write_page.export(trained.run, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- tokenizer


def test_the_exported_tokenizer_gives_sentencepieces_own_ids(
    exported: Path, sentencepiece: SentencePiece, gpt2: Trained
) -> None:
    theirs = AutoTokenizer.from_pretrained(exported)
    text = (STDLIB / "argparse.py").read_text()
    for sample in (*tokenizer_page.SAMPLES, text):
        ids = sentencepiece.encode(sample)
        assert theirs(sample, verbose=False)["input_ids"] == ids
        assert theirs.decode(ids) == sample
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", sentencepiece.end_of_text)
    assert theirs.bos_token_id == theirs.pad_token_id == theirs.eos_token_id
    assert theirs.model_max_length == 128
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sentencepiece.end_of_text


@settings(max_examples=300)
@given(text=st.text() | st.text(alphabet=" \t\n\r\u2581abe(=_<0x41>"))
def test_any_text_gets_the_same_ids(sentencepiece: SentencePiece, text: str) -> None:
    theirs, _ = tokenizer_page.from_sentencepiece(sentencepiece.model)
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == sentencepiece.encode(text)
    assert theirs.decode(ids) == text


def test_a_tokenizer_that_differs_is_found() -> None:
    text = (STDLIB / "random.py").read_text()
    first, other = train_tokenizer.train([text], 400), train_tokenizer.train([text], 401)

    class Other:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": other.encode(text)}

        def decode(self, ids: list[int], **_: Any) -> str:
            return other.decode(ids)

    checked, differs = tokenizer_page.compare(first, Other(), [text])
    assert checked > 1000
    assert differs is not None


def test_a_hugging_face_tokenizer_is_copied(tmp_path: Path, exported: Path, gpt2: Trained) -> None:
    source = tmp_path / "text.txt"
    source.write_text((STDLIB / "textwrap.py").read_text() * 5)
    corpus = tmp_path / "corpus"
    data_prepare.prepare(str(source), corpus, tokenizer=str(exported), validation=0.1, workers=1, progress=False)
    trained = Trained(tmp_path, corpus, ["model=gpt2-nano"], 1)
    done = write_page.export(trained.run, tmp_path / "out")
    assert done.tokenizer is not None
    assert (done.tokenizer["kind"], done.tokenizer["differs"], done.warnings) == ("huggingface", None, ())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("  x = 1\n")["input_ids"]
    # The same vocabulary in other files: evaluating one model on the other's corpus is no mistake.
    assert generate_page.generate(tmp_path / "out", "def f(", max_new_tokens=2).new_tokens > 0


CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "import json\n\nand random?"},
]


@pytest.fixture(scope="module")
def with_markers(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tokenizer of transformers that has ChatML's control tokens, and an older template of its own."""
    folder = tmp_path_factory.mktemp("markers") / "tokenizer"
    library: Any = AutoTokenizer.from_pretrained(exported)
    library.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    library.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    library.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_examples(
    corpus: Path, with_markers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], Path]:
    """Return a function that exports a model of examples in a layout, with ChatML's control tokens or without."""
    home = tmp_path_factory.mktemp("examples")
    rows = [{"messages": [*CHAT, {"role": "assistant", "content": f"yes, {number}"}]} for number in range(40)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @functools.cache
    def export(template: str, markers: bool) -> Path:
        folder = home / f"{template}-{markers}"
        data_prepare.prepare(
            str(home / "rows.jsonl"),
            folder / "corpus",
            format="sft",
            template=template,
            tokenizer=str(with_markers if markers else corpus),
            validation=0.1,
            workers=1,
            progress=False,
        )
        trained = Trained(folder, folder / "corpus", ["model=gpt2-nano", "too_long=cut"], 1, sequence=128)
        done = write_page.export(trained.run, folder / "export")
        assert (done.template, done.warnings) == (template, ())
        return folder / "export"

    return export


@pytest.mark.parametrize("markers", [False, True], ids=["sentencepiece", "control tokens"])
@pytest.mark.parametrize("template", ["chatml", "alpaca", "plain"])
def test_an_export_asks_as_its_examples_did(
    template: str, markers: bool, of_examples: Callable[[str, bool], Path]
) -> None:
    folder = of_examples(template, markers)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    home = folder.parent / "corpus" / "tokenizer"
    own = chat.named(template, data_tokenizer.load(home, "huggingface" if markers else "sentencepiece"))
    for messages in (CHAT[:1], CHAT) if template != "plain" else (CHAT[:1],):
        made = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert made["input_ids"] == own.prompt(messages)
    whole = theirs.apply_chat_template(CHAT[:2], tokenize=False)
    shorter, asked = (
        theirs.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=asks) for asks in (0, 1)
    )
    assert whole.startswith(asked)
    assert asked.startswith(shorter)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends if isinstance(ends, list) else [ends]) == sorted(own.stops)
    assert len(own.stops) == (2 if template == "chatml" and markers else 1)
    if template != "chatml":
        with pytest.raises(Exception, match="no place for the role tool"):
            theirs.apply_chat_template([*CHAT, {"role": "tool", "content": "x"}], tokenize=False)


def test_an_alpaca_export_takes_a_system_message_for_its_task(of_examples: Callable[[str, bool], Path]) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(of_examples("alpaca", False))
    system = {"role": "system", "content": "Count."}
    text = theirs.apply_chat_template([system, *CHAT[:1]], tokenize=False, add_generation_prompt=True)
    assert text == "Count.\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\n"
    with pytest.raises(Exception, match="no place for the role system"):
        theirs.apply_chat_template([*CHAT, system], tokenize=False)


def test_an_export_keeps_the_template_that_its_tokenizer_had(
    of_examples: Callable[[str, bool], Path], with_markers: Path
) -> None:
    folder = of_examples("tokenizer", True)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == AutoTokenizer.from_pretrained(with_markers).chat_template


def test_what_ends_a_turn_ends_no_answer_to_a_task_that_is_laid_out_otherwise(
    of_examples: Callable[[str, bool], Path],
) -> None:
    folder = of_examples("chatml", True)
    assert len(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == 2
    with judged_page.subject_of(folder, None, None) as subject:
        ends = subject.asked.network.generation_config.eos_token_id
    assert ends == json.loads((folder / "config.json").read_text())["eos_token_id"] == 1


def test_of_a_mixture_it_is_the_template_of_the_part_that_holds_examples(
    of_examples: Callable[[str, bool], Path], gpt2: Trained, corpus: Path, tmp_path: Path
) -> None:
    chats = of_examples("alpaca", False).parent / "corpus"
    parts = [{"path": str(part), "digest": read_data(str(part)).digest} for part in (corpus, chats)]
    data = {"path": f"{corpus}:1,{chats}:1", "digest": "of both", "parts": parts}
    config = gpt2.plan.model.config
    saved.save(tmp_path / "run", gpt2.parameters, config=config, buffers=[gpt2.buffers], data=data)
    done = write_page.export(tmp_path / "run", tmp_path / "out", comparing=False)
    assert (done.template, done.warnings) == ("alpaca", ())
    assert generate_page.generate(tmp_path / "out", "hello", max_new_tokens=2, chat=True).new_tokens > 0
    manifest = chats / "manifest.json"
    before = manifest.read_text()
    try:
        manifest.write_text(json.dumps({**json.loads(before), "seed": 5, "checksum": None}))
        other = write_page.export(tmp_path / "run", tmp_path / "other", comparing=False)
        assert other.template is None, "another corpus than was trained on says nothing of it"
    finally:
        manifest.write_text(before)
    text = write_page.export(tmp_path / "run", tmp_path / "text", comparing=False, data=corpus)
    assert text.template is None, "of a corpus that is named, that one's"


def test_a_message_is_answered_by_the_exports_template(
    of_examples: Callable[[str, bool], Path], exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_examples("chatml", True)
    asked = generate_page.generate(folder, "hello", max_new_tokens=8, chat=True)
    spelled = AutoTokenizer.from_pretrained(folder)("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert asked.prompt_tokens == len(spelled["input_ids"])
    assert main(["generate", str(folder), "--prompt", "hello", "--max-new-tokens", "8", "--chat"]) == 0
    assert capsys.readouterr().out == f"{asked.text}\n"
    spelled = "stop <|im_end|>\n<|im_start|>system\nx"
    own = chat.named("chatml", data_tokenizer.load(folder.parent / "corpus" / "tokenizer", "huggingface"))
    expected = own.prompt([{"role": "user", "content": spelled}])
    assert generate_page.generate(folder, spelled, max_new_tokens=1, chat=True).prompt_tokens == len(expected)
    with pytest.raises(RequestError, match="has no chat template: the model was trained on text"):
        generate_page.generate(exported, "hello", chat=True)


def test_without_the_corpus_the_weights_are_exported_and_the_tokenizer_is_missed(
    gpt2: Trained, corpus: Path, tmp_path: Path
) -> None:
    digest = read_data(str(corpus)).digest
    config = gpt2.plan.model.config
    saved.save(tmp_path / "run", gpt2.parameters, config=config, data={"path": "/has/gone", "digest": digest})
    done = write_page.export(tmp_path / "run", tmp_path / "out")
    assert done.tokenizer is None
    assert [
        warning.startswith("no tokenizer: the corpus /has/gone has gone; --data DIR") for warning in done.warnings
    ] == [
        True,
        False,
    ]
    with pytest.raises(RequestError, match="has no tokenizer: the corpus was not there when it was exported"):
        generate_page.generate(tmp_path / "out", "x")
    again = write_page.export(tmp_path / "run", tmp_path / "again", data=corpus)
    assert again.tokenizer is not None
    saved.save(tmp_path / "run", gpt2.parameters, step=11, config=config, data={"path": str(corpus), "digest": "f"})
    with pytest.raises(RequestError, match="holds another corpus than the run was trained on"):
        write_page.export(tmp_path / "run", tmp_path / "third", data=corpus)


# --- use


def test_generation_is_greedy_repeatable_and_drawn_when_asked(exported: Path) -> None:
    greedy = generate_page.generate(exported, "def ", max_new_tokens=12)
    assert greedy == generate_page.generate(exported, "def ", max_new_tokens=12, seed=7)
    assert greedy.new_tokens == 12 or greedy.stopped == "end of text"
    drawn = [
        generate_page.generate(exported, "def ", max_new_tokens=12, temperature=1.0, top_k=top_k, seed=seed).text
        for top_k, seed in ((0, 1), (0, 1), (0, 2), (1, 3))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == greedy.text


def test_an_empty_prompt_begins_a_document(exported: Path) -> None:
    assert generate_page.generate(exported, "", max_new_tokens=2).prompt_tokens == 1


def test_a_prompt_that_fills_the_context_is_refused_and_one_that_leaves_some_is_cut(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match="the prompt has 200 tokens and the model looks at 128 at most"):
        generate_page.generate(exported, "\n" * 200)
    done = generate_page.generate(exported, "\n" * 120, max_new_tokens=50)
    assert done.new_tokens <= 8
    assert "leaves room for 8 new ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"top_k": 5}, "without a temperature"),
        ({"temperature": -1.0}, "a temperature is 0"),
        ({"temperature": float("nan")}, "a temperature is 0"),
        ({"top_k": -1, "temperature": 1.0}, "that many tokens"),
        ({"max_new_tokens": 0}, "that many new tokens"),
    ],
)
def test_settings_that_mean_nothing_are_refused(exported: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        generate_page.generate(exported, "x", **settings)


def test_a_run_directory_is_answered_with_the_command_that_exports_it(gpt2: Trained) -> None:
    with pytest.raises(RequestError, match="is a run directory, not an exported model") as error:
        generate_page.generate(gpt2.run, "x")
    assert f"halfstep checkpoint export {gpt2.run} --to {gpt2.run}-export" in error.value.fix


def test_evaluation_reads_the_windows_that_training_reads(exported: Path, gpt2: Trained, corpus: Path) -> None:
    from halfstep.launcher.data.tokens import TokenFile
    from halfstep.models.loss import next_token_loss

    tokens = TokenFile(corpus / "validation").batch(range(5), SEQUENCE)
    with torch.no_grad():
        expected = float(next_token_loss(gpt2.model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]))
    done = evaluate_page.evaluate(exported, str(corpus), batch=2)
    assert done.loss == pytest.approx(expected, rel=1e-6)
    assert (done.tokens, done.sequences, done.sequence, done.tokenizer) == (5 * SEQUENCE, 5, SEQUENCE, "same")
    assert done.perplexity == pytest.approx(np.exp(expected), rel=1e-6)
    assert evaluate_page.evaluate(exported, str(corpus), dtype="bf16").loss != done.loss
    everything = evaluate_page.evaluate(exported, str(corpus), sequences=0, batch=64, sequence=64)
    assert everything.sequences == (read_data(str(corpus)).validation_tokens - 1) // 64


def test_evaluation_of_examples_reads_the_targets_of_each_by_itself(
    exported: Path, gpt2: Trained, corpus: Path, tmp_path: Path
) -> None:
    given = drawn([5, 30, 12, 9, 9], 3)
    vocabulary = gpt2.model.config.vocab_size
    folder = write_examples(tmp_path / "examples", drawn([9], 2), given, vocabulary, corpus / "tokenizer")
    total, count = 0.0, 0
    for ids, marks in given:
        with torch.no_grad():
            logits = gpt2.model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        targets = [token if mark else -100 for token, mark in zip(ids[1:], marks[1:], strict=True)]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
        count += sum(marks[1:])
    done = evaluate_page.evaluate(exported, str(folder), sequence=32, batch=2)
    assert done.loss == pytest.approx(total / count, rel=1e-6)
    assert (done.tokens, done.sequences, done.tokenizer) == (count, 5, "same")
    beyond = write_examples(tmp_path / "beyond", drawn([9], 2), drawn([4, 5, 150], 3), vocabulary, corpus / "tokenizer")
    with pytest.raises(RequestError, match="1 validation examples are longer") as refused:
        evaluate_page.evaluate(exported, str(beyond), sequence=128)
    assert refused.value.fix == "prepare the corpus without them", "the model looks at no more"
    for too_long, sequences in (("cut", 3), ("drop", 2)):
        other = tmp_path / too_long
        shutil.copytree(exported, other)
        (other / "halfstep.json").write_text(
            json.dumps(json.loads((exported / "halfstep.json").read_text()) | {"too_long": too_long})
        )
        assert evaluate_page.evaluate(other, str(beyond), sequence=128).sequences == sequences
    long = write_examples(tmp_path / "long", drawn([9], 2), drawn([130, 150], 3), vocabulary, corpus / "tokenizer")
    for length, fix in ((128, "prepare a corpus with shorter ones"), (64, "a longer --sequence")):
        with pytest.raises(
            RequestError, match=f"all validation examples are longer than the sequence of {length} "
        ) as refused:
            evaluate_page.evaluate(tmp_path / "drop", str(long), sequence=length)
        assert refused.value.fix == fix
    with pytest.raises(RequestError, match="one corpus is measured at a time") as refused:
        evaluate_page.evaluate(exported, f"{corpus}:1,{folder}:1")
    assert refused.value.fix == f"--data {corpus}, and the others one after the other"
    with pytest.raises(RequestError, match="examples are always read each by itself"):
        evaluate_page.evaluate(exported, str(folder), sequence=32, documents="plain")
    with pytest.raises(
        RequestError, match="1 validation examples are longer than the sequence of 16 tokens"
    ) as refused:
        evaluate_page.evaluate(exported, str(folder), sequence=16)
    assert refused.value.fix == "--sequence 30, or prepare the corpus without them"


@pytest.fixture(scope="module")
def short_documents(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare documents of which several meet in a sequence."""
    folder = tmp_path_factory.mktemp("short")
    lines = [line.strip() for line in (STDLIB / "random.py").read_text().splitlines() if line.strip()]
    source = folder / "lines.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    out = folder / "corpus"
    data_prepare.prepare(str(source), out, tokenizer=str(corpus), validation=0.2, workers=1, progress=False)
    return out


def test_evaluation_reads_documents_as_the_run_did(
    exported: Path, gpt2: Trained, short_documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfstep.launcher.data.tokens import TokenFile

    file = TokenFile(short_documents / "validation")
    total, count = 0.0, 0
    for row, begun in zip(file.batch(range(5), SEQUENCE), file.document_starts(range(5), SEQUENCE), strict=True):
        places = begun[1:].nonzero()[:, 0] + 1
        for document in torch.tensor_split(row, places.tolist()):
            if len(document) > 1:
                with torch.no_grad():
                    logits = gpt2.model(input_ids=document[None, :-1]).logits[0]
                total += float(torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum"))
                count += len(document) - 1
    assert 0 < count < 5 * SEQUENCE
    plain = evaluate_page.evaluate(exported, str(short_documents), batch=2)
    apart = evaluate_page.evaluate(exported, str(short_documents), batch=2, documents="masked")
    assert (plain.documents, plain.tokens) == ("plain", 5 * SEQUENCE)
    assert (apart.documents, apart.tokens) == ("masked", count)
    assert apart.loss == pytest.approx(total / count, rel=1e-6) != plain.loss

    trained_so = tmp_path / "masked"
    shutil.copytree(exported, trained_so)
    note = json.loads((trained_so / "halfstep.json").read_text())
    assert note["documents"] == "plain"
    (trained_so / "halfstep.json").write_text(json.dumps(note | {"documents": "masked"}))
    assert main(["eval", str(trained_so), "--data", str(short_documents), "--batch", "2"]) == 0
    assert f"{count:,} tokens: 5 sequences of 32, documents apart" in capsys.readouterr().out
    assert main(["eval", str(trained_so), "--data", str(short_documents), "--documents", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 5 * SEQUENCE


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "it takes no positions"),
        ("biogpt", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "a change of the first one"),
    ],
)
def test_a_model_that_does_not_keep_documents_apart_is_not_evaluated_so(
    family: str, sizes: dict[str, int], reason: str, corpus: Path, short_documents: Path, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, vocab_size=512, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(RequestError, match=f"the model does not keep documents apart: {reason}") as error:
        evaluate_page.evaluate(tmp_path / "model", str(short_documents), documents="masked", sequence=32)
    assert error.value.fix == "--documents plain"


def test_a_corpus_of_another_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text((STDLIB / "random.py").read_text())
    other = tmp_path / "other"
    data_prepare.prepare(str(source), other, vocab_size=400, validation=0.1, workers=1, progress=False)
    with pytest.raises(RequestError, match=r"the corpus was made with another tokenizer \(400 tokens") as error:
        evaluate_page.evaluate(exported, str(other))
    assert error.value.fix == f"prepare the corpus again with --tokenizer {exported}"


def test_an_evaluation_beyond_the_context_is_refused(exported: Path, corpus: Path) -> None:
    with pytest.raises(RequestError, match="the model looks at 128 tokens at most"):
        evaluate_page.evaluate(exported, str(corpus), sequence=129)


# --- other ranks


def test_a_run_is_judged_by_its_newest_checkpoint_or_the_one_named(
    exported: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Trained(tmp_path, corpus, ["model=gpt2-nano"], 1)
    trained.save(20, 1)
    text = 'metrics = ["perplexity"]\n[answer]\nkind = "generate"\nmax_new_tokens = 4\n'
    task = judges.task(tmp_path / "task", [{"prompt": "def encode", "completion": "(self, o):"}], text)

    def result(model: Path, *more: str) -> tuple[float, int, str]:
        assert main(["eval", str(model), "--task", str(task), "--json", *more]) == 0
        (result,) = json.loads(capsys.readouterr().out)["tasks"]
        return result["metrics"]["perplexity"], result["step"], result["model"]

    assert result(trained.run, "--step", "10") == (*result(exported)[:2], str(trained.run))
    assert result(trained.run)[1] == 20
    assert main(["eval", str(trained.run), "--task", str(task), "--step", "11"]) == 2
    assert "there is no checkpoint of step 11" in capsys.readouterr().err
    assert main(["eval", str(exported), "--task", str(task), "--step", "10"]) == 2
    assert "is no run, and has no steps" in capsys.readouterr().err


def test_three_ranks_to_one_to_two_keeps_every_tensor(llama: Trained, tmp_path: Path) -> None:
    single = convert_page.convert(llama.run, tmp_path / "one", step=10)
    assert (single.from_ranks, single.manifest.world_size, single.random_states) == (3, 1, False)
    two = convert_page.convert(tmp_path / "one", tmp_path / "two", ranks=2)
    files = Shards(two.folder, read(two.folder))
    for name, values in llama.parameters.items():
        for state, expected in saved.states_of(name, values).items():
            read_back = files.read(name, state)
            assert read_back is not None
            np.testing.assert_array_equal(read_back, expected.reshape(-1))
    probe = files.probe()
    assert probe is not None
    np.testing.assert_array_equal(probe, llama.logits)
    assert files.sidecar(0).keys() == {"pieces"}
    assert write_page.export(tmp_path / "two", tmp_path / "out").compare is not None


def test_random_states_are_kept_where_they_fit(llama: Trained, tmp_path: Path) -> None:
    done = convert_page.convert(llama.run, tmp_path / "same", step=10, ranks=3)
    files = Shards(done.folder, done.manifest)
    assert [files.sidecar(rank)["rng"] for rank in range(3)] == [{"rank": rank} for rank in range(3)]


def test_a_converted_run_continues_under_its_own_name(gpt2: Trained, tmp_path: Path) -> None:
    from halfstep.launcher.rundir.run_reader import Run

    convert_page.convert(gpt2.run, tmp_path / "new", step=10)
    request, plan = Run(tmp_path / "new").require_as_asked()
    assert request.spec.out == str(tmp_path / "new")
    assert plan == gpt2.plan
    rows = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert sorted(folder.name for folder in (tmp_path / "new" / "checkpoints").iterdir()) == ["step-00000010"]


def test_a_damaged_checkpoint_is_not_converted(llama: Trained, tmp_path: Path) -> None:
    folder = llama.save(30, 3)
    saved.flip(folder / "rank-00002.json")
    with pytest.raises(RequestError, match=r"step 30 is damaged: rank-00002\.json is not what was written"):
        convert_page.convert(llama.run, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    saved.flip(folder / "rank-00002.json")


def test_more_ranks_than_elements_leave_some_with_nothing(tmp_path: Path, gpt2: Trained) -> None:
    done = convert_page.convert(gpt2.run, tmp_path / "many", step=10, ranks=200)
    files = Shards(done.folder, done.manifest)
    seed = random.Random(0)
    for name in seed.sample(sorted(gpt2.parameters), 5):
        values = files.read(name, "master")
        assert values is not None
        np.testing.assert_array_equal(values, gpt2.parameters[name].reshape(-1))
