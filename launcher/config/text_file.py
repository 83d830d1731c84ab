"""Read the text of a file that a user names: regular, of bounded size, UTF-8 with a byte-order mark or without."""

import errno
import tomllib
from pathlib import Path
from typing import Any

from halfstep.launcher.config import legal
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import foreign

MOST_BYTES = 2**20
"""Of a file that people write by hand; a device or a log named by mistake would otherwise be read to its end."""


def read_text(path: Path, what: str, where: str) -> str:
    """Return a file's text; `what` is how an error calls it, `where` who named it.

    Raises RequestError where it is missing, no regular file (a pipe would be waited for), too large, or not UTF-8.
    """
    try:
        content = foreign.read_bytes(path, MOST_BYTES, follow=True)
    except FileNotFoundError:
        raise RequestError(f"{what} {path} does not exist", where=where, fix="check the path") from None
    except OSError as error:
        fix = "name the file that you meant" if error.errno == errno.EFBIG else "check the path and its permissions"
        raise RequestError(f"{what} {path} cannot be read: {error.strerror}", where=where, fix=fix) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8 at byte {error.start}", where=str(path), fix="save the file as UTF-8"
        ) from None


def read_toml(path: Path, what: str, where: str) -> dict[str, Any]:
    """Return a TOML file's tables; raises RequestError as `read_text` does, and for what is no TOML or a maze of it."""
    text = read_text(path, what, where)
    try:
        tree = tomllib.loads(text)
        for _ in legal.leaves("", tree, str(path)):  # refuses what nothing behind could go through
            pass
        return tree
    except RecursionError:
        problem, fix = f"it is nested more than {legal.DEEPEST} levels deep", "check how it is nested"
    except ValueError as error:  # also a number with more digits than Python reads
        problem = f"it is not TOML: {error}"
        fix = 'fix that line; strings take quotes (precision = "fp16"), tables take [brackets]'
    raise RequestError(f"{what} cannot be read: {problem}", where=str(path), fix=fix)
