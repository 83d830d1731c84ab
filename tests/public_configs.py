"""DeepSpeed configs as people publish them: keys and values of other projects' files, with where each was found.

The data are facts in a layout of ours, dotted key by dotted key; of GPT-NeoX's files the part that is DeepSpeed's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.config.dotted import unflatten

FILE = Path(__file__).with_name("public_deepspeed_configs.json")


@dataclass(frozen=True, kw_only=True)
class PublicConfig:
    """What one file of another project says."""

    repository: str
    path: str
    commit: str
    keys: dict[str, Any]
    """By dotted path."""

    def __str__(self) -> str:
        return f"{self.repository.rpartition('/')[2]}/{self.path}"

    def write(self, folder: Path) -> Path:
        """Write it as the JSON file that DeepSpeed takes."""
        file = folder / "public.json"
        file.write_text(json.dumps(unflatten(self.keys)), encoding="utf-8")
        return file


CONFIGS = [PublicConfig(**fields) for fields in json.loads(FILE.read_text("utf-8"))]
