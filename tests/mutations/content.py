"""Readers of what is trained on and what comes of it: corpora, tokenizers, models of others, exports, conversions.

They need torch and transformers, and libraries that a damaged file may crash: each reader runs in a process of its own
(`python -m mutations.content NAME FIRST COUNT CORPUS`), which tells after each case how it went.
"""

import contextlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from mutations import mutate
from mutations.driver import Case, Reader, command, failures, file_cases

COUNTS = {
    "corpus": 500,
    "pair of others": 400,
    "examples": 250,
    "prepared examples": 400,
    "model of others": 250,
    "tokenizer of others": 150,
    "SentencePiece": 150,
    "export": 120,
    "conversion": 200,
}
"""Readers, and how many cases each is given."""


def make(name: str, folder: Path, corpus: Path) -> Reader:
    """Return a reader, with what it reads made in a folder."""
    makers: dict[str, Callable[[Path, Path], Reader]] = {
        "corpus": _corpus,
        "pair of others": _pair,
        "examples": _examples,
        "prepared examples": _prepared_examples,
        "model of others": _model,
        "tokenizer of others": _tokenizer,
        "SentencePiece": _sentencepiece,
        "export": _export,
        "conversion": _conversion,
    }
    return makers[name](folder, corpus)


# --- corpora


def _of_index(content: bytes, draw: random.Random) -> mutate.Mutation:
    """Change one number of a Megatron index: a count, a length, an offset, a boundary."""
    if draw.random() < 0.4:
        return mutate.of_bytes(content, draw)
    place = draw.choice((9, 17, 18, 26, 34, 38, len(content) - 16, len(content) - 8))
    value = draw.choice((0, 1, 2, -1, 7, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**40)))
    size = 4 if place == 34 else 8
    number = struct.pack("<q", value % 2**64 - (2**64 if value % 2**64 >= 2**63 else 0))[:size]
    return f"{value} at byte {place}", content[:place] + number + content[place + size :]


def _tokens(prefix: str, count: int) -> np.ndarray:
    from halfstep.launcher.data.tokens import TokenFile

    file = TokenFile(prefix, vocabulary=4096)
    assert len(file) == count, f"{len(file)} tokens, the plan counts {count}"
    return np.array(file.slice(0, len(file)))


def _hash(file: Path) -> str:
    return xxhash.xxh3_128_hexdigest(file.read_bytes())


def _corpus(folder: Path, corpus: Path) -> Reader:
    from halfstep.launcher.corpus import description as page

    files = (
        (corpus / "manifest.json", mutate.of_json),
        (corpus / "train.idx", _of_index),
        (corpus / "train.bin", mutate.of_bytes),
        (corpus / "validation.idx", _of_index),
        (corpus / "tokenizer" / "tokenizer.model", mutate.of_bytes),
    )
    manifest = json.loads((corpus / "manifest.json").read_text())
    for split in manifest["splits"].values():
        hashes = {ending: _hash(corpus / f"{split['prefix']}.{ending}") for ending in ("bin", "idx")}
        split |= {"xxh3": hashes, "xxh3_sampled": hashes}
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    good = page.read_data(str(corpus))
    before = _tokens(good.train_prefix, good.train_tokens)

    def read(case: Case) -> Any:
        seen = page.read_data(str(corpus))
        tokens = _tokens(seen.train_prefix, seen.train_tokens)
        if seen.validation_prefix:
            _tokens(seen.validation_prefix, seen.validation_tokens)
        return seen, tokens

    def judge(case: Case, pair: Any) -> str | None:
        seen, tokens = pair
        if seen.digest == good.digest and not np.array_equal(tokens, before):
            return "other tokens under the same digest"
        about = mutate.parsed_json((corpus / "manifest.json").read_bytes())
        said = (about["splits"]["train"]["tokens"], about["tokenizer"]["vocabulary"])
        return None if (seen.train_tokens, seen.vocabulary) == said else f"{said} were read as {seen!r}"[:200]

    return Reader(name="corpus", read=read, cases=file_cases(*files), judge=judge)


