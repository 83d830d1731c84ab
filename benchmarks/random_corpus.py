"""Write a corpus of random tokens for a benchmark: python benchmarks/random_corpus.py PREFIX TOKENS VOCABULARY.

A bare Megatron pair, written as `halfstep data prepare` writes its own. Tokens are as frequent as the words of a text,
about 1/rank (Zipf): the embedding's gradient then adds up rows as it does for text.
"""

import sys
from pathlib import Path

import numpy as np

DOCUMENT = 1 << 16
"""Tokens of one document."""


def tokens(count: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Return uint16 token ids below a vocabulary of at most 65,536."""
    assert vocabulary <= 1 << 16, "a token is 16 bits here"
    drawn = vocabulary ** np.random.default_rng(seed).random(count) - 1
    return np.minimum(drawn, vocabulary - 1).astype(np.uint16)


def write(prefix: Path, count: int, vocabulary: int) -> None:
    """Write the pair PREFIX.bin and PREFIX.idx."""
    from halfstep.launcher.data.tokens import open_writer

    stream = tokens(count, vocabulary)
    with open_writer(prefix, np.dtype(np.uint16)) as writer:
        for start in range(0, count, DOCUMENT):
            writer.add_document(stream[start : start + DOCUMENT])


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
