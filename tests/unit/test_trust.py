"""Whose a run directory is, what its plan may do, and the secret in it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from halfstep.launcher.config.load import Request, load
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan, run_id_of
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import run_directory, trust
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.topology import Topology

WORLD = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
Decide = Callable[..., tuple[Request, Plan]]


@pytest.fixture
def decide(corpus: Path) -> Decide:
    def make(*arguments: str) -> tuple[Request, Plan]:
        request = load(["model=gpt2-nano", f"data={corpus}", *arguments])
        return request, resolve(request, WORLD, facts.read(request.spec))

    return make


@pytest.fixture
def run(decide: Decide, tmp_path: Path) -> Path:
    run_directory.write_plan(tmp_path / "run", *decide())
    return tmp_path / "run"


def forge(run: Path, **changes: object) -> None:
    """Change keys of a plan by dotted path, `__` for a dot, and give it the run id that fits."""
    tree = json.loads((run / "plan.json").read_text())
    for path, value in changes.items():
        *sections, last = path.split("__")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    tree["run_id"] = run_id_of(tree)
    (run / "plan.json").write_text(json.dumps(tree))


def test_a_plan_that_was_changed_is_refused_even_by_a_single_number(run: Path) -> None:
    text = (run / "plan.json").read_text()
    (run / "plan.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(RequestError, match=r"plan\.json was changed after it was written"):
        Run(run).require_as_asked()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"model__weights": "/tmp/evil"}, "weights from /tmp/evil"),
        ({"data__path": "/etc", "data__train_prefix": "/etc/passwd"}, "data from /etc/passwd"),
        ({"data__train_prefix": "/etc/passwd"}, "data from /etc/passwd"),
        (
            {"deepspeed__csv_monitor": {"enabled": True, "job_name": "../escaped", "output_path": "here"}},
            "a DeepSpeed key that names ../escaped",
        ),
        ({"deepspeed__tensorboard__output_path": "~/x"}, "a DeepSpeed key that names ~/x"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_forged_plan_with_a_fitting_run_id_does_nothing_beyond_its_request(
    run: Path, changes: dict[str, object], what: str
) -> None:
    forge(run, **changes)
    with pytest.raises(RequestError) as caught:
        Run(run).require_as_asked()
    assert caught.value.what == f"plan.json does what request.toml does not ask for: {what}"


def test_what_the_request_names_itself_is_taken(decide: Decide, tmp_path: Path) -> None:
    arguments = [
        "ds.csv_monitor.enabled=true",
        "ds.csv_monitor.output_path=/logs/of mine",
        "ds.csv_monitor.job_name=../x",
    ]
    run_directory.write_plan(tmp_path / "run", *decide(*arguments))
    assert Run(tmp_path / "run").plan.deepspeed["csv_monitor"]["job_name"] == "../x"


@pytest.mark.parametrize("name", ["", "plan.json", "request.toml", "origins.json"])
@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_what_everybody_can_write_needs_consent(run: Path, name: str, mode: int) -> None:
    place = run / name
    trust.require_own(run, consent=False)
    place.chmod(mode)
    with pytest.raises(RequestError) as caught:
        trust.require_own(run, consent=False)
    assert caught.value.what.startswith(f"{place} can be written by everybody, who could decide what runs as ")
    assert trust.CONSENT in caught.value.fix
    trust.require_own(run, consent=True)
    place.chmod(0o755 if not name else 0o644)
    trust.require_own(run, consent=False)


def test_what_another_user_owns_needs_consent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(run).st_uid + 4711)
    if os.stat(run).st_uid == 0:
        trust.require_own(run, consent=False)  # what is root's is not in other hands: root may do everything
        os.chown(run / "plan.json", 65534, 65534)
    with pytest.raises(RequestError, match="belongs to"):
        trust.require_own(run, consent=False)
    monkeypatch.setenv(trust.CONSENT_VARIABLE, str(run))
    trust.require_own(run, consent=False)


def test_what_a_group_of_several_can_write_needs_consent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "plan.json").chmod(0o664)
    monkeypatch.setattr(trust, "_group", lambda number: trust.user_name(os.geteuid()))
    trust.require_own(run, consent=False)  # a group of this user's own, as systems make them
    monkeypatch.setattr(trust, "_group", lambda number: "project")
    with pytest.raises(RequestError, match="can be written by the group project"):
        trust.require_own(run, consent=False)


def test_a_run_directory_is_made_so_that_nobody_else_can_write_it(decide: Decide, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run_directory.write_plan(tmp_path / "open", *decide())
    finally:
        os.umask(before)
    assert (tmp_path / "open").stat().st_mode & 0o022 == 0
    trust.require_own(tmp_path / "open", consent=False)


def test_ranks_share_a_secret_that_only_their_user_can_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = trust.secret(tmp_path / "run", {})
    finally:
        os.umask(before)
    assert first == trust.secret(tmp_path / "run", {})
    assert first != trust.secret(tmp_path / "other", {})
    assert len(first.strip()) == 64
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".secret"]
    assert (tmp_path / "run" / ".secret").stat().st_mode & 0o777 == 0o600
    assert trust.secret(tmp_path / "run", {trust.SECRET_VARIABLE: "given"}) == b"given"


@pytest.mark.parametrize("planted", ["readable", "link", "folder", "pipe"])
def test_a_planted_secret_is_refused(tmp_path: Path, planted: str) -> None:
    file = tmp_path / ".secret"
    if planted == "readable":
        file.write_text("0" * 64)
        file.chmod(0o644)
    elif planted == "link":
        (tmp_path / "elsewhere").write_text("0" * 64)
        file.symlink_to(tmp_path / "elsewhere")
    elif planted == "folder":
        file.mkdir()
    else:
        os.mkfifo(file, 0o600)
    with pytest.raises(RequestError):
        trust.secret(tmp_path, {})
