"""The run directory: the one place where a run's request, plan, attempts and results meet, and its lease.

request.toml plan.json ds_config.json origins.json      what was asked and decided
metrics.jsonl events.jsonl summary.json                  what was seen
checkpoints/step-00000100/                               what a start resumes from
attempts/0001/{env.json,rank-0.log,exit.json}            every start, on what, and how it ended
lease                                                    held by the launch that is running
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from halfstep.launcher.config.dotted import flatten, unflatten
from halfstep.launcher.config.load import Request
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import environment, layout
from halfstep.launcher.rundir.lease import LEASE_FILES
from halfstep.launcher.rundir.trust import SECRET_FILE
from halfstep.launcher.system import foreign
from halfstep.launcher.system.files import append, cannot_write, write_atomic, write_json

_WRITTEN_FIRST = ("plan.json", "request.toml", "ds_config.json", "origins.json", "refused.json")


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """Paths of one run, and of its present attempt."""

    path: Path
    attempt: Path

    @property
    def metrics(self) -> Path:
        """One row per optimizer step, and one per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened besides steps."""
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        """The result."""
        return self.path / "summary.json"

    @property
    def stop_file(self) -> Path:
        """Whoever makes this file stops the run."""
        return self.path / "STOP"

    def rank_log(self, rank: int) -> Path:
        """What one rank of this attempt had to say."""
        return self.attempt / f"rank-{rank}.log"


def location(request: Request, plan: Plan) -> Path:
    """Return where a run lives: `out`, or runs/<run id> under the current folder."""
    return Path(request.spec.out) if request.spec.out else Path.cwd() / "runs" / plan.run_id


def named(arguments: Sequence[str]) -> Path | None:
    """Return the directory that `run=DIR` or `--run DIR` names, or None where the words are a request of their own."""
    arguments = (
        [f"run={arguments[1]}", *arguments[2:]] if arguments[:1] == ["--run"] and len(arguments) > 1 else arguments
    )
    if not arguments or not arguments[0].startswith(("run=", "--run")):
        return None
    directory = arguments[0].partition("=")[2]
    if len(arguments) > 1 or not directory:
        said = " ".join(arguments)
        raise RequestError("--run takes one run directory and no key=value words", where=said, fix="--run DIR")
    return Path(directory).absolute()


def note_proof(path: Path, proved: bool | None, reason: str) -> None:
    """Write into the summary of a run that has one whether its cell is proved, as the gate says after the run."""
    try:
        summary = foreign.read_object(path / "summary.json")
    except (OSError, ValueError):  # it has none, or its readers say what is wrong with it
        return
    with cannot_write(path):
        write_json(path / "summary.json", {**summary, "proved": proved, "unproved_because": reason})


def write_plan(path: Path, request: Request, plan: Plan) -> None:
    """Write what was asked and decided; refuse a directory that belongs to a different run or to something else.

    plan.json comes last: a directory that has one has everything, and one whose writer was killed is written again.
    """
    refuse_another_run(path, plan)
    with cannot_write(path):
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        given = {
            key: value for key, value in flatten(request.spec.model_dump(by_alias=True)).items() if value is not None
        }
        asked = unflatten(
            {key: value for key, value in given.items() if key in request.origins or key.startswith("ds.")}
        )
        write_atomic(path / "request.toml", tomli_w.dumps(asked))
        write_json(path / "ds_config.json", plan.deepspeed)
        write_json(path / "origins.json", {"request": request.origins, "deepspeed": plan.origins})
        write_json(path / "plan.json", plan.to_dict())


def refuse_another_run(path: Path, plan: Plan, *, reported: bool = False) -> None:
    """Raise RequestError where a directory belongs to a different run, or is something else.

    The identity in its plan decides, and where that is damaged the one in the plan of its last attempt: what was cut
    short or spoiled otherwise is written again. `reported`: by another rank, which sees the same directory.
    """
    if not path.exists():
        return
    refuse = partial(RequestError, reported=reported)
    there = _planned(path) if path.is_dir() else None
    if there is None:
        if not path.is_dir() or not all(_is_ours(item.name) for item in path.iterdir()):
            raise refuse(
                f"{path} exists and is not a run directory",
                where=f"out={path}",
                fix="choose an out that does not exist yet",
            )
        return
    old = there["identity"]
    tokens = {there.get("data", {}).get("tokens_digest"), plan.data.tokens_digest} - {None}
    if old.get("data") == plan.identity.get("data") and len(tokens) == 2:
        raise refuse(
            f"the tokens in {plan.data.path} are not those that the run in {path} was planned for",
            where=f"data={plan.data.path} and out={path}",
            fix="bring the corpus back as it was, or choose another out",
        )
    if gone := plan.left_out_since(there):
        raise refuse(
            f"the run in {path} was made with {', '.join(gone)}, which is left out now, and its checkpoints are of it",
            where=f"out={path}",
            fix=f"go on with it as it is, `deepspeed launcher/train.py run={path}`, or choose another out",
        )
    new = plan.identity
    changed = plan.changed_from(old)
    if changed:
        said = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:4])
        raise refuse(
            f"{path} belongs to a different run: {said}"
            + (f", and {len(changed) - 4} more" if len(changed) > 4 else ""),
            where=f"out={path}",
            fix="choose another out (or none), or ask for the same run again",
        )


def _planned(path: Path) -> dict[str, Any] | None:
    """Return the plan of the run in a directory, with what makes it this run; None where nothing in it says so."""
    for file in (path / "plan.json", *(folder / "plan.json" for folder in reversed(layout.attempts(path)))):
        with contextlib.suppress(OSError, ValueError):
            tree = foreign.read_object(file)
            if isinstance(tree.get("identity"), dict) and isinstance(tree.get("data"), dict):
                return tree
    return None


def _is_ours(name: str) -> bool:
    """Tell whether a start that was cut short may have left this file."""
    return name.lstrip(".").startswith((*_WRITTEN_FIRST, *(own.lstrip(".") for own in (*LEASE_FILES, SECRET_FILE))))


def start_attempt(path: Path, extra: Mapping[str, Any], *, steps_done: int = 0) -> RunDir:
    """Make the next attempts/NNNN with its env.json, and leave of the last attempt's results what it resumes from.

    Nothing is lost: rows of steps that will be done again, and a result that will be replaced, move into the folder of
    the attempt that made them. A start from step 1 also puts checkpoints out of the way, which would belong to another
    series.
    """
    attempts = path / "attempts"
    with cannot_write(path):
        attempts.mkdir(exist_ok=True)
        names = (folder.name for folder in attempts.iterdir())
        number = 1 + max((int(name) for name in names if re.fullmatch(r"[0-9]{4,9}", name)), default=0)
        attempt = attempts / f"{number:04d}"
        attempt.mkdir()
        previous = attempts / f"{number - 1:04d}"
        if not previous.is_dir():
            previous = attempt
        metrics = path / "metrics.jsonl"
        if steps_done and metrics.exists():
            _truncate(metrics, steps_done, previous / "metrics-redone.jsonl")
        for name in ("summary.json",) if steps_done else ("metrics.jsonl", "summary.json", "checkpoints"):
            if (path / name).exists():
                (path / name).replace(previous / name)
        write_json(attempt / "env.json", {**environment.describe(), **extra})
        # A later attempt may continue with another stage.
        write_atomic(attempt / "plan.json", foreign.read_bytes(path / "plan.json"))
    return RunDir(path=path, attempt=attempt)


def _truncate(metrics: Path, steps: int, redone: Path) -> None:
    """Cut a metrics file after the rows of `steps` steps, atomically; the rest, a torn last line too, goes to `redone`.

    The evaluation after the last step kept stays, where it was made.
    """
    kept, cut = [], []
    for line in foreign.lines(metrics):
        try:
            beyond = foreign.loads(line)["step"] > steps
        except (ValueError, KeyError, TypeError):
            beyond = True
        (cut if beyond or not line.endswith(b"\n") else kept).append(line)
    if cut:
        append(redone, b"".join(line if line.endswith(b"\n") else line + b"\n" for line in cut))
        write_atomic(metrics, b"".join(kept))
