"""Find the data folders that ship with Halfstep, from a clone and from an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the folder `ds_configs` or `slurm`: beside the package in a clone, inside it in a wheel."""
    found = _find(name)
    assert found.is_dir(), f"{found} is not a folder"
    return found


def file(name: str) -> Path:
    """Return a file that ships beside the packages: `constraints.txt`."""
    return _find(name)


def _find(name: str) -> Path:
    for candidate in (_PACKAGE.parent / name, _PACKAGE / "share" / name):
        if candidate.exists():
            return candidate
    raise AssertionError(f"the installation lacks {name!r}")


def train_script() -> Path:
    """Return the file that `deepspeed`, `torchrun` and `accelerate launch` are given."""
    return _PACKAGE / "train.py"


def source_root() -> Path:
    """Return the folder that holds the `launcher` and `models` packages: a clone, or site-packages."""
    return _PACKAGE.parent
