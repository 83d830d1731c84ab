"""Generation: Python's standard library, a few lines given and the next ones to be written."""

import hashlib
from pathlib import Path

from halfstep.launcher.data import sources
from halfstep.launcher.data.readers import python_source
from halfstep.launcher.errors import RequestError
from halfstep.launcher.ready_tasks.task_folder import Made, Row, split_of

_PROMPT, _REFERENCE = 120, 120
"""Characters, to the end of a line: together they fit into the 128 tokens of a nano model."""
_EACH = 6
"""Rows of one file at most."""


def make(folder: Path | None, seed: int) -> Made:
    """Return continuations of Python files, and the text of those of them that are trained on, whole.

    `folder` stands for the standard library. A file is in one split alone. Raises RequestError where there are none.
    """
    files = sources.stdlib_files() if folder is None else sorted(folder.rglob("*.py"))
    rows, texts = [], []
    for file in files:
        text = python_source(file)
        if text is None or not text.strip():
            continue
        content = hashlib.sha256(text.encode()).hexdigest()  # a copy is no other text
        rows += [Row(prompt=prompt, completion=completion, source=content) for prompt, completion in _pairs(text)]
        if split_of(content, seed) == "train":
            texts.append(text)
    if not rows:
        raise RequestError("there are no Python files", where=str(folder), fix="name a folder that has some")
    return Made(
        name="generation",
        rows=rows,
        text=texts,
        judged_by=(
            'metrics = ["perplexity", "distinct_1", "distinct_2"]\ntoo_long = "cut"\n\n'
            '[answer]\nkind = "generate"\nmax_new_tokens = 40\n'
        ),
        about={
            "kind": "generation",
            "from": "the standard library" if folder is None else str(folder),
            "licence": "that of Python (PSF)" if folder is None else "that of the files",
            "selection": f"{_EACH} places of a file at most; about {_PROMPT} characters are given, as many follow",
        },
    )


def _pairs(text: str) -> list[tuple[str, str]]:
    """Return a file's prompts and what follows them, evenly over the file, each of whole lines."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.strip()]
    pairs = []
    for place in starts[:: max(1, len(starts) // _EACH)][:_EACH]:
        prompt, after = _lines(lines, place, _PROMPT)
        reference, _ = _lines(lines, after, _REFERENCE)
        if prompt.strip() and reference.strip():
            pairs.append((prompt, reference))
    return pairs


def _lines(lines: list[str], start: int, most: int) -> tuple[str, int]:
    """Return lines that together have at most so many characters, and the number of the next."""
    length, stop = 0, start
    while stop < len(lines) and length + len(lines[stop]) <= most:
        length += len(lines[stop])
        stop += 1
    return "".join(lines[start:stop]), stop
