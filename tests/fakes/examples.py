"""A prepared folder of examples whose tokens and targets are chosen one by one."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halfstep.launcher.corpus import corpus_manifest
from halfstep.launcher.corpus.vocabulary import tokenizer_sha256
from halfstep.launcher.data import write_corpus

Given = Sequence[tuple[Sequence[int], Sequence[int]]]
"""The token ids of each example, and as many marks: 1 for a target."""


def write_examples(
    folder: Path, train: Given, validation: Given, vocabulary: int = 64, tokenizer: Path | None = None
) -> Path:
    """Write a corpus of examples as `data prepare` does, with the tokenizer of a folder or one that is made up."""
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
    else:
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.model").write_bytes(b"not a real one")
    every = [*train, *validation]
    lengths = np.array([len(ids) for ids, _ in every])
    held = np.where(np.arange(len(every)) < len(train), 0, lengths)
    targets = [sum(marks[1:]) for _, marks in every]
    files = [folder / "tokens", folder / "marks"]
    np.concatenate([np.asarray(ids, np.uint16) for ids, _ in every]).tofile(files[0])
    np.concatenate([np.asarray([0, *marks[1:]], np.uint8) for _, marks in every]).tofile(files[1])
    splits = write_corpus._write(folder, "", files[0], lengths, held, np.dtype(np.uint16), 0)
    masks = write_corpus._write(folder, corpus_manifest.MASK, files[1], lengths, held, np.dtype(np.uint8), 0)
    for name, own in (("train", targets[: len(train)]), ("validation", targets[len(train) :])):
        mask = {key: masks[name][key] for key in ("prefix", "bytes", "xxh3", "xxh3_sampled")}
        splits[name] |= {"targets": sum(own), "mask": mask}
    for file in files:
        file.unlink()
    content = {
        "format": corpus_manifest.FORMAT,
        "kind": corpus_manifest.KIND,
        "source": {"asked": "by hand"},
        "tokenizer": {
            "kind": "sentencepiece",
            "path": "tokenizer",
            "sha256": tokenizer_sha256(folder / "tokenizer"),
            "vocabulary": vocabulary,
            "end_of_text": 0,
            "name": "by hand",
        },
        "examples": {
            "template": "plain",
            "targets": "all",
            "without_targets": targets.count(0),
            "longest": int(lengths.max()),
        },
        "token_dtype": "uint16",
        "max_token_id": max(max(ids) for ids, _ in every),
        "seed": 0,
        "splits": splits,
        "versions": {},
    }
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def drawn(lengths: Sequence[int], seed: int, vocabulary: int = 64) -> Given:
    """Return examples of some lengths; every fifth has no target."""
    random = np.random.default_rng(seed)
    given = []
    for number, length in enumerate(lengths):
        marks = random.integers(0, 2, length) if number % 5 else np.zeros(length, int)
        given.append((random.integers(0, vocabulary, length).tolist(), marks.tolist()))
    return given
