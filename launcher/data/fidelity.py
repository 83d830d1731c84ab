"""Measure what a tokenizer loses: how much of a sample of the corpus does not come back from its tokens.

Of each block of the sample the characters are counted before and after, whatever their order. A character is `lost`
that comes back in no form at all; one that comes back in another case or compatibility form (NFKD) is `changed`: an
uncased or normalising tokenizer does so on purpose. Whitespace, which word-level tokenizers put in again by rule, is
counted apart. Tokens that mean "unknown" stand for nothing.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from halfstep.launcher.data.readers import Piece
from halfstep.launcher.data.sample import Sample
from halfstep.launcher.data.tokenizer import Tokenizer
from halfstep.launcher.errors import RequestError

MOST_LOST = 0.01
"""Share. SentencePiece's own default covers all but 0.05 % of a text's characters; who loses twenty times that lacks
a script, an alphabet or the emoji of the text, and a model cannot learn what it never sees."""
_SAMPLE_CHARACTERS = 2**19
_BLOCK_CHARACTERS = 1024
_EARLY_CHARACTERS = 2**16
_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What came back of a sample."""

    characters: int
    """Looked at, whitespace included."""
    lost: float
    """Share of the characters that are no whitespace."""
    changed: float
    """Share of those that came back in another form."""
    whitespace: float
    """Share of the whitespace that did not come back as it was."""
    examples: list[str]
    """The characters that were lost most often."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the manifest."""
        return asdict(self)


def measure(chosen: Tokenizer, blocks: Iterable[str]) -> Fidelity:
    """Return what becomes of blocks of text on their way through a tokenizer and back."""
    characters = 0
    before, gone, folded, missing = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for block in blocks:
        characters += len(block)
        known = [token for token in chosen.encode(block) if token != chosen.unknown]
        again = chosen.decode(known)
        mine = Counter(block)
        before += mine
        gone += mine - Counter(again)
        mine = Counter(_folded(block))
        folded += mine
        missing += mine - Counter(_folded(again))
    solid = {True: 0, False: 0}
    different = {True: 0, False: 0}
    for character, count in before.items():
        solid[not character.isspace()] += count
        different[not character.isspace()] += gone[character]
    lost = missing.total() / max(1, folded.total())
    return Fidelity(
        characters=characters,
        lost=lost,
        changed=max(0.0, different[True] / max(1, solid[True]) - lost),
        whitespace=different[False] / max(1, solid[False]),
        examples=[character for character, _ in missing.most_common(_EXAMPLES)],
    )


def _folded(text: str) -> str:
    """Return a text without whitespace, its letters without case, ligatures and widths; accents stay, by themselves."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(plain.split())


class Watch:
    """Samples a stream of pieces as it passes, and refuses a tokenizer that loses too much of it.

    It looks twice: at the first 64 Ki characters, before hours of work, and at a sample of all when the stream has
    ended.
    """

    def __init__(self, chosen: Tokenizer, *, seed: int, name: str, allowed: bool) -> None:
        self._chosen, self._name, self._allowed = chosen, name, allowed
        self._sample = Sample(seed, _SAMPLE_CHARACTERS, _BLOCK_CHARACTERS)
        self._early = False

    def over(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces themselves. Raises RequestError as `result` does."""
        for piece in pieces:
            self._sample.add(piece.text)
            if not self._early and self._sample.characters >= _EARLY_CHARACTERS:
                self._early = True
                self.result()
            yield piece

    def result(self) -> Fidelity:
        """Return what is lost of the sample so far; raises RequestError where that is too much and not allowed."""
        done = measure(self._chosen, self._sample.blocks)
        if done.lost > MOST_LOST and not self._allowed:
            examples = " ".join(map(shown, done.examples))
            raise RequestError(
                f"the tokenizer loses {100 * done.lost:.1f} % of the text: of {done.characters:,} characters that were "
                f"looked at, such as {examples} do not come back",
                where=f"--tokenizer {self._name}",
                fix="take a tokenizer made for this text, train one with --vocab-size, or insist with --allow-lossy",
            )
        return done


def shown(character: str) -> str:
    """Return a character as it can be printed anywhere."""
    if character.isprintable() and not unicodedata.combining(character):
        return character
    return f"U+{ord(character):04X}"
