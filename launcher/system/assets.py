"""Find the data folders that ship with Halfstep, from a clone and from an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """Return the folder `ds_configs` or `slurm`: beside `launcher`, in a clone and in a wheel."""
    path = _find(name)
    assert path.is_dir(), f"{path} is not a folder"
    return path


def file(name: str) -> Path:
    """Return a file that ships beside the packages: `constraints.txt`."""
    return _find(name)


def _find(name: str) -> Path:
    path = _PACKAGE.parent / name
    assert path.exists(), f"the installation lacks {name!r}"
    return path


def home() -> Path:
    """Return the folder that holds `launcher`, `models` and the data: a clone, or the package in site-packages."""
    return _PACKAGE.parent


def train_script() -> Path:
    """Return the file that `deepspeed`, `torchrun` and `accelerate launch` are given."""
    return _PACKAGE / "train.py"


def source_root() -> Path:
    """Return the folder that holds the package `halfstep`: a clone, or site-packages."""
    return next(folder for folder in _PACKAGE.parents if (folder / "halfstep" / "__init__.py").is_file())
