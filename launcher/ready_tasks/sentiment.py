"""Sentiment: real sentences that people have rated, where an archive has them, or sentences from templates."""

import io
import random
import re
import tarfile
import zipfile
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.ready_tasks.task_folder import Made, Row, split_of
from halfstep.launcher.system import foreign

LABELS = ("negative", "positive")
SOURCE = "vaderSentiment-0.5.zip"
"""A package's sources (MIT), in which rated sentences of Hutto and Gilbert 2014 are."""
_RATED = "movieReviewSnippets_GroundTruth.txt"
_CLEAR = 1.0
"""Of ratings from -4 to 4: what lies between is neither."""
_MOST_BYTES = 1 << 26

_ROWS = 6000
_LABEL_NOISE = 0.05
_TYPOS = 0.2
_NEGATIONS = 0.12
_THINGS = (
    "acting", "plot", "music", "ending", "dialogue", "camera work", "cast", "service", "food", "room", "battery",
    "screen", "keyboard", "manual", "delivery", "packaging", "staff", "story", "pacing", "script", "sound", "design",
)  # fmt: skip
_WORDS = {
    "positive": (
        "brilliant", "great", "charming", "excellent", "wonderful", "superb", "lovely", "perfect", "touching", "solid",
        "fresh", "delightful", "impressive", "clever", "funny", "beautiful", "outstanding", "pleasant",
    ),
    "negative": (
        "terrible", "dull", "awful", "boring", "poor", "clumsy", "annoying", "weak", "disappointing", "stale", "ugly",
        "dreadful", "tedious", "broken", "sloppy", "useless", "bland", "horrible",
    ),
}  # fmt: skip
_HOW = ("", "", "really ", "very ", "quite ", "simply ", "surprisingly ", "utterly ")
_NEUTRAL = (
    "we saw it on a Tuesday", "my cousin had told me about it", "it came in a box", "I paid with a card",
    "the weather was cold that day", "it lasted two hours", "this was my second visit", "I read about it in the paper",
)  # fmt: skip


def make(archive: Path | None, seed: int) -> Made:
    """Return sentences and whether they speak well of something.

    `archive` is vaderSentiment-0.5.zip, whose film reviews twenty people rated; without it the sentences come from
    templates. Raises RequestError for an archive that holds no such reviews.
    """
    if archive is None:
        rows, about = _from_templates(seed), _ABOUT_TEMPLATES
    else:
        rows, about = _from_ratings(archive), {**_ABOUT_RATINGS, "from": archive.name}
    return Made(
        name="sentiment",
        rows=rows,
        judged_by=(
            'metrics = ["accuracy", "macro_f1"]\ntoo_long = "cut"\n\n'
            '[answer]\nkind = "choices"\nchoices = [" negative", " positive"]\n'
        ),
        about={"kind": "sentiment", **about},
    )


_ABOUT_RATINGS = {
    "licence": "MIT, that of the package; Hutto and Gilbert 2014, VADER",
    "selection": f"sentences of film reviews whose mean rating by twenty people is at least {_CLEAR} from neutral",
}
_ABOUT_TEMPLATES = {
    "from": "templates",
    "licence": "that of Halfstep",
    "selection": "sentences made of templates, no language of people: negations, contrasts in which the last clause "
    f"decides, and neutral clauses; a typing error in {_TYPOS:.0%} of them, and {_LABEL_NOISE:.0%} of the training "
    "labels are wrong on purpose (no held-out label is)",
}


def _row(text: str, label: str) -> Row:
    return Row(prompt=f"{text}\nsentiment:", completion=f" {label}", source=text.lower())


def _from_ratings(archive: Path) -> list[Row]:
    """Return the clearly rated sentences of the archive, each once."""
    where = f"--source {archive}"
    try:
        content = foreign.read_bytes(archive, _MOST_BYTES, follow=True)
        with zipfile.ZipFile(io.BytesIO(content)) as outer:
            inner = next(name for name in outer.namelist() if name.endswith(".tar.gz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(inner)), mode="r:gz") as files:
                member = next(file for file in files if file.name.endswith(f"/{_RATED}"))
                text = (files.extractfile(member) or io.BytesIO()).read().decode("utf-8", "replace")
    except OSError as error:
        raise RequestError(
            f"{archive} cannot be read: {error.strerror or error}", where=where, fix="check the path"
        ) from None
    except (zipfile.BadZipFile, tarfile.TarError, StopIteration, EOFError):
        raise RequestError(
            f"{archive.name} holds no {_RATED}",
            where=where,
            fix=f"name {SOURCE}: `pip download vaderSentiment==0.5 --no-deps --no-binary :all:` fetches it; or leave "
            "--source out for sentences from templates",
        ) from None
    rows: dict[str, Row] = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        sentence = " ".join(sentence.split())
        if abs(float(rating)) >= _CLEAR and sentence:
            rows.setdefault(sentence.lower(), _row(sentence, LABELS[float(rating) > 0]))
    return list(rows.values())


def _from_templates(seed: int) -> list[Row]:
    draw = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < _ROWS:
        label = draw.choice(LABELS)
        sentence = _sentence(draw, label)
        if draw.random() < _TYPOS:
            sentence = _with_typo(draw, sentence)
        wrong = draw.random() < _LABEL_NOISE and split_of(sentence.lower(), seed) == "train"
        shown = LABELS[1 - LABELS.index(label)] if wrong else label
        rows.setdefault(sentence.lower(), _row(sentence, shown))
    return list(rows.values())


def _sentence(draw: random.Random, label: str) -> str:
    main, other = _clause(draw, label), LABELS[1 - LABELS.index(label)]
    match draw.choices(("alone", "neutral", "and", "although", "but"), (30, 25, 25, 10, 10))[0]:
        case "alone":
            return f"{main}."
        case "neutral":
            return f"{draw.choice(_NEUTRAL)}, and {main}."
        case "and":
            return f"{_clause(draw, label)}, and {main}."
        case "although":
            return f"although {_clause(draw, other)}, {main}."
        case _:
            return f"{_clause(draw, other)}, but {main}."


def _clause(draw: random.Random, label: str) -> str:
    thing = draw.choice(_THINGS)
    if draw.random() < _NEGATIONS:
        return f"the {thing} was not {draw.choice(_WORDS[LABELS[1 - LABELS.index(label)]])}"
    return f"the {thing} was {draw.choice(_HOW)}{draw.choice(_WORDS[label])}"


def _with_typo(draw: random.Random, sentence: str) -> str:
    """Drop or double a letter inside a word."""
    place = draw.choice([match.start() for match in re.finditer(r"(?<=\w)\w(?=\w)", sentence)])
    return sentence[:place] + draw.choice(("", sentence[place] * 2)) + sentence[place + 1 :]
