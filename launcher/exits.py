"""How an attempt ended: attempts/NNNN/exit.json, which the first to know writes, so that nothing hides the cause."""

import json
import os
import time
from pathlib import Path
from typing import Any


def write_exit(attempt: Path, code: int, cause: str, rank: int) -> int | None:
    """Write how an attempt ended and return None, or the code that another rank wrote before.

    The first to write wins, so that a follow-up failure hides no cause.
    """
    file = attempt / "exit.json"
    temporary = attempt / f".exit.json.{os.getpid()}"
    try:
        temporary.write_text(
            json.dumps({"code": code, "cause": cause, "rank": rank, "time": time.time()}, indent=2) + "\n", "utf-8"
        )
        try:
            os.link(temporary, file)
        except FileExistsError:
            return int(json.loads(file.read_text("utf-8"))["code"])
        except OSError:  # a file system without hard links
            if file.exists():
                return int(json.loads(file.read_text("utf-8"))["code"])
            temporary.replace(file)
    except (OSError, ValueError, KeyError):
        return None  # it cannot be written, so it has to be said
    finally:
        temporary.unlink(missing_ok=True)
    return None


def read_exit(attempt: Path) -> dict[str, Any] | None:
    """Return how an attempt ended: `code`, `cause`, `rank`, `time`; None where nobody has written it yet."""
    try:
        found = json.loads((attempt / "exit.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("code"), int) else None
