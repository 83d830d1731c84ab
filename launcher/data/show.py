"""Show what is in a prepared corpus: counts, tokenizer, and a stretch of it turned back into text."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep.launcher.corpus import corpus_manifest as manifests
from halfstep.launcher.corpus import megatron
from halfstep.launcher.corpus.description import read_data, verify_tokens
from halfstep.launcher.data import tokenizer
from halfstep.launcher.data.fidelity import shown
from halfstep.launcher.errors import RequestError

if TYPE_CHECKING:
    from halfstep.launcher.data.tokens import TokenFile

_SAMPLE_TOKENS = 120
_BEGIN, _END, _END_OF_TEXT = "[[", "]]", "<end of text>"
_NAMED = 3


def inspect(directory: str | Path) -> dict[str, Any]:
    """Check every byte of a prepared folder against its manifest, and return that with samples of each split.

    `verified` is false where the manifest has no hashes of the tokens, as those of earlier versions. Raises
    RequestError when the folder is missing, half-written, damaged, or holds another tokenizer.
    """
    from halfstep.launcher.data.tokens import TokenFile

    directory = Path(directory)
    # Checks the size of every file and the hash of the tokenizer; a bare pair has no manifest to show.
    facts = read_data(str(directory))
    if not facts.has_tokenizer:
        raise RequestError(
            f"{directory} is a bare Megatron pair of {facts.train_tokens:,} tokens and has no manifest to show",
            where=str(directory),
            fix="name a folder that `halfstep data prepare` made",
        )
    verified = verify_tokens(str(directory))
    about, content = manifests.read(directory, to_show=True)
    loaded = tokenizer.load(directory / about.tokenizer.path, about.tokenizer.kind)
    samples = {}
    for name, split in (("train", about.splits.train), ("validation", about.splits.validation)):
        if split.tokens:
            file = TokenFile(directory / split.prefix, vocabulary=about.tokenizer.vocabulary)
            middle = file.tokens // 2
            if split.mask is None:
                samples[name] = loaded.decode(file.slice(middle, middle + _SAMPLE_TOKENS))
            else:
                samples[name] = _example(file, TokenFile(directory / split.mask.prefix), loaded)
    return {**content, "verified": verified, "samples": samples}


def _example(file: "TokenFile", mask: "TokenFile", loaded: tokenizer.Tokenizer) -> str:
    """Return an example from the middle of a split, which has targets where any from there on has, as marked text."""
    ends = np.cumsum(megatron.document_lengths(file.prefix)).tolist()
    begins = [0, *ends[:-1]]
    chosen = range(len(ends) // 2, len(ends))
    number = next((n for n in chosen if any(mask.slice(begins[n], ends[n]))), chosen[0])
    begin, end = begins[number], ends[number]
    marks = mask.slice(begin, end)
    first = max(0, marks.index(1) - _SAMPLE_TOKENS // 2) if any(marks) else 0
    ids, marks = file.slice(begin, end)[first : first + _SAMPLE_TOKENS], marks[first : first + _SAMPLE_TOKENS]
    shown_text = ""
    for mark, run in itertools.groupby(zip(marks, ids, strict=True), key=lambda each: each[0]):
        text = _with_ends([token for _, token in run], loaded)
        shown_text += f"{_BEGIN}{text}{_END}" if mark else text
    return shown_text


def _with_ends(ids: list[int], loaded: tokenizer.Tokenizer) -> str:
    text = ""
    for is_end, run in itertools.groupby(ids, key=lambda token: token == loaded.end_of_text):
        tokens = list(run)
        text += _END_OF_TEXT * len(tokens) if is_end else loaded.decode(tokens)
    return text


def render(content: dict[str, Any]) -> list[str]:
    """Return the lines that show a manifest, with samples where `inspect` added them."""
    source, described = content["source"], content["tokenizer"]
    lines = [f"source      {source['asked']}: {source['files']:,} files, {source['text_bytes']:,} bytes of text"]
    lines += [f"left out    {line}" for line in _left_out(source)]
    if repeated := source.get("duplicates"):
        lines.append(f"duplicates  {repeated:,} that repeat an earlier document; all are kept")
    lines.append(
        f"tokenizer   {described['name']}: {described['vocabulary']:,} tokens, end of text {described['end_of_text']}, "
        f"sha256 {described['sha256'][:12]}"
    )
    lines += _came_back(content)
    if examples := content.get("examples"):
        turns = "all turns of the assistant" if examples["targets"] == "all" else "the assistant's last turn"
        without = f"; {examples['without_targets']:,} have none" if examples["without_targets"] else ""
        lines.append(
            f"examples    template {examples['template']}, targets are {turns}{without}; the longest has "
            f"{examples['longest']:,} tokens"
        )
    for name, split in content["splits"].items():
        lines.append(
            f"{name:<11} {split['tokens']:,} tokens, "
            + (f"{split['targets']:,} of them targets, " if "mask" in split else "")
            + f"{split['documents']:,} documents, {_on_disk(split):,} bytes on disk"
        )
    tokens = sum(split["tokens"] for split in content["splits"].values())
    lines.append(f"bytes/token {source['text_bytes'] / tokens:.2f}, stored as {content['token_dtype']}")
    if "verified" in content:
        lines.append(
            "verified    every byte is what was prepared"
            if content["verified"]
            else "verified    sizes and tokenizer only: an earlier version of Halfstep wrote no hashes of the tokens"
        )
    for name, sample in content.get("samples", {}).items():
        marked = f", targets in {_BEGIN}{_END}" if content.get("examples") else ""
        lines += [f"--- from the middle of {name}{marked}", *sample.splitlines()]
    return [_printable(line) for line in lines]


def _on_disk(split: dict[str, Any]) -> int:
    pairs = [split, *([split["mask"]] if "mask" in split else [])]
    return sum(sum(pair["bytes"].values()) for pair in pairs)


def _printable(line: str) -> str:
    """Escape what would move a terminal's cursor, colour it or worse: names and text come from anywhere."""
    return "".join(each if each.isprintable() or each == "\t" else ascii(each)[1:-1] for each in line)


