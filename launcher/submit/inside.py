"""What a job script asks from inside its allocation: where the ranks may meet, and whether the run goes on.

python inside.py begin RUN            prints a free port, or ends with the code that the job has to end with
python inside.py end RUN STATUS       ends with 0 (done), 75 (put the job back into the queue) or the run's own code
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a script, Python puts launcher/submit/ itself on the path, where `site` would not be Python's.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launcher.errors import (
    EXIT_NUMERICS,
    EXIT_REFUSED,
    EXIT_REQUEST,
    EXIT_STOPPED,
    HalfstepError,
    NumericsError,
    RequestError,
    TopologyError,
)
from launcher.watch.exits import read_exit, read_refusal, start_of_job

STUCK = 3
"""So many starts in a row may end without a newer checkpoint; a number of attempts that go on has no limit."""
_FIRST_PORT, _PORTS = 20000, 12000  # below 32768, where Linux takes ports for outgoing connections
_STARTS = "starts.jsonl"
"""In the run directory: a line for every start of a job, and how many attempts there were then."""
_FOR_GOOD = (0, EXIT_REQUEST, EXIT_REFUSED, EXIT_NUMERICS)


def begin(run: Path, environ: Mapping[str, str] = os.environ) -> int:
    """Return a port for the ranks to meet at.

    Raises RequestError where this host does not see the run directory, and NumericsError where the run is stuck.
    """
    if not (run / "plan.json").is_file():
        raise RequestError(
            f"{run} is not a run directory on {socket.gethostname()}",
            where="the job script, on the first node of the job",
            fix="put out= on a file system that every node sees",
        )
    if cause := stuck(run):
        raise cause
    with (run / _STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"attempts": len(_attempts(run)), "time": time.time(), **start_of_job()}) + "\n")
    return free_port(int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_ARRAY_TASK_ID", "0")))


def free_port(job: int, index: int) -> int:
    """Return the port that belongs to a job, or the next one that nothing on this host uses."""
    first = (job * 16 + index) % _PORTS
    for offset in range(_PORTS):
        port = _FIRST_PORT + (first + offset) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise TopologyError("no port is free", where=socket.gethostname(), fix="look for what holds them: ss -ltn")


def end(run: Path, status: int) -> int:
    """Return what the job has to do after its ranks have ended with `status`, and say why."""
    attempts = _attempts(run)
    found = read_refusal(run) or (read_exit(attempts[-1]) if attempts and not _idle_starts(run) else None)
    code = found["code"] if found else status
    if code == 0 and not (run / "summary.json").is_file():
        code = 1  # the ranks never began
    told = f"{found['cause']} (exit code {code})" if found else f"the ranks ended with exit code {code}"
    if code == 0:
        (run / _STARTS).unlink(missing_ok=True)
    if code in _FOR_GOOD:
        print("--- the run is done" if code == 0 else f"--- the run ends: {told}", flush=True)
        return code
    if cause := stuck(run):
        print(f"--- {told}\n{cause}", flush=True)
        return cause.exit_code
    print(f"--- {told}; there is more to do", flush=True)
    return EXIT_STOPPED


def stuck(run: Path) -> HalfstepError | None:
    """Return the reason to give up: the last starts of this job all ended where the newest checkpoint stands."""
    attempts = _attempts(run)
    if _idle_starts(run) >= STUCK:
        return NumericsError(
            f"{STUCK} starts in a row ended before the ranks had begun",
            where=str(run / _STARTS),
            fix="what they said stands above; mend it and submit the run again",
        )
    if not attempts:
        return None
    newest = _newest(run)
    begins = [_steps_done(one) for one in attempts]
    ends = [*begins[1:], newest]
    count = 0
    for attempt, first, last in reversed(list(zip(attempts, begins, ends, strict=True))):
        if last != newest or _job(attempt) != start_of_job()["job"]:
            break
        if first == newest:
            count += 1
            continue
        # This one wrote the newest checkpoint: it got somewhere, but counts if it then failed.
        ended = read_exit(attempt)
        count += ended is None or ended["code"] != EXIT_STOPPED
        break
    if count < STUCK:
        return None
    ended = read_exit(attempts[-1])
    why = ended["cause"] if ended else "nobody could say how the last one ended: its node failed, or all was killed"
    at = f"step {newest}" if newest else "the start"
    return NumericsError(
        f"{count} starts in a row came no further than {at}: {why}",
        where=str(attempts[-1]),
        fix="mend the cause and submit it again; with a time limit too short for one checkpoint, give more --time",
    )


def _idle_starts(run: Path) -> int:
    """Count the last starts of this job that made no attempt."""
    try:
        rows = [json.loads(line) for line in (run / _STARTS).read_text("utf-8").splitlines()]
        made = [int(row["attempts"]) for row in rows if row["job"] == start_of_job()["job"]]
    except (OSError, ValueError, KeyError):
        return 0
    now = len(_attempts(run))
    return next((count for count, one in enumerate(reversed(made)) if one != now), len(made))


def _attempts(run: Path) -> list[Path]:
    return sorted(one for one in (run / "attempts").glob("[0-9]*") if one.is_dir())


def _steps_done(attempt: Path) -> int:
    return int(_about(attempt).get("steps_done", 0))


def _job(attempt: Path) -> str:
    return str(_about(attempt).get("environment", {}).get("SLURM_JOB_ID", ""))


def _about(attempt: Path) -> dict[str, Any]:
    try:
        return json.loads((attempt / "env.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _newest(run: Path) -> int:
    steps = [one.parent.name.removeprefix("step-") for one in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((int(one) for one in steps if one.isdigit()), default=0)


def main(words: list[str]) -> int:
    """Do one of the two, and return the exit code."""
    try:
        if words[0] == "begin":
            print(begin(Path(words[1])), flush=True)
            return 0
        return end(Path(words[1]), int(words[2]))
    except HalfstepError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
