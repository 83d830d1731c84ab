"""Messages and their translations, from the catalogues that programs bring: .mo files, and .po files."""

import ast
import gettext
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDERS = (Path("/usr/share/locale"), Path("/usr/share/locale-langpack"))
"""Where Debian and others keep them."""
SOURCE_LANGUAGE = "en"
"""Of the messages themselves."""
_CONTEXT = "\x04"
"""Between a message's context and the message (gettext's own sign)."""
_MOST_BYTES = 1 << 26
_ENTRY = re.compile(r'^(msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)\s+(".*")$')


def files(folder: Path, language: str) -> list[Path]:
    """Return a language's catalogues below a folder, in the order of their paths."""
    laid_out = folder.glob(f"{language}/LC_MESSAGES/*.mo")
    by_name = (path for end in ("mo", "po") for path in folder.rglob(f"{language}.{end}"))
    beside = (path for end in ("mo", "po") for path in folder.glob(f"{language}/*.{end}"))
    return sorted({path for some in (laid_out, by_name, beside) for path in some if path.is_file()})


def messages(path: Path) -> dict[str, str]:
    """Return a catalogue's messages and their translations, without plurals; empty for what cannot be read."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        entries = _of_mo(path) if path.suffix == ".mo" else _of_po(path.read_text("utf-8"))
        return {
            message.rpartition(_CONTEXT)[2]: translation for message, translation in entries if message and translation
        }
    except (OSError, ValueError, struct.error, IndexError, LookupError, SyntaxError):  # damaged, or in an odd encoding
        return {}


def _of_mo(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        catalogue: Any = gettext.GNUTranslations(file)
    # Plurals stand there as (message, number).
    yield from ((message, text) for message, text in catalogue._catalog.items() if isinstance(message, str))


def _of_po(text: str) -> Iterator[tuple[str, str]]:
    """Yield the entries of a .po file; none that is fuzzy, obsolete or a plural."""
    for block in re.split(r"\n\s*\n", text):
        parts: dict[str, str] = {}
        fuzzy, key = False, ""
        for line in block.splitlines():
            line = line.strip()
            if line.startswith("#"):
                fuzzy |= line.startswith("#,") and "fuzzy" in line
            elif match := _ENTRY.match(line):
                key = match[1]
                parts[key] = ast.literal_eval(match[2])
            elif line.startswith('"') and key:
                parts[key] += ast.literal_eval(line)
        if not fuzzy and "msgid_plural" not in parts and "msgid" in parts and "msgstr" in parts:
            yield parts["msgid"], parts["msgstr"]