def _left_out(source: dict[str, Any]) -> list[str]:
    """Return one line for each kind of thing that was not read."""
    counts = {"empty documents": source["empty_documents"], "undecodable files": len(source["undecodable_files"])}
    said = [", ".join(f"{count:,} {name}" for name, count in counts.items() if count)]
    for kind, passed in source.get("left_out", {}).items():
        names = ", ".join(passed["names"][:_NAMED]) + (", ..." if passed["count"] > _NAMED else "")
        said.append(f"{passed['count']:,} {kind}: {names}")
    if bad := source.get("bad_rows", {}).get("count"):
        said.append(f"{bad:,} bad rows, the first: {source['bad_rows']['examples'][0]}")
    return [line for line in said if line]


def _came_back(content: dict[str, Any]) -> list[str]:
    """Return what the tokenizer does to the text, where it does anything."""
    measured = content.get("fidelity")
    if measured is None:
        return []
    said = []
    if measured["lost"]:
        examples = " ".join(map(shown, measured["examples"]))
        said.append(f"{100 * measured['lost']:.2g} % of the characters do not come back (such as {examples})")
    if measured["changed"]:
        said.append(f"{100 * measured['changed']:.2g} % come back in another case or form")
    if measured["whitespace"]:
        said.append(f"{100 * measured['whitespace']:.2g} % of the whitespace is not what it was")
    if measured["unknown_tokens"]:
        said.append(f'{measured["unknown_tokens"]:,} tokens of the corpus mean "unknown"')
    # Of those that are trained here nobody expects anything else.
    if not said and content["request"].get("tokenizer") is not None:
        said.append(f"nothing: {measured['characters']:,} characters of a sample come back as they were")
    return [f"loses       {line}" for line in said]
