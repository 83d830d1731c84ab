"""Translation: short messages of programs and their translations, from the catalogues of this machine."""

import re
from collections import Counter, defaultdict
from pathlib import Path

from halfstep.launcher.errors import RequestError
from halfstep.launcher.ready_tasks import catalogues
from halfstep.launcher.ready_tasks.task_folder import Made, Row

PACKAGES = "git libc-l10n libglib2.0-data gnupg-l10n gettext iso-codes"
"""Of Debian, with messages in many languages."""
_NAMES = re.compile(r"iso[_-]\d+")
"""Catalogues of the names of countries and languages, which are no sentences."""
_MOST_WORDS = 7
_MOST_CHARACTERS = 60
_LEAST_USES = 8
"""Times that each word of a message has to stand in all messages: what is held out is made of words that were seen."""
_MARKS = re.compile(r"^[^\W\d_][^\W\d_'\u2019 ,-]*(?:[ ,'\u2019-]+[^\W\d_]+)*$")
"""Letters and what stands between words: no placeholders, options, paths or markup."""


def make(pair: str, folder: Path | None) -> Made:
    """Return the translations of a pair such as `en-de` or `de-fr`, from the catalogues in `folder` or the system's.

    Raises RequestError for a pair of which there are no catalogues.
    """
    source, _, target = pair.partition("-")
    if not all(re.fullmatch(r"[a-z]{2,3}(_[A-Za-z@]{2,12})?", language) for language in (source, target)):
        raise RequestError(f"{pair!r} is no pair of languages", where=f"--pair {pair}", fix="--pair en-de, say")
    if source == target:
        raise RequestError("there is nothing to translate", where=f"--pair {pair}", fix="--pair en-de, say")
    places = (folder,) if folder is not None else catalogues.FOLDERS
    texts = {language: _texts(places, language, pair) for language in (source, target)}
    domains: set[str] = set()
    translations: dict[str, Counter[str]] = defaultdict(Counter)
    for (domain, message), right in texts[target].items():
        left = message if source == catalogues.SOURCE_LANGUAGE else texts[source].get((domain, message), "")
        given, wanted = _clean(left), _clean(right)
        if given and wanted and given.lower() != wanted.lower():
            translations[given][wanted] += 1
            domains.add(domain)
    uses = Counter(word for given in translations for word in given.lower().split())
    rows = [
        # What most catalogues say; of equally many the first in the order of letters.
        Row(
            prompt=f"{given} =",
            completion=f" {min(wanted, key=lambda text: (-wanted[text], text))}",
            source=given.lower(),
        )
        for given, wanted in sorted(translations.items())
        if all(uses[word] >= _LEAST_USES for word in given.lower().split())
    ]
    tokenize = "zh" if target.startswith("zh") else "char" if target.startswith(("ja", "ko")) else "13a"
    return Made(
        name=f"translation-{source}-{target}",
        rows=rows,
        judged_by=(
            'metrics = ["bleu", "chrf", "exact_match"]\ntoo_long = "skip"\n'
            f'bleu_tokenize = "{tokenize}"\n\n'
            '[answer]\nkind = "generate"\nmax_new_tokens = 40\nstop = ["\\n"]\n'
        ),
        about={
            "kind": "translation",
            "from": [str(place) for place in places],
            "catalogues": sorted(domains),
            "licence": "that of the programs which the catalogues belong to",
            "selection": f"messages of at most {_MOST_WORDS} words, letters alone, each word in {_LEAST_USES} "
            "messages or more; the most frequent translation",
        },
    )


def _texts(places: tuple[Path, ...], language: str, pair: str) -> dict[tuple[str, str], str]:
    """Return a language's texts by catalogue and message; of the messages' own language nothing is needed."""
    if language == catalogues.SOURCE_LANGUAGE:
        return {}
    files = [file for place in places for file in catalogues.files(place, language)]
    files = [file for file in files if not _NAMES.match(file.stem)]
    if not files:
        raise RequestError(
            f"there are no message catalogues of language {language!r}",
            where=f"--pair {pair}, {' and '.join(map(str, places))}",
            fix=f"name a folder that has some with --source, or on Debian install {PACKAGES}",
        )
    return {
        (_domain(file, language), message): text
        for file in files
        for message, text in catalogues.messages(file).items()
    }


def _domain(file: Path, language: str) -> str:
    """Return what a catalogue belongs to: of de/LC_MESSAGES/git.mo and of git/po/de.po it is git."""
    if file.stem != language:
        return file.stem
    return file.parent.parent.name if file.parent.name in ("po", "LC_MESSAGES") else file.parent.name


def _clean(text: str) -> str | None:
    """Return a message without the marks of menus and its last full stop; None where it is no short plain sentence."""
    text = " ".join(text.replace("_", "").replace("&", "").split()).rstrip(".:…! ")
    plain = len(text) <= _MOST_CHARACTERS and _MARKS.match(text)
    spaced = not re.search(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", text)  # words of these stand without spaces
    short = not spaced or len(text.split()) <= _MOST_WORDS
    return text if plain and short else None
