"""Show what is in a prepared corpus: counts, tokenizer, and a stretch of it turned back into text."""

import json
from pathlib import Path
from typing import Any

from launcher.data import tokenizer
from launcher.plan.facts import read_data

_SAMPLE_TOKENS = 120


def inspect(directory: str | Path) -> dict[str, Any]:
    """Check a prepared folder against its manifest and return the manifest with samples of each split.

    Raises RequestError when the folder is missing, half-written, damaged, or holds another tokenizer.
    """
    from launcher.data.tokens import TokenFile

    directory = Path(directory)
    # Checks the size of every file and the hash of the tokenizer; a bare pair has no manifest to show.
    read_data(str(directory))
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    described = manifest["tokenizer"]
    loaded = tokenizer.load(directory / described["path"], described["kind"])
    samples = {}
    for name, split in manifest["splits"].items():
        if split["tokens"]:
            file = TokenFile(directory / split["prefix"], vocabulary=described["vocabulary"])
            middle = file.tokens // 2
            samples[name] = loaded.decode(file.slice(middle, middle + _SAMPLE_TOKENS))
    return {**manifest, "samples": samples}


def render(found: dict[str, Any]) -> list[str]:
    """Return the lines that show a manifest, with samples where `inspect` added them."""
    source, described = found["source"], found["tokenizer"]
    lines = [f"source      {source['asked']}: {source['files']:,} files, {source['text_bytes']:,} bytes of text"]
    left_out = {"empty documents": source["empty_documents"], "undecodable files": len(source["undecodable_files"])}
    if any(left_out.values()):
        lines.append("left out    " + ", ".join(f"{count} {name}" for name, count in left_out.items() if count))
    lines.append(
        f"tokenizer   {described['name']}: {described['vocabulary']:,} tokens, end of text {described['end_of_text']}, "
        f"sha256 {described['sha256'][:12]}"
    )
    for name, split in found["splits"].items():
        lines.append(
            f"{name:<11} {split['tokens']:,} tokens, {split['documents']:,} documents, "
            f"{sum(split['bytes'].values()):,} bytes on disk"
        )
    tokens = sum(split["tokens"] for split in found["splits"].values())
    lines.append(f"bytes/token {source['text_bytes'] / tokens:.2f}, stored as {found['token_dtype']}")
    for name, sample in found.get("samples", {}).items():
        lines += [f"--- from the middle of {name}", *sample.splitlines()]
    return lines
