"""What no optimizer moves is saved, restored to the bit and exported: a router's bias, a buffer that ranks write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from fakes.experts import BIAS, ROUTED
from process.conftest import BIN, WORDS, Outcome
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from halfstep.launcher.checkpoint import store
from halfstep.launcher.checkpoint.manifest import read
from halfstep.launcher.checkpoint.shards import Shards
from halfstep.launcher.config.digest import digest

pytestmark = pytest.mark.process
Start = Callable[..., Outcome]
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, input_ids, **more):
        if self.training:
            count = input_ids.new_tensor(input_ids.numel())
            self.seen += torch.stack([input_ids.sum(), count, 2**40 + input_ids[0, 0]])
            self.mean.mul_(0.9).add_(0.1 * input_ids.double().mean())
        return super().forward(input_ids=input_ids, **more)
"""


def train(start: Start, name: str, home: Path, data: Path, *keys: str) -> Outcome:
    given = [*WORDS, f"model=hf:{home}", f"data={data}", "steps=4", "eval.every=0", "checkpoint.every=2", *keys]
    return start(name, [str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *given, "out={out}"])


def files(run: Path, step: int) -> Shards:
    folder = store.home(run) / store.folder_name(step)
    return Shards(folder, read(folder))


def hashes(run: Path) -> list[str]:
    return [file.xxh3 for file in read(files(run, 4).folder).files]


def without_last_step(outcome: Outcome, to: Path) -> Path:
    """Copy a run as it was before its last checkpoint."""
    shutil.copytree(outcome.out, to)
    shutil.rmtree(store.home(to) / store.folder_name(4))
    (to / "summary.json").unlink()
    return to


def forget_buffers(folder: Path) -> None:
    """Make a checkpoint what it was before buffers were kept: neither its files nor its manifest hold any."""
    manifest = folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["digest"], tree["model"]["buffers"]
    for item in tree["files"]:
        file = folder / item["name"]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as opened:
                metadata = opened.metadata()
            kept = {key: tensor for key, tensor in load_file(file).items() if not key.endswith("/buffer")}
            save_file(kept, file, metadata)
            content = file.read_bytes()
            item |= {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    manifest.write_text(json.dumps({**tree, "digest": digest(tree, 32)}))


@pytest.fixture(scope="module")
def own(scratch: Path) -> Path:
    """A model with code of its own whose forward pass writes to buffers, on every rank something else."""
    home = scratch / "own"
    home.mkdir()
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (home / "config.json").write_text(json.dumps({**LLAMA, "model_type": "own", "auto_map": auto_map}))
    (home / "own.py").write_text(CODE)
    return home


@pytest.mark.full
@pytest.mark.parametrize("zero", [1, 3])
def test_buffers_that_every_rank_writes_to_are_restored_to_the_bit(
    start: Start, data: Path, scratch: Path, own: Path, zero: int
) -> None:
    keys = ["trust_remote_code=true", f"zero={zero}", "precision=bf16"]
    whole = train(start, f"own{zero}", own, data, *keys)
    assert whole.returncode == 0, whole.output
    last = files(whole.out, 4)
    assert last.buffers() == {"seen": {"shape": [3], "dtype": "int64"}, "mean": {"shape": [], "dtype": "float64"}}
    seen = [last.buffer("seen", rank).tolist() for rank in (0, 1)]
    assert seen[0] != seen[1]
    assert [count for _, count, _ in seen] == [4 * 4 * 64] * 2, (
        "4 steps of 4 sequences of 64 on each rank; probes count nothing"
    )
    assert all(large > 8 * 2**40 for _, _, large in seen), "more than fp32 holds"
    again = without_last_step(whole, scratch / "runs" / f"own{zero}-again")
    resumed = train(start, again.name, own, data, *keys)
    assert resumed.returncode == 0, resumed.output
    assert "resumes after step 2" in resumed.output
    assert hashes(again) == hashes(whole.out)


EXPERTS = {**LLAMA, **ROUTED}
VALUES = [5.001, 5.002, 5.003, 5.004]


@pytest.fixture(scope="module")
def experts(scratch: Path) -> Path:
    """Weights of experts whose router has a bias that bf16 does not hold."""
    import torch

    from halfstep.models.network import build

    model = build(EXPERTS, seed=1)
    model.get_buffer(BIAS).copy_(torch.tensor(VALUES))
    model.save_pretrained(scratch / "experts")
    return scratch / "experts"


@pytest.mark.full
def test_a_routers_bias_goes_through_stages_and_older_checkpoints(
    start: Start, data: Path, scratch: Path, experts: Path
) -> None:
    whole = train(start, "experts", experts, data, "zero=2", "precision=bf16")
    assert whole.returncode == 0, whole.output
    assert files(whole.out, 4).buffer(BIAS).tolist() == pytest.approx(VALUES, abs=1e-6)
    other = without_last_step(whole, scratch / "runs" / "experts-z3")
    resumed = train(start, other.name, experts, data, "zero=3", "precision=bf16")
    assert resumed.returncode == 0, resumed.output
    assert files(other, 4).buffer(BIAS).tolist() == files(whole.out, 4).buffer(BIAS).tolist()
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-3)
    old = without_last_step(whole, scratch / "runs" / "experts-old")
    forget_buffers(store.home(old) / store.folder_name(2))
    resumed = train(start, old.name, experts, data, "zero=2", "precision=bf16")
    assert resumed.returncode == 0, resumed.output
    assert resumed.losses == whole.losses
    assert hashes(old) == hashes(whole.out)


@pytest.mark.full
def test_the_stage_does_not_change_the_model_that_was_named(start: Start, data: Path, scratch: Path) -> None:
    """A head of its own under a config that ties it trained two models at stages 0 to 2 and one at stage 3."""
    from halfstep.models.network import build

    home = scratch / "untied"
    build({**LLAMA, "model_type": "llama", "tie_word_embeddings": False}, seed=1).save_pretrained(home)
    losses = {}
    for zero in (0, 3):
        outcome = train(start, f"untied{zero}", home, data, f"zero={zero}", "precision=fp32", "steps=2")
        assert outcome.returncode == 0, outcome.output
        losses[zero] = outcome.losses
    assert all(others == pytest.approx(losses[0], abs=1e-6) for others in losses.values()), losses
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for zero in (0, 3):
        outcome = train(start, f"tied{zero}", home, data, f"zero={zero}", "precision=fp32", "steps=2")
        assert outcome.returncode == 2, outcome.output
        assert (
            "have a lm_head.weight of their own, and the config ties it to model.embed_tokens.weight" in outcome.output
        )
