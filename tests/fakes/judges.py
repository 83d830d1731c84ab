"""Small models with a tokenizer, as folders that `eval` takes, and tasks to judge them by."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.export import tokenizer_files

CONTEXT = 64


def model(folder: Path, corpus: Path, family: str, seed: int = 0) -> Path:
    """Make a model of two layers with random weights, large enough that its answers differ, and return its folder."""
    folder.mkdir(parents=True)
    made = tokenizer_files.export(corpus, [read_data(str(corpus)).digest], folder, CONTEXT)
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), made.end_of_text)
    if family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=made.vocabulary,
            n_positions=CONTEXT,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.5,
            **special,
        )
    else:
        config = LlamaConfig(
            vocab_size=made.vocabulary, max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, **special,
        )  # fmt: skip
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config)
    network.generation_config.pad_token_id = made.end_of_text
    network.save_pretrained(folder)
    return folder


def task(folder: Path, rows: Iterable[dict[str, Any]], text: str) -> Path:
    """Write a task with its data and return its file; `text` is TOML without the name and the data."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text("".join(lines), "utf-8")
    file = folder / "task.toml"
    file.write_text(f'name = "small"\ndata = "rows.jsonl"\n{text}', "utf-8")
    return file
