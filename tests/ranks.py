"""The environment that tests start real ranks in."""

import os
from pathlib import Path


def environment(scratch: Path) -> dict[str, str]:
    """Return this process's environment without what a developer may have set, with a build cache of its own."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_NUM_THREADS", "PYTHONPATH", "LOCAL_SIZE", "RANK", "WORLD_SIZE")
    }
    return {**kept, "TORCH_EXTENSIONS_DIR": str(scratch / "ops"), "HF_HUB_OFFLINE": "1"}