def _pair(folder: Path, corpus: Path) -> Reader:
    from halfstep.launcher.corpus import description as page

    prefix = folder / "pair"
    for ending in ("bin", "idx"):
        shutil.copy(corpus / f"validation.{ending}", prefix.with_suffix(f".{ending}"))

    def judge(case: Case, pair: Any) -> str | None:
        _, tokens = pair
        content = prefix.with_suffix(".bin").read_bytes()
        readings = [
            np.frombuffer(content[: len(content) // width * width], dtype=f"<u{width}") for width in (1, 2, 4, 8)
        ]
        if any(len(item) == len(tokens) and np.array_equal(item.astype(np.int64), tokens) for item in readings):
            return None
        return f"{len(tokens)} tokens are not those of the file"

    def read(case: Case) -> Any:
        seen = page.read_data(str(prefix))
        return seen, _tokens(seen.train_prefix, seen.train_tokens)

    files = ((prefix.with_suffix(".idx"), _of_index), (prefix.with_suffix(".bin"), mutate.of_bytes))
    return Reader(name="pair of others", read=read, cases=file_cases(*files), judge=judge)


# --- examples


def _chats() -> list[dict[str, Any]]:
    """Return rows of both shapes."""
    asked = [f"What is {number} + 2?" for number in range(12)]
    pairs = [{"prompt": text, "completion": f"It is {number + 2}."} for number, text in enumerate(asked)]
    system = {"role": "system", "content": "Count."}
    turns = [
        [system, {"role": "user", "content": text}, {"role": "assistant", "content": f"{number + 2}, I think"}]
        for number, text in enumerate(asked)
    ]
    return [*pairs, *({"messages": messages} for messages in turns)]


def _answers(row: Any) -> list[str]:
    """Return what the assistant writes in a row, as our format has it."""
    if "messages" in row:
        return [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    written = row["completion"]
    return [written] if isinstance(written, str) else [message["content"] for message in written]


def _examples(folder: Path, corpus: Path) -> Reader:
    from halfstep.launcher.corpus.description import read_data
    from halfstep.launcher.data import tokenizer
    from halfstep.launcher.data.packed import PackedExamples
    from halfstep.launcher.data.prepare import prepare

    rows, spm, out = folder / "rows.jsonl", _make_spm(folder), folder / "made"
    own = tokenizer.load(spm, "sentencepiece")
    rows.write_text("".join(json.dumps(row) + "\n" for row in _chats()))

    def read(case: Case) -> Any:
        shutil.rmtree(out, ignore_errors=True)
        prepare(
            str(rows),
            out,
            format="sft",
            template="chatml",
            tokenizer=str(spm / "tokenizer.model"),
            validation=0.1,
            workers=1,
            progress=False,
        )
        facts = read_data(str(out))
        learnt = []
        for prefix in filter(None, (facts.train_prefix, facts.validation_prefix)):
            file = PackedExamples(prefix, 1 << 18, pack=False, too_long="refuse", seed=0)
            made = file.rows(range(len(file)))
            learnt += [own.decode(ids[on].tolist()) for ids, on in zip(made.ids, made.counted, strict=True)]
        return sorted(learnt)

    def judge(case: Case, learnt: Any) -> str | None:
        given = [json.loads(line) for line in rows.read_text("utf-8-sig").splitlines() if line.strip()]
        if len(learnt) != len(given):
            return f"{len(given)} rows became {len(learnt)} examples"
        expected = sorted("".join(f"{answer}<|im_end|>" for answer in _answers(row)) for row in given)
        return None if learnt == expected else f"{expected!r} were learnt as {learnt!r}"[:300]

    made = Reader(name="examples", read=read, cases=file_cases((rows, mutate.of_rows)), judge=judge)
    untouched = Case(what="nothing")
    assert judge(untouched, read(untouched)) is None
    return made


def _prepared_examples(folder: Path, corpus: Path) -> Reader:
    from fakes.examples import drawn, write_examples

    from halfstep.launcher.corpus.description import read_data
    from halfstep.launcher.data.packed import PackedExamples

    there = write_examples(folder / "made", drawn([5, 9, 17, 3] * 5, 1), drawn([4, 8], 2))

    def rows() -> Any:
        facts = read_data(str(there))
        seen = []
        for prefix in filter(None, (facts.train_prefix, facts.validation_prefix)):
            file = PackedExamples(prefix, 32, pack=True, too_long="refuse", seed=3, vocabulary=64)
            made = file.rows(range(len(file)))
            assert file.target_count(range(len(file))) == int(made.counted.sum())
            seen += [part.tolist() for part in made]
        return facts.digest, seen

    before = rows()

    def judge(case: Case, pair: Any) -> str | None:
        return "other tokens or targets under the same digest" if pair[0] == before[0] and pair != before else None

    files = (
        (there / "manifest.json", mutate.of_json),
        *((there / f"{split}{mask}.idx", _of_index) for split in ("train", "validation") for mask in ("", ".mask")),
        *((there / f"train{mask}.bin", mutate.of_bytes) for mask in ("", ".mask")),
    )
    return Reader(name="prepared examples", read=lambda case: rows(), cases=file_cases(*files), judge=judge)


# --- models and tokenizers of others


def _make_model(folder: Path) -> Path:
    """Write a tiny GPT-2 with weights and a tokenizer of 40 words, as transformers writes them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {letter: place for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,!?0123456")}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<|end|>": len(vocabulary)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(vocabulary) + 1,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=len(vocabulary),
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _model(folder: Path, corpus: Path) -> Reader:
    there = _make_model(folder / "model")
    arguments = [
        f"model=hf:{there}",
        f"data={corpus}",
        "batch.global=8",
        "sequence=32",
        "model.vocabulary=4096",
        "steps=2",
    ]

    def read(case: Case) -> Any:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = command(["plan", "--json", *arguments])
        return json.loads(out.getvalue()) if code == 0 else None

    def judge(case: Case, tree: Any) -> str | None:
        if tree is None:
            return None
        config, said = tree["model"]["config"], mutate.parsed_json((there / "config.json").read_bytes())
        for key in ("n_layer", "n_embd", "n_head", "model_type"):
            if config.get(key) != said.get(key):
                return f"{key} = {said.get(key)!r} was planned as {config.get(key)!r}"[:200]
        return None

    files = ((there / "config.json", mutate.of_json), (there / "tokenizer.json", mutate.of_json))
    return Reader(name="model of others", read=read, cases=file_cases(*files), judge=judge)


def _tokenizer(folder: Path, corpus: Path) -> Reader:
    from halfstep.launcher.data import tokenizer

    there = _make_model(folder / "model")
    text = "the quick brown fox, 123"

    def read(case: Case) -> Any:
        seen = tokenizer.load(there, "huggingface")
        ids = seen.encode(text)
        return seen, ids, seen.decode(ids)

    def judge(case: Case, pair: Any) -> str | None:
        seen, ids, _ = pair
        return None if all(0 <= item < seen.vocabulary for item in ids) else f"ids {ids} beyond {seen.vocabulary}"

    files = ((there / "tokenizer.json", mutate.of_json), (there / "tokenizer_config.json", mutate.of_json))
    return Reader(name="tokenizer of others", read=read, cases=file_cases(*files), judge=judge)


def _make_spm(folder: Path) -> Path:
    """Train a small SentencePiece model, and return its folder."""
    import sentencepiece

    text, there = folder / "text.txt", folder / "spm"
    there.mkdir()
    text.write_text("".join(f"def f{n}(x): return x + {n} * {n % 7}\n" for n in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(there / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=9,
        normalization_rule_name="identity",
    )
    return there


def _sentencepiece(folder: Path, corpus: Path) -> Reader:
    from halfstep.launcher.data import tokenizer

    there = _make_spm(folder)

    def read(case: Case) -> Any:
        seen = tokenizer.load(there, "sentencepiece")
        ids = seen.encode("def f(x): return 1\n")
        return seen.vocabulary, ids, seen.decode(ids)

    def judge(case: Case, pair: Any) -> str | None:
        size, ids, _ = pair
        return None if all(0 <= item < size for item in ids) else f"ids {ids} beyond {size}"

    return Reader(
        name="SentencePiece", read=read, cases=file_cases((there / "tokenizer.model", mutate.of_bytes)), judge=judge
    )


def _export(folder: Path, corpus: Path) -> Reader:
    from halfstep.launcher.export.exported import KIND, NOTE
    from halfstep.launcher.export.generate import generate

    there = _make_model(folder / "model")
    note = {
        "kind": KIND,
        "tokenizer": {"kind": "huggingface", "vocabulary": 39},
        "sequence": 32,
        "step": 5,
        "dtype": "fp32",
    }
    (there / NOTE).write_text(json.dumps(note))

    def read(case: Case) -> Any:
        return generate(there, "the fox", max_new_tokens=2).text

    files = (
        (there / NOTE, mutate.of_json),
        (there / "config.json", mutate.of_json),
        (there / "model.safetensors", mutate.of_bytes),
        (there / "tokenizer.json", mutate.of_json),
        (there / "generation_config.json", mutate.of_json),
    )
    return Reader(name="export", read=read, cases=file_cases(*files))


def _conversion(folder: Path, corpus: Path) -> Reader:
    from fakes import saved

    from halfstep.launcher.checkpoint import shards, store
    from halfstep.launcher.config.load import load
    from halfstep.launcher.export.convert import convert
    from halfstep.launcher.plan import facts
    from halfstep.launcher.plan.resolve import resolve
    from halfstep.launcher.rundir import run_directory
    from halfstep.launcher.topology import Topology

    run, to = folder / "run", folder / "to"
    request = load(["model=gpt2-nano", f"data={corpus}", "batch.global=8", "sequence=64"])
    world = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
    run_directory.write_plan(run, request, resolve(request, world, facts.read(request.spec)))
    there = saved.save(run, {"a": np.arange(12, dtype=np.float32)}, bounds=[5])
    saved.rows(run / "metrics.jsonl", 12)

    def read(case: Case) -> Any:
        shutil.rmtree(to, ignore_errors=True)
        done = convert(run, to, ranks=2)
        reason = shards.damaged(done.folder, done.manifest, lambda: None)
        return reason, [item.step for item in store.candidates(to) if item.manifest]

    def judge(case: Case, pair: Any) -> str | None:
        return None if pair == (None, [10]) else f"it became {pair!r}"

    files = (
        (run / "request.toml", mutate.of_toml),
        (run / "origins.json", mutate.of_json),
        (run / "plan.json", mutate.of_json),
        (run / "metrics.jsonl", mutate.of_rows),
        (there / "manifest.json", mutate.of_json),
        (there / "rank-00000.json", mutate.of_json),
        (there / "rank-00001.safetensors", mutate.of_bytes),
    )
    return Reader(name="conversion", read=read, cases=file_cases(*files), judge=judge)


# --- in a process of its own


def alone(name: str, count: int, corpus: Path, scratch: Path) -> list[str]:
    """Put cases to a reader in another process, which a library may crash; return what went wrong, a line each."""
    seen, done = [], 0
    while done < count:
        command = [
            sys.executable,
            "-m",
            "mutations.content",
            name,
            str(done),
            str(count - done),
            str(corpus),
            str(scratch),
        ]
        path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
        environ = {
            **os.environ,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        process = subprocess.run(command, capture_output=True, text=True, env=environ, check=False, timeout=540)
        lines = [json.loads(line[5:]) for line in process.stdout.splitlines() if line.startswith("case ")]
        seen += [wrong for item in lines for wrong in item["wrong"]]
        done += len(lines)
        if process.returncode:
            seen.append(f"{name} #{done}: the process ended with {process.returncode}: {process.stderr[-300:]}")
            done += 1
            if not lines and done > 3:
                break
    return seen


def _main(name: str, first: int, count: int, corpus: Path, scratch: Path) -> None:
    warnings.simplefilter("ignore")  # of libraries; what they warn of is not what is asked here
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shutil.copytree(corpus, Path(folder) / "corpus")
        reader = make(name, Path(folder), Path(folder) / "corpus")
        for number in range(first, first + count):
            wrong = failures(reader, 1, first=number)
            sys.__stdout__.write(f"case {json.dumps({'wrong': wrong})}\n")
            sys.__stdout__.flush()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
