"""Where the attempts and the checkpoints of a run lie; standard library only, since jobs ask it too."""

import contextlib
import re
from pathlib import Path


def attempts(run: Path) -> list[Path]:
    """Return the folders of a run's attempts, oldest first."""
    return [folder for _, folder in sorted(_numbered(run / "attempts", r"(\d{1,18})"))]


def newest_checkpoint(run: Path) -> int | None:
    """Return the step of the newest checkpoint that has a manifest; those that were set aside do not count."""
    saved = _numbered(run / "checkpoints", r"step-(\d{8,18})")
    return max((step for step, folder in saved if (folder / "manifest.json").is_file()), default=None)


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Return the folders in a folder whose whole name fits, by number; nothing where it cannot be read."""
    numbered = []
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            match = re.fullmatch(pattern, entry.name, re.ASCII)
            if match and entry.is_dir():
                numbered.append((int(match[1]), entry))
    return numbered
