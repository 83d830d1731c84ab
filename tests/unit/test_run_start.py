"""A run begins with the weights of an earlier one: which checkpoint that is, what its values are, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.pairs import write_pair
from fakes.saved import flip, save

from halfstep.launcher.checkpoint import start
from halfstep.launcher.checkpoint.manifest import read
from halfstep.launcher.checkpoint.merged import opened
from halfstep.launcher.config.load import load
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.topology import Topology
from halfstep.models import adapters, network, shapes
from halfstep.models.lora import Lora
from halfstep.models.presets import PRESETS

CPU = Topology(world_size=1, ranks_per_node=1, accelerator="cpu")
CONFIG = shapes.hf_config(shapes.shape_of(PRESETS["gpt2-nano"], vocabulary=4096, layers=1, width=16, heads=2))
LORA = Lora(rank=2, alpha=8.0, dropout=0.0, targets=("c_attn", "c_fc"), layers=2, parameters=2 * (16 + 48 + 16 + 64))


def values_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Return a run with a checkpoint of step 10 on two ranks and an older one."""
    run = tmp_path / "earlier"
    for step, seed in ((5, 1), (10, 2)):
        values = values_of(network.build(CONFIG, seed=seed))
        half = sum(value.size for value in values.values()) // 2
        save(run, values, step=step, bounds=[half], config=CONFIG, buffers=[{}, {}])
    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pair(tmp_path / "tokens", 5_000)
    return tmp_path / "tokens"


def planned(run: Path | str, data: Path, *keys: str) -> Any:
    request = load([f"model=run:{run}", f"data={data}", *keys])
    return resolve(request, CPU, facts.read(request.spec))


def test_a_run_begins_with_the_newest_checkpoint_or_with_the_one_it_names(earlier: Path, data: Path) -> None:
    newest, older = planned(earlier, data), planned(f"{earlier}@5", data)
    assert (newest.model.weights, older.model.weights) == (f"run:{earlier}@10", f"run:{earlier}@5")
    assert newest.identity["weights"] != older.identity["weights"]
    assert planned(f"{earlier}@10", data).identity["weights"] == newest.identity["weights"]
    assert newest.model.config == CONFIG
    for made, seed in ((newest, 2), (older, 1)):
        values = opened(made.model.weights, made.model.weights_digest)
        model = network.build(made.model.config, seed=77, weights=values)
        for name, value in values_of(network.build(CONFIG, seed=seed)).items():
            assert np.array_equal(model.get_parameter(name).detach().numpy(), value), name


def test_a_run_that_trained_adapters_is_begun_with_as_merged(tmp_path: Path, data: Path) -> None:
    model, random = network.build(CONFIG, seed=4, lora=LORA), np.random.default_rng(0)
    trained = {name: random.normal(size=value.shape).astype(np.float32) for name, value in values_of(model).items()}
    about = {"lora": vars(LORA), "weights": None, "local": False, "digest": None, "seed": 4}
    folder = save(tmp_path / "tuned", trained, config=CONFIG, buffers=[{}])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["adapters"] = about
    _rewrite(folder, manifest)
    made = planned(tmp_path / "tuned", data)
    whole = network.build(CONFIG, seed=0, weights=opened(made.model.weights, made.model.weights_digest)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapters.is_adapter(name):
                parameter.copy_(torch.from_numpy(trained[name]))
        tokens = torch.arange(20)[None]
        expected = model.eval()(tokens).logits
        assert (expected - whole(tokens).logits).abs().max() < 1e-5 * expected.abs().max()


def _rewrite(folder: Path, tree: dict[str, Any]) -> None:
    from halfstep.launcher.config.digest import digest

    tree.pop("digest")
    (folder / "manifest.json").write_text(json.dumps({**tree, "digest": digest(tree, 32)}))


def test_what_cannot_be_begun_with_is_refused_in_three_lines(earlier: Path, data: Path, tmp_path: Path) -> None:
    def refused(name: Path | str, *keys: str) -> RequestError:
        with pytest.raises(RequestError) as caught:
            planned(name, data, *keys)
        assert str(caught.value).count("\n") == 2
        return caught.value

    assert refused(tmp_path / "nowhere").what == f"there is no folder {tmp_path}/nowhere"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").what == f"{tmp_path}/empty has no checkpoints"
    error = refused(f"{earlier}@7")
    assert (error.what, error.fix) == (f"there is no checkpoint of step 7 in {earlier}", "take one of 10, 5")
    assert refused(earlier, "model.layers=2").what == "the dimensions of trained weights cannot be changed"
    (earlier / "checkpoints" / "step-00000010" / "rank-00001.safetensors").unlink()
    error = refused(earlier)
    assert error.what.startswith("the checkpoint of step 10 is damaged: rank-00001.safetensors")
    assert error.fix == f"model=run:{earlier}@5 takes an older one"


def test_data_of_another_tokenizer_is_refused(earlier: Path, corpus: Path, tmp_path: Path) -> None:
    about = read_data(str(corpus))
    tree = json.loads((earlier / "checkpoints" / "step-00000010" / "manifest.json").read_text())
    _rewrite(earlier / "checkpoints" / "step-00000010", {**tree, "data": {"path": str(corpus), "digest": about.digest}})
    assert planned(earlier, corpus).model.weights == f"run:{earlier}@10"
    other = tmp_path / "other"
    other.mkdir()
    for file in corpus.rglob("*"):
        if file.is_file():
            to = other / file.relative_to(corpus)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(file.read_bytes())
    (other / "tokenizer" / "tokenizer.model").write_bytes(b"another")
    manifest = json.loads((other / "manifest.json").read_text())
    from halfstep.launcher.corpus.vocabulary import tokenizer_sha256

    manifest["tokenizer"]["sha256"] = tokenizer_sha256(other / "tokenizer")
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError) as caught:
        planned(earlier, other)
    assert caught.value.what == "the data was made with another tokenizer than the model's own"
    assert caught.value.fix == f"prepare the data again with --tokenizer {corpus}"


def test_a_checkpoint_that_changed_since_the_plan_is_not_loaded(earlier: Path, data: Path) -> None:
    made = planned(earlier, data)
    with pytest.raises(ValueError, match="another than it was when the run was planned"):
        opened(made.model.weights, "0" * 16)
    flip(earlier / "checkpoints" / "step-00000010" / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=r"is damaged: rank-00000.safetensors is not what was written"):
        opened(made.model.weights, made.model.weights_digest)
    assert start.weights_digest(read(earlier / "checkpoints" / "step-00000010")) == made.model.weights_digest
