"""Where caches go: to XDG_CACHE_HOME, to HOME, or to a folder of this user's under TMPDIR; never to anybody else's."""

import os
import tempfile
from pathlib import Path

import pytest

from halfstep.launcher.engine.ranks import opcache
from halfstep.launcher.errors import RequestError
from halfstep.launcher.system import caches


@pytest.fixture(autouse=True)
def _own_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def own(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"halfstep-{os.geteuid()}"


def test_the_variables_decide_and_then_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    assert caches.cache("ops") == tmp_path / "home/.cache/halfstep/ops"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.cache("ops") == tmp_path / "xdg/halfstep/ops"
    assert opcache.folder().parent == tmp_path / "xdg/halfstep/ops"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "torch"))
    assert opcache.folder() == tmp_path / "torch"


@pytest.mark.parametrize("home", ["missing", "a file", "not writable", "unset"])
def test_without_a_home_that_can_be_written_a_folder_under_tmpdir_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "a file":
        (tmp_path / "home").write_text("")
    elif home == "not writable":
        (tmp_path / "home").mkdir()
        writable = os.access
        monkeypatch.setattr(os, "access", lambda place, mode: "home" not in str(place) and writable(place, mode))
    elif home == "unset":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(Path, "home", _no_home)
    folder = caches.make(caches.cache("verdicts"))
    assert folder == own(tmp_path) / "cache" / "verdicts"
    assert folder.is_dir()
    assert own(tmp_path).stat().st_mode & 0o777 == 0o700


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RequestError) as caught:
        caches.make(caches.cache("ops"))
    assert caught.value.where == f"XDG_CACHE_HOME={tmp_path / 'file'}"
    assert caught.value.fix == "let XDG_CACHE_HOME name a folder that you may write"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "ops"))
    with pytest.raises(RequestError, match="Not a directory") as caught:
        opcache.load_operators([])
    assert caught.value.where == f"TORCH_EXTENSIONS_DIR={tmp_path / 'file' / 'ops'}"
    assert caught.value.fix == "let TORCH_EXTENSIONS_DIR name a folder that you may write"


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_folder_that_somebody_else_has_put_there_is_refused(tmp_path: Path, planted: str) -> None:
    place = own(tmp_path)
    if planted == "open":
        place.mkdir(mode=0o777)
        place.chmod(0o777)
    elif planted == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    else:
        place.write_text("")
    with pytest.raises(RequestError, match="is not a folder of this user alone"):
        caches.temporary()


def test_scratch_folders_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    first = caches.scratch()
    left = first.with_name(first.name.replace(f"-{os.getpid()}-", "-999999999-"))
    left.mkdir()
    elsewhere = own(tmp_path) / "launch-another-host-1-2-3"
    elsewhere.mkdir()
    assert caches.scratch() == first
    assert sorted(own(tmp_path).iterdir()) == sorted([first, elsewhere]), "another host's processes cannot be seen"
    caches.remove_scratch()
    assert list(own(tmp_path).iterdir()) == [elsewhere]


def test_two_installations_do_not_build_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    from importlib.machinery import ModuleSpec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = opcache.folder()
    find = importlib.util.find_spec

    def elsewhere(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None, origin=f"/other/venv/{name}/__init__.py") if name == "deepspeed" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", elsewhere)
    assert opcache.folder() != here
    assert opcache.folder().parent == here.parent


def test_a_stale_build_lock_is_removed_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    lock = tmp_path / "ops" / "deepspeed_cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert opcache.load_operators([]) == []
    assert not lock.exists()
